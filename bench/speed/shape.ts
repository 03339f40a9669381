// What the speed table is measured at: a model's shape, a budget and the contexts; and the bytes that a step cannot do without.

import { type ModelConfig, parseConfig } from "../../lib/checkpoint.ts";
import { dtypeBytes } from "../../lib/float.ts";
import type { Geometry } from "../../lib/geometry.ts";
import type { Plan } from "../../lib/plan.ts";

export interface Shape {
  readonly name: string;
  readonly config: ModelConfig;
  readonly pageSize: number;
  readonly budget: number;
  readonly sink: number;
  readonly window: number;
  /** Tokens, each four times the one before; `base` is where most rows are measured. */
  readonly contexts: {
    readonly short: number;
    readonly base: number;
    readonly long: number;
    readonly longest: number;
  };
  /** Bytes of pool that are added while a sequence decodes. */
  readonly grownBytes: number;
  /** Steps of a measurement, and those that come first and are dropped. */
  readonly steps: number;
  readonly warmups: number;
}

function llama(sizes: Record<string, number>): ModelConfig {
  const config = {
    architectures: ["LlamaForCausalLM"],
    hidden_act: "silu",
    rms_norm_eps: 1e-5,
    torch_dtype: "bfloat16",
    rope_theta: 500_000,
    max_position_embeddings: 2 ** 20, // beyond the trained 128K: the weights mean nothing anyway
    ...sizes,
  };
  return parseConfig(config, undefined, "the shape of a bench");
}

/** Llama-3.1-8B, bf16, at the default budget. */
const llama8b: Shape = {
  name: "llama-3.1-8b",
  config: llama({
    ...{ hidden_size: 4096, intermediate_size: 14_336, num_hidden_layers: 32, vocab_size: 128_256 },
    ...{ num_attention_heads: 32, num_key_value_heads: 8, head_dim: 128 },
  }),
  ...{ pageSize: 32, budget: 2048, sink: 512, window: 512 },
  contexts: { short: 8192, base: 32_768, long: 131_072, longest: 524_288 },
  grownBytes: 8 * 2 ** 30,
  ...{ steps: 200, warmups: 16 },
};

/** The same bench in seconds on the twin: to see that it runs, not to learn anything. */
const tiny: Shape = {
  name: "tiny",
  config: llama({
    ...{ hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, vocab_size: 256 },
    ...{ num_attention_heads: 4, num_key_value_heads: 2, head_dim: 16 },
  }),
  ...{ pageSize: 16, budget: 256, sink: 64, window: 64 },
  contexts: { short: 512, base: 1024, long: 2048, longest: 4096 },
  grownBytes: 2 ** 28,
  ...{ steps: 24, warmups: 3 },
};

export const shapes: Readonly<Record<string, Shape>> = { "llama-3.1-8b": llama8b, tiny };

/** Pages of `tokens` tokens. */
export const pagesOf = (shape: Shape, tokens: number): number => Math.ceil(tokens / shape.pageSize);

/** Tokens that a sequence may be fed in all measurements of one engine, in whole pages. */
export const fedTokens = (shape: Shape): number =>
  pagesOf(shape, 16 * (shape.steps + shape.warmups)) * shape.pageSize;

/** Selected pages a head. */
export const selectedPages = (s: Shape): number => (s.budget - s.sink - s.window) / s.pageSize;

/** Every matrix that a step multiplies by, once. */
export function weightBytes(c: ModelConfig): number {
  const qkv = (c.heads + 2 * c.kvHeads) * c.headDim * c.hidden;
  const o = c.heads * c.headDim * c.hidden;
  const mlp = 3 * c.intermediate * c.hidden;
  return dtypeBytes(c.dtype) * (c.layers * (qkv + o + mlp) + c.vocab * c.hidden);
}

/** K and V that a sequence of `length` tokens attends to, and the digests it scores, each byte once. */
export function sequenceBytes(g: Geometry, plan: Plan, length: number): number {
  if (plan.attendAll) return (length / g.pageSize) * g.blockBytes;
  const candidates = Math.floor(length / g.pageSize) - plan.windowPages - plan.sinkPages;
  const attended = plan.sinkPages + plan.windowPages + Math.min(plan.k, candidates);
  return attended * g.blockBytes + (candidates > plan.k ? candidates * g.digestBytes : 0);
}

/** Floating-point operations of a prompt of `tokens` tokens: every matrix but the last for each, and causal attention. */
export function promptFlops(c: ModelConfig, tokens: number): number {
  const matrices = weightBytes(c) / dtypeBytes(c.dtype) - c.vocab * c.hidden;
  return 2 * matrices * tokens + 2 * c.layers * c.heads * c.headDim * tokens * tokens;
}
