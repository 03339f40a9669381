// config.json: both spellings, what is read and what is refused.
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import {
  assertAlmostEquals,
  assertEquals,
  assertNotEquals,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import { parseConfig, readConfig } from "../lib/checkpoint.ts";
import { type ErrorCode, FreeKVError } from "../lib/errors.ts";
import { openCheckpoint } from "../lib/weights.ts";
import { type TinyOptions, writeTinyCheckpoint } from "./checkpoints.ts";

const scratch = mkdtempSync(join(tmpdir(), "freekv-checkpoint-"));
after(() => rmSync(scratch, { recursive: true }));
let made = 0;
const tiny = (options: TinyOptions = {}): string =>
  writeTinyCheckpoint(join(scratch, `${made++}`), { layers: 1, ...options });

const base = {
  architectures: ["LlamaForCausalLM"],
  hidden_size: 64,
  intermediate_size: 96,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  vocab_size: 100,
  max_position_embeddings: 2048,
};
const parse = (more: object = {}, generation?: object): ReturnType<typeof parseConfig> =>
  parseConfig({ ...base, ...more }, generation, "config.json");

function refused(code: ErrorCode, text: string, run: () => unknown): void {
  const error = assertThrows(run, FreeKVError);
  assertEquals(error.code, code, error.message);
  assertStringIncludes(error.message, text);
}

test("both spellings of a config mean the same", () => {
  const llama3 = {
    factor: 8,
    low_freq_factor: 1,
    high_freq_factor: 4,
    original_max_position_embeddings: 512,
  };
  const since5 = parse({
    dtype: "bfloat16",
    rope_parameters: { rope_type: "llama3", rope_theta: 5e5, ...llama3 },
  });
  const older = { torch_dtype: "bfloat16", rope_theta: 5e5 };
  assertEquals(parse({ ...older, rope_scaling: { rope_type: "llama3", ...llama3 } }), since5);
  assertEquals(parse({ ...older, rope_scaling: { type: "llama3", ...llama3 } }), since5);
  assertEquals(since5.dtype, "bf16");
  assertNotEquals(since5.rope, parse({ rope_theta: 5e5 }).rope, "the scaling must matter");
});

test("head_dim is read where given, else derived", () => {
  assertEquals(parse().headDim, 16);
  assertEquals(parse({ head_dim: 32 }).headDim, 32);
  assertEquals(parse({ head_dim: 32 }).rope.invFreq.length, 16);
  assertEquals(parse({ head_dim: null }).headDim, 16);
});

test("an architecture has its biases and norms", () => {
  const traits = (more: object): boolean[] => {
    const config = parse(more);
    return [config.qkvBias, config.oBias, config.mlpBias, config.qkNorm];
  };
  assertEquals(traits({}), [false, false, false, false]);
  assertEquals(traits({ attention_bias: true, mlp_bias: true }), [true, true, true, false]);
  assertEquals(traits({ architectures: ["Qwen2ForCausalLM"] }), [true, false, false, false]);
  assertEquals(traits({ architectures: ["Qwen3ForCausalLM"] }), [false, false, false, true]);
  assertEquals(traits({ architectures: ["MistralForCausalLM"], sliding_window: null }), [
    ...[false, false, false, false],
  ]);
});

test("generation_config.json has the last word on BOS and EOS", () => {
  assertEquals(parse({ eos_token_id: 7 }).eos, [7]);
  assertEquals(parse({ eos_token_id: 7, bos_token_id: 1 }, { eos_token_id: [7, 9] }).eos, [7, 9]);
  assertEquals(parse({ eos_token_id: 7, bos_token_id: 1 }, { eos_token_id: [7, 9] }).bos, 1);
  assertEquals(parse().eos, []);
  assertEquals(parse().bos, null);
});

test("rope: linear divides, llama3 keeps the fast and slows the slow, yarn lengthens the context", () => {
  const plain = parse().rope;
  assertEquals(plain.invFreq[0], 1);
  assertAlmostEquals(plain.invFreq[4] ?? NaN, 10_000 ** -0.5, 1e-15);
  const linear = parse({ rope_scaling: { type: "linear", factor: 4 } }).rope;
  assertEquals(
    [...linear.invFreq],
    [...plain.invFreq].map((f) => f / 4),
  );

  const keys = { factor: 8, low_freq_factor: 1, high_freq_factor: 4, original_max_position_embeddings: 256 };
  const llama3 = parse({ rope_scaling: { rope_type: "llama3", ...keys } }).rope;
  assertEquals(llama3.invFreq[0], 1);
  assertAlmostEquals(llama3.invFreq[7] ?? NaN, (plain.invFreq[7] ?? NaN) / 8, 1e-15);

  const yarn = { type: "yarn", factor: 4, original_max_position_embeddings: 2048 };
  const long = parse({ rope_scaling: yarn });
  assertEquals(long.contextLength, 8192);
  assertAlmostEquals(long.rope.scale, 0.1 * Math.log(4) + 1, 1e-15);
  assertEquals(parse({ rope_scaling: { ...yarn, attention_factor: 1.5 } }).rope.scale, 1.5);
  assertEquals(parse({ rope_scaling: yarn, max_position_embeddings: 8192 }).contextLength, 8192);
});

test("what the engine does not compute is refused by name", () => {
  const cases: [object, string][] = [
    [{ architectures: ["GPT2LMHeadModel"] }, "GPT2LMHeadModel"],
    [
      { rope_scaling: { rope_type: "longrope", factor: 2 } },
      '"longrope" is not supported; supported: default',
    ],
    [{ rope_parameters: { rope_type: "dynamic", rope_theta: 1e4, factor: 2 } }, '"dynamic"'],
    [{ partial_rotary_factor: 0.5 }, "partial_rotary_factor 0.5"],
    [{ hidden_act: "gelu" }, "gelu"],
    [{ architectures: ["MistralForCausalLM"], sliding_window: 1024 }, "sliding_window 1024"],
    [
      {
        architectures: ["Qwen2ForCausalLM"],
        sliding_window: 64,
        use_sliding_window: true,
        max_window_layers: 1,
      },
      "64",
    ],
    [{ layer_types: ["full_attention", "linear_attention"] }, "linear_attention"],
    [{ quantization_config: { quant_method: "gptq" } }, "quantized"],
    [{ head_dim: 20 }, "head_dim 20"],
    [{ dtype: "float8_e4m3fn" }, "float8_e4m3fn"],
  ];
  for (const [more, text] of cases) refused("UNSUPPORTED_MODEL", text, () => parse(more));
});

test("a window as long as the context, or one that is switched off, is no window", () => {
  parse({ architectures: ["MistralForCausalLM"], sliding_window: 4096 });
  parse({ architectures: ["Qwen2ForCausalLM"], sliding_window: 64, use_sliding_window: false });
  parse({ architectures: ["Qwen3ForCausalLM"], sliding_window: null, layer_types: ["full_attention"] });
});

test("a config that contradicts itself names the key", () => {
  const cases: [object, string][] = [
    [{ hidden_size: "64" }, "hidden_size"],
    [{ num_hidden_layers: 0 }, "num_hidden_layers"],
    [{ num_key_value_heads: 3 }, "num_key_value_heads (3)"],
    [{ num_attention_heads: 6 }, "num_attention_heads"],
    [{ rope_scaling: { rope_type: "linear" } }, "factor"],
    [{ rope_scaling: { rope_type: "llama3", factor: 8 } }, "low_freq_factor"],
    [{ rms_norm_eps: -1 }, "rms_norm_eps must be above 0, not -1"],
    [{ max_position_embeddings: 1e15 }, "max_position_embeddings must be at most 2147483647"],
    [{ head_dim: 1e9 }, "head_dim must be at most 4096"],
    [{ eos_token_id: "end" }, 'eos_token_id must be a number or a list, not "end"'],
    [{ architectures: [] }, "architectures must be of length 1 or more, not an empty list"],
    [{ vocab_size: null }, "vocab_size must be a number, not null; mend the file"],
    [{ vocab_size: undefined }, "vocab_size is missing; it must be a number"],
  ];
  for (const [more, text] of cases) refused("BAD_CHECKPOINT", text, () => parse(more));
});

test("a folder that is no checkpoint is refused", () => {
  refused("BAD_CHECKPOINT", "no config.json", () => readConfig(join(scratch, "nowhere")));
  const dir = tiny();
  writeFileSync(join(dir, "config.json"), '{"architectures": [');
  refused("BAD_CHECKPOINT", "not JSON", () => openCheckpoint(dir));
});
