// Weights: order, layout, conversion, and what is refused before anything is read.
import { mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import { assert, assertEquals, assertLess, assertStringIncludes, assertThrows } from "@std/assert";
import { type ErrorCode, FreeKVError } from "../lib/errors.ts";
import { convert, fromFloat32, toFloat32 } from "../lib/float.ts";
import { openCheckpoint, type WeightTensor } from "../lib/weights.ts";
import { type TinyOptions, writeJson, writeSafetensors, writeTinyCheckpoint } from "./checkpoints.ts";
import { referenceLogprobs } from "./reference/model.ts";

const scratch = mkdtempSync(join(tmpdir(), "freekv-checkpoint-"));
after(() => rmSync(scratch, { recursive: true }));
let made = 0;
const tiny = (options: TinyOptions = {}): string =>
  writeTinyCheckpoint(join(scratch, `${made++}`), { layers: 1, ...options });

function refused(code: ErrorCode, text: string, run: () => unknown): void {
  const error = assertThrows(run, FreeKVError);
  assertEquals(error.code, code, error.message);
  assertStringIncludes(error.message, text);
}

const whole = (tensor: WeightTensor): Float32Array => {
  const bytes = new Uint8Array(tensor.bytes);
  tensor.read(bytes);
  return toFloat32(bytes, tensor.dtype);
};

test("weights come stacked and interleaved in the declared order", () => {
  using checkpoint = openCheckpoint(
    tiny({ arch: "qwen2", tied: false, hidden: 8, intermediate: 5, headDim: 8 }),
  );
  const names = checkpoint.tensors.map((tensor) => tensor.name.replace("layers.0.", ""));
  const order = "embed attnNorm qkv qkvBias o mlpNorm gateUp down norm lmHead";
  assertEquals(names.join(" "), order);
  const shapes = Object.fromEntries(checkpoint.tensors.map(({ shape }, i) => [names[i], shape]));
  assertEquals([shapes.qkv, shapes.qkvBias, shapes.o], [[64, 8], [64], [8, 32]]);
  assertEquals(
    [shapes.gateUp, shapes.down],
    [
      [10, 8],
      [8, 5],
    ],
  );
  assertEquals(
    checkpoint.bytes,
    checkpoint.tensors.reduce((sum, tensor) => sum + tensor.bytes, 0),
  );
});

/** A folder whose stored tensors are all known: value = place in the file order. */
function counted(dir: string, dtypes: Record<string, "f32" | "bf16" | "f16"> = {}): void {
  const shapes: [string, number[]][] = [
    ["embed_tokens.weight", [3, 2]],
    ["layers.0.input_layernorm.weight", [2]],
    ["layers.0.self_attn.q_proj.weight", [8, 2]],
    ["layers.0.self_attn.k_proj.weight", [8, 2]],
    ["layers.0.self_attn.v_proj.weight", [8, 2]],
    ["layers.0.self_attn.o_proj.weight", [2, 8]],
    ["layers.0.post_attention_layernorm.weight", [2]],
    ["layers.0.mlp.gate_proj.weight", [3, 2]],
    ["layers.0.mlp.up_proj.weight", [3, 2]],
    ["layers.0.mlp.down_proj.weight", [2, 3]],
    ["norm.weight", [2]],
  ];
  let next = 0;
  const tensors = shapes.map(([name, shape]) => {
    const length = shape.reduce((a, b) => a * b, 1);
    const dtype = dtypes[name] ?? "f32";
    const bytes = fromFloat32(
      Float32Array.from({ length }, () => next++),
      dtype,
    );
    return { name: `model.${name}`, shape, dtype, bytes };
  });
  writeTinyCheckpoint(dir, {
    ...{ layers: 1, hidden: 2, heads: 1, kvHeads: 1, headDim: 8 },
    intermediate: 3,
    vocab: 3,
  });
  writeSafetensors(join(dir, "model.safetensors"), tensors);
}

test("gate and up rows alternate, q, k and v rows follow each other", () => {
  const dir = join(scratch, "counted");
  counted(dir);
  using checkpoint = openCheckpoint(dir);
  const values = (name: string): number[] => {
    const tensor = checkpoint.tensors.find((each) => each.name === name);
    assert(tensor !== undefined);
    return [...whole(tensor)];
  };
  assertEquals(
    values("layers.0.qkv"),
    Array.from({ length: 48 }, (_, i) => 8 + i),
  );
  assertEquals(values("layers.0.gateUp"), [74, 75, 80, 81, 76, 77, 82, 83, 78, 79, 84, 85]);
});

test("any range of whole values reads the same bytes as the whole", () => {
  const dir = tiny({ arch: "qwen2", hidden: 24, intermediate: 20 });
  using checkpoint = openCheckpoint(dir);
  for (const tensor of checkpoint.tensors) {
    const all = new Uint8Array(tensor.bytes);
    tensor.read(all);
    for (const length of [4, 52, 96 * 3 + 4]) {
      const parts = new Uint8Array(tensor.bytes);
      for (let at = 0; at < tensor.bytes; at += length) tensor.read(parts.subarray(at, at + length), at);
      assertEquals(parts, all, `${tensor.name} in pieces of ${length}`);
    }
    refused("BAD_ARGUMENT", tensor.name, () => tensor.read(new Uint8Array(4), tensor.bytes));
    refused("BAD_ARGUMENT", "whole values", () => tensor.read(new Uint8Array(4), 2));
  }
});

test("a matrix of several pieces keeps its rows apart, also when it is converted", () => {
  const dir = join(scratch, "pieces");
  const [hidden, intermediate] = [256, 1200]; // gate is 1.2 MB in f32
  writeTinyCheckpoint(dir, { layers: 1, hidden, intermediate, dtype: "bf16", seed: 3 });
  const value = (row: number, column: number): number => ((row * 7 + column * 3) % 200) - 100;
  const matrix = (shift: number): Uint8Array =>
    fromFloat32(
      Float32Array.from({ length: hidden * intermediate }, (_, i) =>
        value(Math.floor(i / hidden) + shift, i % hidden),
      ),
      "f32",
    );
  const stored = readFileSync(join(dir, "model.safetensors"));
  const headerBytes = Number(stored.readBigUInt64LE(0));
  const header = JSON.parse(stored.subarray(8, 8 + headerBytes).toString());
  const tensors = Object.entries<{ shape: number[]; data_offsets: [number, number] }>(header)
    .filter(([name]) => name !== "__metadata__")
    .map(([name, { shape, data_offsets }]) => {
      if (name.includes("gate_proj")) return { name, shape, dtype: "f32" as const, bytes: matrix(0) };
      if (name.includes("up_proj")) return { name, shape, dtype: "f32" as const, bytes: matrix(50) };
      const [start, end] = data_offsets.map((at) => 8 + headerBytes + at);
      return { name, shape, dtype: "bf16" as const, bytes: stored.subarray(start, end) };
    });
  writeSafetensors(join(dir, "model.safetensors"), tensors);
  using checkpoint = openCheckpoint(dir);
  const gateUp = checkpoint.tensors.find((tensor) => tensor.name === "layers.0.gateUp");
  assert(gateUp !== undefined);
  const expected = Float32Array.from({ length: 2 * hidden * intermediate }, (_, i) => {
    const row = Math.floor(i / hidden);
    return value(Math.floor(row / 2) + (row % 2) * 50, i % hidden);
  });
  assertEquals(whole(gateUp), expected);
});

test("tensors of another dtype become the matrices' dtype, to nearest", () => {
  const dir = join(scratch, "mixed");
  const bf16 = { "embed_tokens.weight": "bf16", "layers.0.self_attn.q_proj.weight": "bf16" } as const;
  counted(dir, { ...bf16, "norm.weight": "f32" });
  using checkpoint = openCheckpoint(dir);
  assertEquals(checkpoint.config.dtype, "bf16");
  assert(checkpoint.tensors.every((tensor) => tensor.dtype === "bf16"));
  const qkv = checkpoint.tensors.find((tensor) => tensor.name === "layers.0.qkv");
  assert(qkv !== undefined);
  assertEquals(
    [...whole(qkv)],
    Array.from({ length: 48 }, (_, i) => 8 + i),
  );
});

test("conversion rounds to nearest even and refuses what does not fit", () => {
  const through = (value: number, dtype: "bf16" | "f16"): number | undefined =>
    toFloat32(fromFloat32(Float32Array.of(value), dtype), dtype)[0];
  assertEquals(through(1 + 2 ** -8, "bf16"), 1);
  assertEquals(through(1 + 3 * 2 ** -8, "bf16"), 1 + 2 ** -6);
  assertEquals(through(1 + 2 ** -11, "f16"), 1);
  assertEquals(through(2047.9, "f16"), 2048);
  assertEquals(through(-(2 ** -24), "f16"), -(2 ** -24));
  assertEquals(through(2 ** -26, "f16"), 0);
  assertEquals(through(65519, "f16"), 65504);
  assertEquals(through(NaN, "f16"), NaN);
  assertEquals(through(-Infinity, "bf16"), -Infinity);
  for (let bits = 0; bits < 65536; bits++) {
    const bytes = Uint8Array.of(bits & 255, bits >> 8);
    for (const dtype of ["f16", "bf16"] as const) {
      const value = toFloat32(bytes, dtype);
      if (!Number.isNaN(value[0])) assertEquals(fromFloat32(value, dtype), bytes, `${dtype} ${bits}`);
    }
  }
  assertEquals(convert(fromFloat32(Float32Array.of(1e6), "f32"), "f32", "f16"), undefined);
  assertEquals(convert(fromFloat32(Float32Array.of(Infinity), "f32"), "f32", "f16")?.length, 2);
});

test("a sharded checkpoint reads as the whole one", () => {
  const dir = tiny({ seed: 5 });
  using one = openCheckpoint(dir);
  const file = readFileSync(join(dir, "model.safetensors"));
  const headerBytes = Number(file.readBigUInt64LE(0));
  const { __metadata__, ...header } = JSON.parse(file.subarray(8, 8 + headerBytes).toString());
  const sharded = tiny({ seed: 6 });
  rmSync(join(sharded, "model.safetensors"));
  const names = Object.keys(header);
  const weight_map: Record<string, string> = {};
  for (const shard of [0, 1]) {
    const tensors = names
      .filter((_, i) => i % 2 === shard)
      .map((name) => {
        const { shape, data_offsets } = header[name];
        weight_map[name] = `model-${shard}.safetensors`;
        const [start, end] = data_offsets;
        return {
          ...{ name, shape, dtype: "f32" as const },
          bytes: file.subarray(8 + headerBytes + start, 8 + headerBytes + end),
        };
      });
    writeSafetensors(join(sharded, `model-${shard}.safetensors`), tensors);
  }
  writeJson(join(sharded, "model.safetensors.index.json"), { metadata: {}, weight_map });
  {
    using two = openCheckpoint(sharded);
    assertEquals(two.tensors.map(whole), one.tensors.map(whole));
  }
  rmSync(join(sharded, "model-1.safetensors"));
  refused("BAD_CHECKPOINT", "model-1.safetensors: is missing", () => openCheckpoint(sharded));
  const escaping = Object.fromEntries(names.map((name) => [name, "../model.safetensors"]));
  writeJson(join(sharded, "model.safetensors.index.json"), { weight_map: escaping });
  refused("BAD_CHECKPOINT", "../model.safetensors", () => openCheckpoint(sharded));
});

test("truncated and malformed weight files are refused before anything is read", () => {
  const file = (dir: string): string => join(dir, "model.safetensors");
  const size = readFileSync(file(tiny())).length;
  for (const bytes of [0, 7, 8, 100, size - 1]) {
    const dir = tiny();
    truncateSync(file(dir), bytes);
    refused("BAD_CHECKPOINT", "model.safetensors", () => openCheckpoint(dir));
  }
  const edited = (edit: (bytes: Buffer) => Buffer): string => {
    const dir = tiny();
    writeFileSync(file(dir), edit(readFileSync(file(dir))));
    return dir;
  };
  const cases: [string, (bytes: Buffer) => Buffer][] = [
    ["beyond its last tensor", (bytes) => Buffer.concat([bytes, Buffer.alloc(3)])],
    ["header length is absurd", (bytes) => Buffer.from(bytes.fill(0xff, 0, 8))],
    ["not JSON", (bytes) => Buffer.from(bytes.fill(0x7b, 8, 12))],
    ["shape", (bytes) => replace(bytes, '"shape":[96,32]', '"shape":[96,33]')],
    ["hole or overlaps", (bytes) => replace(bytes, '"data_offsets":[0,12288]', '"data_offsets":[4,12292]')],
    ["data_offsets", (bytes) => replace(bytes, '"data_offsets":[0,12288]', '"data_offsets":[-1,1228]')],
    [
      "ends before it starts",
      (bytes) => replace(bytes, '"data_offsets":[0,12288]', '"data_offsets":[9,8    ]'),
    ],
  ];
  for (const [text, edit] of cases) refused("BAD_CHECKPOINT", text, () => openCheckpoint(edited(edit)));
});

/** The same length, so that the header's length stays right. */
function replace(bytes: Buffer, from: string, to: string): Buffer {
  assertEquals(from.length, to.length);
  const text = bytes.toString("latin1");
  assertStringIncludes(text, from);
  return Buffer.from(text.replace(from, to), "latin1");
}

test("a missing, misshapen or foreign tensor is named", () => {
  const untied = tiny();
  writeJson(join(untied, "config.json"), {
    ...JSON.parse(readFileSync(join(untied, "config.json"), "utf8")),
    tie_word_embeddings: false,
  });
  refused("BAD_CHECKPOINT", "lm_head.weight", () => openCheckpoint(untied));
  const wide = tiny({ config: { intermediate_size: 49 } });
  refused("BAD_CHECKPOINT", "gate_proj.weight has shape [48, 32]", () => openCheckpoint(wide));
  const foreign = tiny({ hidden: 32, vocab: 96 });
  const path = join(foreign, "model.safetensors");
  writeFileSync(
    path,
    replace(readFileSync(path), '"dtype":"F32","shape":[96,32]', '"dtype":"I32","shape":[96,32]'),
  );
  refused("UNSUPPORTED_MODEL", "stored as I32", () => openCheckpoint(foreign));
});

test("a folder with more layers than its config says is refused, not answered from in part", () => {
  const dir = tiny({ layers: 3, config: { num_hidden_layers: 2 } });
  refused("BAD_CHECKPOINT", "model.layers.2.", () => openCheckpoint(dir));
  refused("BAD_CHECKPOINT", "num_hidden_layers 2", () => openCheckpoint(dir));
});

test("a config that calls for a billion layers fails at the first that is missing", {
  timeout: 10_000,
}, () => {
  const dir = tiny({ layers: 3, config: { num_hidden_layers: 1e9 } });
  refused("BAD_CHECKPOINT", "lacks the tensor model.layers.3.input_layernorm.weight", () =>
    openCheckpoint(dir),
  );
});

test("a checkpoint's file that shrinks while it is open is an error, not old bytes", () => {
  const dir = tiny();
  using checkpoint = openCheckpoint(dir);
  truncateSync(join(dir, "model.safetensors"), 2000);
  const last = checkpoint.tensors.at(-1);
  assert(last !== undefined);
  refused("BAD_CHECKPOINT", "ended at byte", () => last.read(new Uint8Array(last.bytes)));
});

test("tiny checkpoints are the same for the same seed and their logits are neither flat nor certain", () => {
  for (const options of [
    {},
    { arch: "qwen3", dtype: "bf16", tied: false },
    { arch: "qwen2", dtype: "f16" },
  ] as const) {
    const dir = tiny({ ...options, layers: 2 });
    assertEquals(
      readFileSync(join(dir, "model.safetensors")),
      readFileSync(join(tiny({ ...options, layers: 2 }), "model.safetensors")),
    );
    const tokens = Array.from({ length: 24 }, (_, i) => (i * 37) % 96);
    const logprobs = referenceLogprobs(dir, tokens);
    assert(logprobs.every(Number.isFinite));
    const best = tokens.map((_, row) => Math.max(...logprobs.subarray(row * 96, (row + 1) * 96)));
    const mean = best.reduce((sum, value) => sum + value, 0) / best.length;
    assert(mean > -3.8 && mean < -0.2, `best log-probability ${mean} on average`);
    // Attention matters: another first token changes the last row.
    const other = referenceLogprobs(dir, [5, ...tokens.slice(1)]);
    assertLess(1e-4, Math.abs((other.at(-1) ?? NaN) - (logprobs.at(-1) ?? NaN)));
  }
});
