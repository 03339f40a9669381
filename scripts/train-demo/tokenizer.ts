/**
 * Trains the demo model's tokenizer: byte-level BPE, 2,048 tokens, written as a Hugging Face tokenizer.json.
 *
 *   bun scripts/train-demo/tokenizer.ts OUT.json [TEXT FILE ...]
 *
 * The text is what makeBook writes plus any files given. Every word of the fact lists must end up as one token, which
 * plain frequency would not give: the lists are counted again and again, with growing weight, until it does.
 */
import { readFileSync, writeFileSync } from "node:fs";
import { COUNTS, LONE, makeBook, NAMES, VALUES } from "../../lib/tasks/index.ts";

const VOCABULARY = 2048;
const SPECIAL: readonly string[] = ["<s>", "</s>"];
/** How the ByteLevel pre-tokenizer cuts text into words; a merge never crosses a word's end. */
const WORD = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;
const FACT_WORDS =
  "code codes gift gifts value names reach reaches after is of Question Answer What Which The".split(" ");

/** Byte value to the printable character that stands for it in a vocabulary file. */
function byteCharacters(): string[] {
  const printable = (b: number): boolean => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  let next = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCodePoint(printable(b) ? b : next++));
}

function countWords(texts: Iterable<string>): Map<string, number> {
  const counts = new Map<string, number>();
  for (const text of texts) {
    for (const word of text.match(WORD) ?? []) counts.set(word, (counts.get(word) ?? 0) + 1);
  }
  return counts;
}

/** Greedy BPE: again and again, the most frequent neighbouring pair becomes a token. Ties go to the older pair. */
function train(counts: Map<string, number>, merges: number): [number, number][] {
  const encoder = new TextEncoder();
  const words = [...counts].map(([word, count]) => ({ ids: [...encoder.encode(word)], count }));
  const width = 256 + merges;
  const found: [number, number][] = [];
  const weight = new Float64Array(width * width);
  for (let next = 256; next < width; next++) {
    weight.fill(0);
    let best = -1;
    for (const { ids, count } of words) {
      for (let i = 1; i < ids.length; i++) {
        const pair = (ids[i - 1] as number) * width + (ids[i] as number);
        weight[pair] = (weight[pair] as number) + count;
        const ahead = best < 0 ? 1 : (weight[pair] as number) - (weight[best] as number);
        if (ahead > 0 || (ahead === 0 && pair < best)) best = pair;
      }
    }
    if (best < 0) throw new Error("the text is too short for this vocabulary; give more files");
    const left = Math.floor(best / width);
    const right = best % width;
    found.push([left, right]);
    for (const word of words) merge(word.ids, left, right, next);
  }
  return found;
}

function merge(ids: number[], left: number, right: number, joined: number): void {
  let kept = 0;
  for (let i = 0; i < ids.length; i++, kept++) {
    const pair = ids[i] === left && ids[i + 1] === right;
    ids[kept] = pair ? joined : (ids[i] as number);
    if (pair) i++;
  }
  ids.length = kept;
}

function isOneToken(word: string, merges: readonly [number, number][]): boolean {
  const ids = [...new TextEncoder().encode(word)];
  merges.forEach(([left, right], i) => {
    merge(ids, left, right, 256 + i);
  });
  return ids.length === 1;
}

function tokenizerFile(merges: readonly [number, number][]): object {
  const text = byteCharacters();
  const pairs = merges.map(([left, right]): [string, string] => [
    text[left] as string,
    text[right] as string,
  ]);
  for (const [i, [left, right]] of merges.entries()) {
    text.push(`${text[left]}${text[right]}`);
    pairs[i] = [text[left] as string, text[right] as string];
  }
  const special = SPECIAL.map((content, id) => ({
    id,
    content,
    single_word: false,
    lstrip: false,
    rstrip: false,
    normalized: false,
    special: true,
  }));
  const bytes = { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: true };
  return {
    version: "1.0",
    truncation: null,
    padding: null,
    added_tokens: special,
    normalizer: null,
    pre_tokenizer: bytes,
    post_processor: {
      type: "TemplateProcessing",
      single: [{ SpecialToken: { id: "<s>", type_id: 0 } }, { Sequence: { id: "A", type_id: 0 } }],
      pair: [
        { SpecialToken: { id: "<s>", type_id: 0 } },
        { Sequence: { id: "A", type_id: 0 } },
        { Sequence: { id: "B", type_id: 0 } },
      ],
      special_tokens: { "<s>": { id: "<s>", ids: [0], tokens: ["<s>"] } },
    },
    decoder: bytes,
    model: {
      type: "BPE",
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: false,
      vocab: Object.fromEntries([...SPECIAL, ...text].map((token, id) => [token, id])),
      merges: pairs,
    },
  };
}

/** Books, questions and answers; a length estimate does, since there is no tokenizer yet. */
function* texts(files: readonly string[]): Generator<string> {
  const tokenizer = {
    encode: (text: string): { length: number } => ({ length: Math.ceil(text.length / 3) }),
  };
  for (let seed = 0; seed < 100; seed++) {
    const book = makeBook({ seed, tokens: 8192, tokenizer });
    yield book.text;
    for (const { prompt, answer } of book.questions) yield prompt + answer;
  }
  for (const file of files) yield readFileSync(file, "utf8").slice(0, 1 << 20);
}

const [out, ...files] = process.argv.slice(2);
if (out === undefined) throw new Error("usage: bun scripts/train-demo/tokenizer.ts OUT.json [TEXT FILE ...]");
const counts = new Map([...countWords(texts(files))].filter(([, count]) => count > 1));
const lists = [NAMES, VALUES, COUNTS, LONE.flatMap((what) => what.split(" ")), FACT_WORDS].flat();
const needed = [...new Set(lists)].map((word) => (/^[QAW]/.test(word) ? word : ` ${word}`));
for (let weight = 250; ; weight *= 2) {
  const weighted = new Map(counts);
  for (const word of needed) weighted.set(word, (weighted.get(word) ?? 0) + weight);
  const merges = train(weighted, VOCABULARY - 256 - SPECIAL.length);
  const missing = needed.filter((word) => !isOneToken(word, merges));
  console.error(`weight ${weight}: ${missing.length} of ${needed.length} list words are more than one token`);
  if (missing.length > 0) continue;
  writeFileSync(out, `${JSON.stringify(tokenizerFile(merges))}\n`);
  break;
}
