import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

/** A checkpoint and what transformers computes for it in float64; scripts/golden/make.py made them. */
export interface Golden {
  name: string;
  /** The checkpoint folder. */
  dir: string;
  tokens: number[];
  vocab: number;
  /** [tokens.length][vocab], row-major, float64 rounded to float32: log P(next token | tokens 0..row). */
  logprobs: Float32Array;
  rope: { invFreq: number[]; scale: number };
}

const root = fileURLToPath(new URL("fixtures/golden", import.meta.url));

/** All of them, in order of name. */
export function goldens(): Golden[] {
  const names = readdirSync(root).filter((name) => existsSync(join(root, name, "golden.json")));
  return names.sort().map((name) => {
    const dir = join(root, name);
    const { tokens, vocab, rope } = JSON.parse(readFileSync(join(dir, "golden.json"), "utf8"));
    const bytes = readFileSync(join(dir, "logprobs.bin"));
    const logprobs = new Float32Array(
      bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength),
    );
    if (logprobs.length !== tokens.length * vocab) throw new Error(`${dir}: logprobs.bin has another size`);
    return { name, dir, tokens, vocab, logprobs, rope };
  });
}
