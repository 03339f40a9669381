import { z } from "zod";

/** Rotary position embedding: angle of pair i = position · invFreq[i]; cos and sin are multiplied by `scale`. */
export interface Rope {
  /** [headDim / 2], radians a token, float64. */
  readonly invFreq: Float64Array;
  /** transformers' `attention_scaling`; 1 but for YaRN. */
  readonly scale: number;
}

interface Llama3 {
  rope_type: "llama3";
  factor: number;
  low_freq_factor: number;
  high_freq_factor: number;
  original_max_position_embeddings: number;
}
interface Yarn {
  rope_type: "yarn";
  /** Absent: max_position_embeddings / original_max_position_embeddings. */
  factor?: number | null | undefined;
  original_max_position_embeddings: number;
  attention_factor?: number | null | undefined;
  beta_fast?: number | null | undefined;
  beta_slow?: number | null | undefined;
  mscale?: number | null | undefined;
  mscale_all_dim?: number | null | undefined;
  truncate: boolean;
}
/** The scalings that we compute, each with the keys that transformers reads for it. */
export type RopeScaling = { rope_type: "default" } | { rope_type: "linear"; factor: number } | Llama3 | Yarn;

const factor = z.number().min(1);
const positive = z.number().positive();
const weight = z.number().nonnegative();

export const ropeScaling: z.ZodType<RopeScaling> = z.discriminatedUnion("rope_type", [
  z.object({ rope_type: z.literal("default") }),
  z.object({ rope_type: z.literal("linear"), factor }),
  z
    .object({
      rope_type: z.literal("llama3"),
      factor,
      low_freq_factor: positive,
      high_freq_factor: positive,
      original_max_position_embeddings: positive,
    })
    .refine((rope) => rope.high_freq_factor > rope.low_freq_factor, {
      error: "must be above low_freq_factor",
      path: ["high_freq_factor"],
    }),
  z.object({
    rope_type: z.literal("yarn"),
    factor: factor.nullish(),
    original_max_position_embeddings: positive,
    attention_factor: positive.nullish(),
    beta_fast: positive.nullish(),
    beta_slow: positive.nullish(),
    mscale: weight.nullish(),
    mscale_all_dim: weight.nullish(),
    truncate: z.boolean().default(true),
  }),
]);

/**
 * The frequencies and scale of a model, as transformers' modeling_rope_utils has them, in float64.
 * `maxPositions` is config.json's max_position_embeddings.
 */
export function computeRope(
  scaling: RopeScaling,
  theta: number,
  headDim: number,
  maxPositions: number,
): Rope {
  const plain = Float64Array.from({ length: headDim / 2 }, (_, i) => theta ** ((-2 * i) / headDim));
  switch (scaling.rope_type) {
    case "default":
      return { invFreq: plain, scale: 1 };
    case "linear":
      return { invFreq: plain.map((f) => f / scaling.factor), scale: 1 };
    case "llama3":
      return { invFreq: plain.map((f) => llama3(f, scaling)), scale: 1 };
    case "yarn":
      return yarn(plain, scaling, theta, headDim, maxPositions);
  }
}

/** How often YaRN lengthens the context that the model was trained with. */
export function yarnFactor(scaling: Yarn, maxPositions: number): number {
  return scaling.factor ?? maxPositions / scaling.original_max_position_embeddings;
}

/** Llama 3.1: what turns often stays, what turns rarely is divided by the factor, a blend between the two. */
function llama3(frequency: number, scaling: Llama3): number {
  const { factor, low_freq_factor: low, high_freq_factor: high } = scaling;
  const turns = (scaling.original_max_position_embeddings * frequency) / (2 * Math.PI);
  if (turns > high) return frequency;
  if (turns < low) return frequency / factor;
  const smooth = (turns - low) / (high - low);
  return ((1 - smooth) * frequency) / factor + smooth * frequency;
}

/** YaRN (arXiv 2309.00071): a ramp over the pairs, from those that stay to those divided by the factor. */
function yarn(
  plain: Float64Array,
  scaling: Yarn,
  theta: number,
  headDim: number,
  maxPositions: number,
): Rope {
  const factor = yarnFactor(scaling, maxPositions);
  const magnitude = (weight: number): number => (factor <= 1 ? 1 : 0.1 * weight * Math.log(factor) + 1);
  const { mscale, mscale_all_dim: mscaleAll } = scaling;
  const inferred = mscale && mscaleAll ? magnitude(mscale) / magnitude(mscaleAll) : magnitude(1);

  // The pair, as a fraction, that turns `turns` times within the original context.
  const pairOf = (turns: number): number =>
    (headDim * Math.log(scaling.original_max_position_embeddings / (turns * 2 * Math.PI))) /
    (2 * Math.log(theta));
  const fast = pairOf(scaling.beta_fast || 32);
  const slow = pairOf(scaling.beta_slow || 1);
  const low = Math.max(scaling.truncate ? Math.floor(fast) : fast, 0);
  const last = Math.min(scaling.truncate ? Math.ceil(slow) : slow, headDim - 1);
  const high = last === low ? low + 0.001 : last;

  const invFreq = plain.map((frequency, i) => {
    const ramp = Math.min(Math.max((i - low) / (high - low), 0), 1);
    return (frequency / factor) * ramp + frequency * (1 - ramp);
  });
  return { invFreq, scale: scaling.attention_factor ?? inferred };
}
