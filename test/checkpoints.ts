import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { Dtype } from "../lib/checkpoint.ts";
import { fromFloat32 } from "../lib/float.ts";

export interface TinyOptions {
  /** Default: llama. qwen2 has q, k, v biases, qwen3 has QK-norm. */
  arch?: "llama" | "qwen2" | "qwen3";
  layers?: number;
  hidden?: number;
  heads?: number;
  kvHeads?: number;
  headDim?: number;
  intermediate?: number;
  vocab?: number;
  dtype?: Dtype;
  contextLength?: number;
  tied?: boolean;
  /** Standard deviation of the matrices; the default keeps activations about as large as they come. */
  scale?: number;
  seed?: number;
  /**
   * Write tokenizer.json: a token a byte, ids 0..255, then BOS 256 and EOS 257; vocab is then at least 258.
   */
  tokenizer?: boolean;
  /** More keys of config.json, in place of ours. */
  config?: Record<string, unknown>;
}

interface Tensor {
  name: string;
  shape: number[];
  dtype: Dtype;
  bytes: Uint8Array;
}

const TORCH = { f32: "float32", bf16: "bfloat16", f16: "float16" };
const CODES = { f32: "F32", bf16: "BF16", f16: "F16" };
const CLASSES = { llama: "LlamaForCausalLM", qwen2: "Qwen2ForCausalLM", qwen3: "Qwen3ForCausalLM" };

/** A random checkpoint of the same bits for the same options, as a Hugging Face folder. Returns `dir`. */
export function writeTinyCheckpoint(dir: string, options: TinyOptions = {}): string {
  const { arch = "llama", layers = 2, hidden = 32, heads = 4, kvHeads = 2, headDim = 16 } = options;
  const { intermediate = 48, dtype = "f32", contextLength = 4096, tied = true, seed = 1 } = options;
  const vocab = Math.max(options.vocab ?? 96, options.tokenizer ? 258 : 1);
  const normal = gaussian(seed);
  const tensors: Tensor[] = [];
  const add = (name: string, shape: number[], mean: number, std: number): void => {
    const length = shape.reduce((product, n) => product * n, 1);
    const values = Float32Array.from({ length }, () => mean + std * normal());
    tensors.push({ name, shape, dtype, bytes: fromFloat32(values, dtype) });
  };
  const matrix = (name: string, rows: number, columns: number): void =>
    add(`${name}.weight`, [rows, columns], 0, options.scale ?? 1.2 / Math.sqrt(columns));
  const norm = (name: string, size: number): void => add(`${name}.weight`, [size], 1, 0.2);

  add("model.embed_tokens.weight", [vocab, hidden], 0, tied ? 0.5 : 1);
  for (let layer = 0; layer < layers; layer++) {
    const prefix = `model.layers.${layer}`;
    norm(`${prefix}.input_layernorm`, hidden);
    for (const [kind, n] of [
      ["q", heads],
      ["k", kvHeads],
      ["v", kvHeads],
    ] as const) {
      matrix(`${prefix}.self_attn.${kind}_proj`, n * headDim, hidden);
      if (arch === "qwen2") add(`${prefix}.self_attn.${kind}_proj.bias`, [n * headDim], 0, 0.3);
      if (arch === "qwen3" && kind !== "v") norm(`${prefix}.self_attn.${kind}_norm`, headDim);
    }
    matrix(`${prefix}.self_attn.o_proj`, hidden, heads * headDim);
    norm(`${prefix}.post_attention_layernorm`, hidden);
    matrix(`${prefix}.mlp.gate_proj`, intermediate, hidden);
    matrix(`${prefix}.mlp.up_proj`, intermediate, hidden);
    matrix(`${prefix}.mlp.down_proj`, hidden, intermediate);
  }
  norm("model.norm", hidden);
  if (!tied) matrix("lm_head", vocab, hidden);

  mkdirSync(dir, { recursive: true });
  writeSafetensors(join(dir, "model.safetensors"), tensors);
  writeJson(join(dir, "config.json"), {
    architectures: [CLASSES[arch]],
    model_type: arch,
    hidden_size: hidden,
    intermediate_size: intermediate,
    num_hidden_layers: layers,
    num_attention_heads: heads,
    num_key_value_heads: kvHeads,
    head_dim: headDim,
    vocab_size: vocab,
    rms_norm_eps: 1e-5,
    hidden_act: "silu",
    max_position_embeddings: contextLength,
    rope_parameters: { rope_type: "default", rope_theta: 10_000 },
    tie_word_embeddings: tied,
    dtype: TORCH[dtype],
    bos_token_id: options.tokenizer ? 256 : 1,
    eos_token_id: options.tokenizer ? 257 : 2,
    ...options.config,
  });
  if (options.tokenizer) writeByteTokenizer(dir);
  return dir;
}

export function writeJson(path: string, value: unknown): void {
  writeFileSync(path, `${JSON.stringify(value, null, 2)}\n`);
}

/** Tensors in the order given, without holes; the header padded to 8 bytes, as others write it. */
export function writeSafetensors(path: string, tensors: readonly Tensor[]): void {
  const header: Record<string, unknown> = { __metadata__: { format: "pt" } };
  let end = 0;
  for (const { name, shape, dtype, bytes } of tensors) {
    header[name] = { dtype: CODES[dtype], shape, data_offsets: [end, end + bytes.byteLength] };
    end += bytes.byteLength;
  }
  const json = JSON.stringify(header);
  const text = new TextEncoder().encode(json.padEnd(Math.ceil(json.length / 8) * 8));
  const length = new Uint8Array(8);
  new DataView(length.buffer).setBigUint64(0, BigInt(text.byteLength), true);
  writeFileSync(path, Buffer.concat([length, text, ...tensors.map((tensor) => tensor.bytes)]));
}

/** A byte-level tokenizer without merges: token id = byte value. Its post-processor puts BOS in front. */
export function writeByteTokenizer(dir: string): void {
  const vocab = Object.fromEntries(byteCharacters().map((character, byte) => [character, byte]));
  const special = (id: number, content: string): object => ({
    ...{ id, content, single_word: false, lstrip: false, rstrip: false, normalized: false, special: true },
  });
  const piece = (kind: string, id: string): object => ({ [kind]: { id, type_id: 0 } });
  const byteLevel = { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: true };
  writeJson(join(dir, "tokenizer.json"), {
    version: "1.0",
    truncation: null,
    padding: null,
    added_tokens: [special(256, "<|begin|>"), special(257, "<|end|>")],
    normalizer: null,
    pre_tokenizer: byteLevel,
    post_processor: {
      type: "TemplateProcessing",
      single: [piece("SpecialToken", "<|begin|>"), piece("Sequence", "A")],
      pair: [piece("SpecialToken", "<|begin|>"), piece("Sequence", "A"), piece("Sequence", "B")],
      special_tokens: { "<|begin|>": { id: "<|begin|>", ids: [256], tokens: ["<|begin|>"] } },
    },
    decoder: byteLevel,
    model: { type: "BPE", dropout: null, unk_token: null, vocab, merges: [] },
  });
  writeJson(join(dir, "tokenizer_config.json"), {
    bos_token: "<|begin|>",
    eos_token: "<|end|>",
    tokenizer_class: "PreTrainedTokenizerFast",
    clean_up_tokenization_spaces: false,
  });
}

/** GPT-2's printable stand-in of each byte: printable Latin-1 is itself, the rest is U+0100 on, in order. */
function byteCharacters(): string[] {
  let next = 0x100;
  return Array.from({ length: 256 }, (_, byte) => {
    const printable = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad);
    return String.fromCodePoint(printable ? byte : next++);
  });
}

/** Standard normal numbers, by xorshift32 and Box-Muller. */
function gaussian(seed: number): () => number {
  let state = Math.imul(seed, 0x9e3779b9) | 1;
  const uniform = (): number => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return ((state >>> 0) + 0.5) / 2 ** 32;
  };
  for (let i = 0; i < 8; i++) uniform(); // small seeds start with few bits
  return () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
}
