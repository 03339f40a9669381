import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import { assert, assertEquals, assertInstanceOf, assertRejects, assertStringIncludes } from "@std/assert";
import { FreeKVError } from "../lib/errors.ts";
import { loadTokenizer, type Tokenizer } from "../lib/tokenizer.ts";
import { writeByteTokenizer, writeJson } from "./checkpoints.ts";

const scratch = mkdtempSync(join(tmpdir(), "freekv-tokenizer-"));
after(() => rmSync(scratch, { recursive: true }));
let made = 0;

/** A folder with the byte-level tokenizer, edited. */
function folder(
  edit: (file: Record<string, unknown>, config: Record<string, unknown>) => void = () => {},
): string {
  const dir = join(scratch, `${made++}`);
  mkdirSync(dir);
  writeByteTokenizer(dir);
  const read = (name: string): Record<string, unknown> => JSON.parse(readFileSync(join(dir, name), "utf8"));
  const [file, config] = [read("tokenizer.json"), read("tokenizer_config.json")];
  edit(file, config);
  writeJson(join(dir, "tokenizer.json"), file);
  writeJson(join(dir, "tokenizer_config.json"), config);
  return dir;
}

/** In the manner of Llama 2: words with ▁ for the space before them, bytes for what no word spells. */
function metaspaceFolder(): string {
  const words = [
    "<unk>",
    "<s>",
    "</s>",
    "▁",
    "▁he",
    "llo",
    "▁hello",
    "h",
    "e",
    "l",
    "o",
    "w",
    "r",
    "d",
    "▁w",
  ];
  const vocab = Object.fromEntries(words.map((word, id) => [word, id]));
  for (let byte = 0; byte < 256; byte++) {
    vocab[`<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`] = 100 + byte;
  }
  return folder((file, config) => {
    const special = { single_word: false, lstrip: false, rstrip: false, normalized: false, special: true };
    file.added_tokens = [1, 2].map((id) => ({ id, content: words[id], ...special }));
    file.normalizer = {
      type: "Sequence",
      normalizers: [
        { type: "Prepend", prepend: "▁" },
        { type: "Replace", pattern: { String: " " }, content: "▁" },
      ],
    };
    file.pre_tokenizer = null;
    file.post_processor = null;
    file.decoder = {
      type: "Sequence",
      decoders: [
        { type: "Replace", pattern: { String: "▁" }, content: " " },
        { type: "ByteFallback" },
        { type: "Fuse" },
        { type: "Strip", content: " ", start: 1, stop: 0 },
      ],
    };
    file.model = {
      ...{ type: "BPE", unk_token: "<unk>", byte_fallback: true, fuse_unk: true, vocab },
      merges: ["h e", "▁ he", "l l", "ll o", "▁he llo", "▁ w"].map((merge) => merge),
    };
    for (const merged of ["he", "ll"]) vocab[merged] = words.push(merged) - 1;
    Object.assign(config, { bos_token: "<s>", eos_token: "</s>", add_bos_token: true });
  });
}

function streamed(tokenizer: Tokenizer, ids: ArrayLike<number>): string[] {
  const stream = tokenizer.stream();
  return [...Array.from(ids, (id) => stream.push(id)), stream.end()];
}

const TEXTS = [
  "plain words, and more.",
  "  spaces  kept , also before punctuation . and it 's",
  "Grüße — naïve “quotes” 🙂👩‍👩‍👧 漢字 كتاب",
  "line\nbreaks\r\n\ttabs\u0000 and \ufeff a mark",
];

test("text survives encode and decode", async () => {
  const tokenizer = await loadTokenizer(folder());
  for (const text of TEXTS) {
    const ids = tokenizer.encode(text);
    assertInstanceOf(ids, Int32Array);
    assertEquals(ids.length, new TextEncoder().encode(text).length + 1);
    assertEquals(tokenizer.decode(ids), text);
  }
});

test("a stream gives nothing inside a character and the whole of it at its last byte", async () => {
  const tokenizer = await loadTokenizer(folder());
  const texts = streamed(tokenizer, tokenizer.encode("a🙂é", { addBos: false }));
  assertEquals(texts, ["a", "", "", "", "🙂", "", "é", ""]);
});

test("streamed texts join to the whole, whatever the bytes", async () => {
  const tokenizer = await loadTokenizer(folder());
  let state = 7;
  for (let round = 0; round < 40; round++) {
    const ids = Array.from({ length: 60 }, () => {
      state = (Math.imul(state, 1103515245) + 12345) >>> 0;
      return (state >>> 12) % 260; // special tokens and ids beyond the vocabulary, too
    });
    const bytes = Uint8Array.from(ids.filter((id) => id < 256));
    const expected = new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes);
    assertStringIncludes(expected, "\ufffd");
    assertEquals(tokenizer.decode(ids), expected);
    assertEquals(streamed(tokenizer, ids).join(""), expected);
  }
});

test("a stream that ends inside a character says so, and starts anew", async () => {
  const tokenizer = await loadTokenizer(folder());
  const stream = tokenizer.stream();
  assertEquals([stream.push(0xc3), stream.end(), stream.end()], ["", "\ufffd", ""]);
  assertEquals([stream.push(0x41), stream.end()], ["A", ""]);
});

test("endless bytes of no character are let go of", async () => {
  const tokenizer = await loadTokenizer(folder());
  const texts = streamed(tokenizer, new Array(1000).fill(0x80));
  assertEquals(texts.join(""), "\ufffd".repeat(1000));
  assert(texts.filter((text) => text !== "").length > 10, "nothing was shown before the end");
});

test("BOS is added once, as the files say", async () => {
  const post = await loadTokenizer(folder());
  assertEquals([...post.encode("A")], [256, 65]);
  assertEquals([...post.encode("<|begin|>A")], [256, 65]);
  assertEquals([...post.encode("")], [256]);
  assertEquals([...post.encode("A", { addBos: false })], [65]);

  const never = await loadTokenizer(folder((_, config) => Object.assign(config, { add_bos_token: false })));
  assertEquals([...never.encode("A")], [65]);
  const plain = (file: Record<string, unknown>): unknown => Object.assign(file, { post_processor: null });
  const none = await loadTokenizer(folder(plain));
  assertEquals([...none.encode("A")], [65]);
  const byConfig = await loadTokenizer(
    folder((file, config) => {
      plain(file);
      Object.assign(config, { add_bos_token: true, bos_token: { content: "<|begin|>" } });
    }),
  );
  assertEquals([...byConfig.encode("A")], [256, 65]);
  assertEquals([...byConfig.encode("<|begin|>A")], [256, 65]);
});

test("an EOS that the post-processor would add is not part of a prompt", async () => {
  const dir = folder((file) => {
    const processor = file.post_processor as { single: object[]; special_tokens: object };
    processor.single.push({ SpecialToken: { id: "<|end|>", type_id: 0 } });
    Object.assign(processor.special_tokens, {
      "<|end|>": { id: "<|end|>", ids: [257], tokens: ["<|end|>"] },
    });
  });
  assertEquals([...(await loadTokenizer(dir)).encode("A")], [256, 65]);
});

test("a sentencepiece-like vocabulary streams with its spaces", async () => {
  const tokenizer = await loadTokenizer(metaspaceFolder());
  const ids = tokenizer.encode("hello hello wé");
  assertEquals(ids[0], 1);
  assert(ids.length < 10, `the merges were not used: ${ids}`);
  assertEquals(tokenizer.decode(ids), "hello hello wé");
  assertEquals(streamed(tokenizer, ids), ["", "hello", " hello", " w", "", "é", ""]);
});

test("without a tokenizer.json the folder is refused, and a broken one too", async () => {
  const dir = folder();
  rmSync(join(dir, "tokenizer.json"));
  const missing = await assertRejects(() => loadTokenizer(dir), FreeKVError);
  assertEquals(missing.code, "BAD_CHECKPOINT");
  assertStringIncludes(missing.message, "has no tokenizer.json");
  for (const text of ["{", '{"model": 3}', '{"model": {"type": "Mystery"}}']) {
    writeFileSync(join(dir, "tokenizer.json"), text);
    const broken = await assertRejects(() => loadTokenizer(dir), FreeKVError);
    assertEquals(broken.code, "BAD_CHECKPOINT", text);
  }
});
