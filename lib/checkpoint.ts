import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { z } from "zod";
import { FreeKVError } from "./errors.ts";
import { check, readJson, readJsonRequired } from "./json.ts";
import { computeRope, type Rope, type RopeScaling, ropeScaling, yarnFactor } from "./rope.ts";

export type Dtype = "bf16" | "f16" | "f32";

/** A decoder of the Llama family, as its config.json describes it. */
export interface ModelConfig {
  /** LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM. */
  readonly architecture: string;
  readonly layers: number;
  readonly hidden: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly intermediate: number;
  readonly vocab: number;
  /** Of every RMSNorm. */
  readonly eps: number;
  /** Most tokens of a sequence: max_position_embeddings, or what YaRN extends it to. */
  readonly contextLength: number;
  /** The output matrix is the embedding table. */
  readonly tied: boolean;
  readonly qkvBias: boolean;
  readonly oBias: boolean;
  readonly mlpBias: boolean;
  readonly qkNorm: boolean;
  /** Of the weights. */
  readonly dtype: Dtype;
  readonly bos: number | null;
  /** Tokens that end a generation; may be empty. */
  readonly eos: readonly number[];
  readonly rope: Rope;
}

const ARCHITECTURES = ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"];
const ROPE_TYPES = ["default", "linear", "llama3", "yarn"];

/** The native code counts with int32. */
const MOST = 2 ** 31 - 1;
/** Far beyond any model's; frequencies are made of it before a tensor is looked at. */
const MOST_HEAD_DIM = 4096;

const size = z.int().min(1).max(MOST);
const tokenId = z.int().min(0).max(MOST);
const ropeKeys = z.looseObject({
  rope_type: z.string().nullish(),
  type: z.string().nullish(), // the name of rope_type before transformers 4.43
  rope_theta: z.number().positive().nullish(),
  partial_rotary_factor: z.number().nullish(),
});
const ropeParameters = ropeKeys.extend({ full_attention: ropeKeys.nullish() });

/** What we read of config.json, as transformers 5 spells it and as it did before; other keys are ignored. */
const configFile = z.object({
  architectures: z.array(z.string()).min(1),
  vocab_size: size,
  hidden_size: size,
  intermediate_size: size,
  num_hidden_layers: size,
  num_attention_heads: size,
  num_key_value_heads: size.nullish(),
  head_dim: z.int().min(1).max(MOST_HEAD_DIM).nullish(),
  hidden_act: z.string().default("silu"),
  max_position_embeddings: size,
  original_max_position_embeddings: size.nullish(),
  rms_norm_eps: z.number().positive().default(1e-6),
  tie_word_embeddings: z.boolean().default(false),
  attention_bias: z.boolean().default(false),
  mlp_bias: z.boolean().default(false),
  rope_parameters: ropeParameters.nullish(),
  rope_scaling: ropeParameters.nullish(),
  rope_theta: z.number().positive().nullish(),
  partial_rotary_factor: z.number().nullish(),
  sliding_window: z.int().nonnegative().nullish(),
  use_sliding_window: z.boolean().nullish(),
  max_window_layers: z.int().nonnegative().nullish(),
  layer_types: z.array(z.string()).nullish(),
  quantization_config: z.unknown().optional(),
  dtype: z.string().nullish(),
  torch_dtype: z.string().nullish(),
  bos_token_id: tokenId.nullish(),
  eos_token_id: z.union([tokenId, z.array(tokenId)]).nullish(),
});
type ConfigFile = z.output<typeof configFile>;

const generationFile = z.object({
  bos_token_id: tokenId.nullish(),
  eos_token_id: z.union([tokenId, z.array(tokenId)]).nullish(),
});

/** The path of a checkpoint folder given as path or file: URL. */
export function folderPath(dir: string | URL): string {
  return typeof dir === "string" ? dir : fileURLToPath(dir);
}

/**
 * The model that a Hugging Face folder's config.json (and generation_config.json) describes. `dtype` is the
 * one stated there: openCheckpoint, which sees the weights, gives theirs.
 * Errors: BAD_CHECKPOINT for a missing or malformed file; UNSUPPORTED_MODEL for what we do not compute.
 */
export function readConfig(dir: string | URL): ModelConfig {
  const path = join(folderPath(dir), "config.json");
  const generation = readJson(join(folderPath(dir), "generation_config.json"), generationFile);
  return parseConfig(readJsonRequired(path, z.unknown()), generation, path);
}

/** The same from parsed JSON; `path` is named in errors. */
export function parseConfig(json: unknown, generation: unknown, path: string): ModelConfig {
  const architecture = architectureOf(json, path);
  const file = check(configFile, json, path);
  const generated = check(generationFile.optional(), generation, path);
  if (file.quantization_config !== undefined && file.quantization_config !== null) {
    throw unsupported(path, "quantized weights (quantization_config)", "weights in bf16, f16 or f32");
  }
  if (file.hidden_act !== "silu") throw unsupported(path, `hidden_act ${file.hidden_act}`, "silu");
  refuseSlidingWindow(file, architecture, path);

  const heads = file.num_attention_heads;
  const kvHeads = file.num_key_value_heads ?? heads;
  if (heads % kvHeads !== 0) {
    throw new FreeKVError(
      "BAD_CHECKPOINT",
      `${path}: num_attention_heads (${heads}) must be a multiple of num_key_value_heads (${kvHeads})`,
    );
  }
  const headDim = headDimOf(file, architecture, path);
  const scaling = scalingOf(file, path);
  const theta = ropeDict(file).rope_theta ?? file.rope_theta ?? 10_000;
  const eos = generated?.eos_token_id ?? file.eos_token_id ?? [];
  return {
    architecture,
    layers: file.num_hidden_layers,
    hidden: file.hidden_size,
    heads,
    kvHeads,
    headDim,
    intermediate: file.intermediate_size,
    vocab: file.vocab_size,
    eps: file.rms_norm_eps,
    contextLength: contextLengthOf(file, scaling, path),
    tied: file.tie_word_embeddings,
    qkvBias: architecture === "Qwen2ForCausalLM" || hasAttentionBias(file, architecture),
    oBias: hasAttentionBias(file, architecture),
    mlpBias: architecture === "LlamaForCausalLM" && file.mlp_bias,
    qkNorm: architecture === "Qwen3ForCausalLM",
    dtype: dtypeOf(file, path),
    bos: generated?.bos_token_id ?? file.bos_token_id ?? null,
    eos: typeof eos === "number" ? [eos] : eos,
    rope: computeRope(scaling, theta, headDim, file.max_position_embeddings),
  };
}

function unsupported(path: string, what: string, supported: string): FreeKVError {
  return new FreeKVError("UNSUPPORTED_MODEL", `${path}: ${what} is not supported; supported: ${supported}`, {
    detail: { path },
  });
}

/** Read by itself: a model of another kind is refused as such, not for keys that it names otherwise. */
function architectureOf(json: unknown, path: string): string {
  const { architectures } = check(configFile.pick({ architectures: true }), json, path);
  const known = architectures.find((each) => ARCHITECTURES.includes(each));
  if (known === undefined) {
    throw unsupported(path, `architecture ${architectures.join(", ")}`, ARCHITECTURES.join(", "));
  }
  return known;
}

/** Of q, k, v and o: Llama and Qwen3 have it where the config says so; Qwen2 has its own; Mistral has none. */
function hasAttentionBias(file: ConfigFile, architecture: string): boolean {
  return file.attention_bias && (architecture === "LlamaForCausalLM" || architecture === "Qwen3ForCausalLM");
}

function headDimOf(file: ConfigFile, architecture: string, path: string): number {
  // transformers' default for Qwen3 is a constant, whatever the other sizes are.
  const derived = architecture === "Qwen3ForCausalLM" ? 128 : file.hidden_size / file.num_attention_heads;
  const headDim = file.head_dim ?? derived;
  if (!Number.isInteger(headDim)) {
    throw new FreeKVError(
      "BAD_CHECKPOINT",
      `${path}: hidden_size (${file.hidden_size}) must be a multiple of num_attention_heads ` +
        `(${file.num_attention_heads}) where head_dim is not given`,
    );
  }
  if (headDim > MOST_HEAD_DIM) throw unsupported(path, `head_dim ${headDim}`, `at most ${MOST_HEAD_DIM}`);
  // Rows of the KV cache are read 16 bytes at a time: 8 values of the narrowest dtype.
  if (headDim % 8 !== 0) throw unsupported(path, `head_dim ${headDim}`, "multiples of 8");
  return headDim;
}

function ropeDict(file: ConfigFile): z.output<typeof ropeKeys> {
  const given = file.rope_scaling ?? file.rope_parameters ?? {};
  return given.full_attention ?? given;
}

function scalingOf(file: ConfigFile, path: string): RopeScaling {
  const given = ropeDict(file);
  const type = given.rope_type ?? given.type ?? "default";
  if (!ROPE_TYPES.includes(type)) throw unsupported(path, `rope type "${type}"`, ROPE_TYPES.join(", "));
  const partial = given.partial_rotary_factor ?? file.partial_rotary_factor ?? 1;
  if (partial !== 1) throw unsupported(path, `partial_rotary_factor ${partial}`, "1");
  const original =
    file.original_max_position_embeddings ??
    given.original_max_position_embeddings ??
    file.max_position_embeddings;
  return check(
    ropeScaling,
    { ...given, rope_type: type, original_max_position_embeddings: original },
    `${path}: rope parameters`,
  );
}

/** A config that turns YaRN on may or may not have raised max_position_embeddings; the larger is meant. */
function contextLengthOf(file: ConfigFile, scaling: RopeScaling, path: string): number {
  const given = file.max_position_embeddings;
  if (scaling.rope_type !== "yarn") return given;
  const long = Math.max(
    given,
    Math.round(yarnFactor(scaling, given) * scaling.original_max_position_embeddings),
  );
  if (long > MOST) throw unsupported(path, `a context of ${long} tokens`, `at most ${MOST}`);
  return long;
}

/** A window at least as long as the context hides nothing and is let pass. */
function refuseSlidingWindow(file: ConfigFile, architecture: string, path: string): void {
  const other = file.layer_types?.find((type) => type !== "full_attention" && type !== "sliding_attention");
  if (other !== undefined) throw unsupported(path, `layer type ${other}`, "full_attention");

  let window: number | null | undefined = null;
  if (architecture === "MistralForCausalLM") {
    window = file.sliding_window === undefined ? 4096 : file.sliding_window; // 4096: transformers' default
  } else if (file.layer_types?.includes("sliding_attention")) {
    window = file.sliding_window ?? 0;
  } else if (file.use_sliding_window && (file.max_window_layers ?? 28) < file.num_hidden_layers) {
    window = file.sliding_window;
  }
  if (window === null || window === undefined || window >= file.max_position_embeddings) return;
  throw unsupported(
    path,
    `sliding-window attention (sliding_window ${window})`,
    "full attention in every layer",
  );
}

function dtypeOf(file: ConfigFile, path: string): Dtype {
  const name = (file.dtype ?? file.torch_dtype ?? "float32").replace(/^torch\./, "");
  if (name === "bfloat16") return "bf16";
  if (name === "float16") return "f16";
  if (name === "float32") return "f32";
  throw unsupported(path, `dtype ${name}`, "bfloat16, float16, float32");
}
