import { join } from "node:path";
import { Tokenizer as Core } from "@huggingface/tokenizers";
import { z } from "zod";
import { folderPath } from "./checkpoint.ts";
import { badFile, readJson, readJsonRequired } from "./json.ts";

/** Text to token ids and back, as a checkpoint's tokenizer.json has it. */
export interface Tokenizer {
  /**
   * BOS, and whatever else the checkpoint puts in front of a prompt, is added unless addBos is false or the
   * text spells it already.
   * Nothing is put behind.
   */
  encode(text: string, options?: { addBos?: boolean }): Int32Array;
  /** Special tokens and ids that the vocabulary lacks give no text. */
  decode(ids: ArrayLike<number>): string;
  /** A decoder that takes tokens one at a time; its texts join to decode(all). */
  stream(): TextStream;
}

export interface TextStream {
  /** What became printable: "" inside a UTF-8 character. */
  push(id: number): string;
  /** What was held back, with U+FFFD for what is no character; the stream is then as new. */
  end(): string;
}

const tokenizerFile = z.looseObject({
  model: z.looseObject({}),
  added_tokens: z.array(z.looseObject({ id: z.int(), content: z.string() })).default([]),
  normalizer: z.looseObject({}).nullable().default(null),
  pre_tokenizer: z.looseObject({}).nullable().default(null),
  post_processor: z.looseObject({}).nullable().default(null),
  decoder: z.looseObject({}).nullable().default(null),
});
const configFile = z.looseObject({
  add_bos_token: z.boolean().nullish(),
  bos_token: z.union([z.string(), z.looseObject({ content: z.string() })]).nullish(),
});
type ConfigFile = z.output<typeof configFile>;

/** Longest run of tokens that is held back: no character has so many. */
const MAX_HELD = 64;
/** What the decoder gives for bytes that are not (yet) a character. */
const INCOMPLETE = "\ufffd";

/** Read a folder's tokenizer.json and tokenizer_config.json. Errors: BAD_CHECKPOINT if missing or malformed. */
export function loadTokenizer(dir: string | URL): Promise<Tokenizer> {
  return Promise.resolve().then(() => {
    const path = join(folderPath(dir), "tokenizer.json");
    const file = readJsonRequired(path, tokenizerFile);
    const config = readJson(join(folderPath(dir), "tokenizer_config.json"), configFile) ?? {};
    try {
      const core = new Core(file, config);
      return makeTokenizer(core, promptPrefix(core, config));
    } catch (error) {
      throw badFile(path, "is of a kind that cannot be read", error);
    }
  });
}

function makeTokenizer(core: Core, prefix: readonly number[]): Tokenizer {
  const special = new Set<number>();
  for (const [id, token] of core.get_added_tokens_decoder()) if (token.special) special.add(id);
  const isText = (id: number): boolean => !special.has(id) && core.id_to_token(id) !== undefined;

  return {
    encode(text, { addBos = true } = {}): Int32Array {
      const ids: number[] = core.encode(text, { add_special_tokens: false }).ids;
      const spelled = prefix.every((id, i) => ids[i] === id);
      return Int32Array.from(addBos && !spelled ? [...prefix, ...ids] : ids);
    },
    decode(ids): string {
      const stream = makeStream(core, isText);
      let text = "";
      for (let i = 0; i < ids.length; i++) text += stream.push(ids[i] ?? -1);
      return text + stream.end();
    },
    stream: () => makeStream(core, isText),
  };
}

/** What the post-processor puts in front of a text, corrected by what tokenizer_config.json says of BOS. */
function promptPrefix(core: Core, config: ConfigFile): number[] {
  const plain: number[] = core.encode("a", { add_special_tokens: false }).ids;
  const whole: number[] = core.encode("a", { add_special_tokens: true }).ids;
  const start = whole.findIndex((_, i) => plain.every((id, j) => whole[i + j] === id));
  const prefix = whole.slice(0, Math.max(start, 0));

  const name = typeof config.bos_token === "string" ? config.bos_token : config.bos_token?.content;
  const bos = name === undefined ? undefined : core.token_to_id(name);
  if (bos === undefined) return prefix;
  if (config.add_bos_token === false) return prefix.filter((id) => id !== bos);
  if (config.add_bos_token === true && !prefix.includes(bos)) return [bos, ...prefix];
  return prefix;
}

/**
 * A token's text may depend on the one before (a leading space, a character in several tokens), so what is
 * printed is the difference that the new tokens make to the text of the ones printed last.
 */
function makeStream(core: Core, isText: (id: number) => boolean): TextStream {
  let shown: number[] = [];
  let held: number[] = [];
  const decode = (ids: number[]): string =>
    ids.length === 0
      ? ""
      : core.decode(ids, { skip_special_tokens: false, clean_up_tokenization_spaces: false });
  const difference = (): string => decode([...shown, ...held]).slice(decode(shown).length);

  return {
    push(id): string {
      if (!isText(id)) return "";
      held.push(id);
      const text = difference();
      if (!text.endsWith(INCOMPLETE)) {
        [shown, held] = [held, []];
        return text;
      }
      if (held.length < MAX_HELD) return "";
      [shown, held] = [[], []]; // nothing of it can be completed any more
      return text;
    },
    end(): string {
      const text = difference();
      [shown, held] = [[], []];
      return text;
    },
  };
}
