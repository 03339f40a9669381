/// <reference lib="esnext.disposable" preserve="true" />
// The edges of the dense part: numbers that are not finite, gates that overflow, rows without a token, what is refused.

import { test } from "node:test";
import { assert, assertEquals, assertThrows } from "@std/assert";
import { FreeKVError, pack } from "../lib/device.ts";
import { dtypeCode } from "../lib/geometry.ts";
import { DenseRig, epilogueCodes, rounded } from "./dense/rig.ts";
import { Random } from "./retrieval/random.ts";

test("values that are not finite stay where they belong", { timeout: 30_000 }, () => {
  using rig = new DenseRig();
  const nOut = 6;
  for (const [k, dtype] of [
    [20, "bf16"],
    [64, "bf16"],
    [64, "f16"],
    [2112, "bf16"],
    [2112, "f16"],
  ] as const)
    for (const rows of [2, 7, 16]) {
      const weight = new Float32Array(nOut * k).fill(1);
      weight[2 * k + 3] = Number.NaN;
      weight[3 * k + 19] = Number.POSITIVE_INFINITY;
      const x = new Float32Array(rows * k).fill(0.5);
      x[k] = Number.NaN; // row 1
      if (rows > 4) {
        x[2 * k + 1] = Number.NEGATIVE_INFINITY;
        x[3 * k + 19] = 0; // meets the infinite weight
        x[4 * k + 5] = 2 ** 100; // far beyond f16
      }
      const y = rig.alloc(4 * rows * nOut);
      const w = rig.stored(weight, dtype);
      rig.chain([{ weight: w, x: rig.upload(x), y, nOut, k, dtype, epilogue: "store" }], rows);
      const got = rig.floats(y);
      const spoilt = (sum: number, infinite = Infinity): number[] => {
        return [sum, sum, Number.NaN, infinite, sum, sum];
      };
      for (let row = 0; row < rows; row++) {
        let expected = spoilt(k / 2);
        if (row === 1) expected = Array(nOut).fill(Number.NaN);
        if (rows > 4 && row === 2) expected = spoilt(-Infinity, Number.NaN);
        if (rows > 4 && row === 3) expected = spoilt((k - 1) / 2, Number.NaN);
        if (rows > 4 && row === 4) expected = spoilt(2 ** 100);
        assertEquals(
          Array.from(got.subarray(row * nOut, (row + 1) * nOut)),
          expected,
          `row ${row} of ${rows}, k ${k}, ${dtype}`,
        );
      }
    }
});

test("SwiGLU holds at gates that overflow exp", { timeout: 30_000 }, () => {
  using rig = new DenseRig();
  const gates = [-1e30, -200, -88.8, -1, 0, 1, 88.8, 200, 1e30];
  const weight = Float32Array.from(gates.flatMap((gate) => [gate, 2]));
  const y = rig.alloc(4 * gates.length);
  const x = rig.upload(Float32Array.of(1));
  const w = rig.stored(weight, "f32");
  rig.chain([{ weight: w, x, y, nOut: weight.length, k: 1, dtype: "f32", epilogue: "swiglu" }], 1);
  for (const [i, value] of rig.floats(y).entries()) {
    const gate = Math.fround(gates[i] as number);
    const expected = gate < -150 ? 0 : (gate / (1 + Math.exp(-gate))) * 2;
    assert(Math.abs(value - expected) <= 1e-6 * Math.abs(expected) + 1e-36, `gate ${gate}: ${value}`);
  }
});

test("embedding rows are the table's, and zero for an empty row", { timeout: 30_000 }, () => {
  using rig = new DenseRig();
  const random = new Random(5);
  for (const dtype of ["f32", "bf16", "f16"] as const) {
    for (const hidden of [1, 17, 64]) {
      const vocab = 9;
      const table = rounded(random.normals(vocab * hidden), dtype);
      const tokens = [8, -1, 0, 3, 3, 9, 2 ** 31 - 1, -(2 ** 31), 8];
      const out = rig.alloc(4 * tokens.length * hidden);
      rig.device.call(
        "fkv_embed",
        out.address,
        rig.upload(Int32Array.from(tokens)).address,
        rig.stored(table, dtype).address,
        dtypeCode[dtype],
        hidden,
        vocab,
        tokens.length,
        rig.stream.handle,
      );
      const expected = tokens.flatMap((token) =>
        token >= 0 && token < vocab
          ? Array.from(table.subarray(token * hidden, (token + 1) * hidden))
          : Array<number>(hidden).fill(0),
      );
      assertEquals(Array.from(rig.floats(out)), expected);
    }
  }
});

test("the chain refuses what it cannot run, and says which phase", { timeout: 30_000 }, () => {
  using rig = new DenseRig();
  const memory = rig.alloc(4096);
  const room = rig.scratch(1, 8, 8);
  const good = {
    weight: memory,
    bias: null,
    norm: null,
    x: memory,
    y: memory,
    x_stride: 8,
    y_stride: 8,
    n_out: 8,
    k: 8,
    dtype: dtypeCode.f32,
    epilogue: epilogueCodes.store,
    eps: 0,
  };
  const run = (changes: Partial<typeof good> | { weight: null }, rows = 1, scratch = room.address): void => {
    const phase = pack.fkv_phase({ ...good, ...changes });
    rig.device.call("fkv_dense_chain", phase, 1, rows, 0, scratch, rig.stream.handle);
  };
  run({});
  rig.stream.synchronize();
  const refused: [() => void, string][] = [
    [() => run({ weight: null }), "phase 0"],
    [() => run({ dtype: 3 }), "dtype 3 of phase 0"],
    [() => run({ epilogue: 3 }), "epilogue 3"],
    [() => run({ k: 0 }), "k 0"],
    [() => run({ n_out: -1 }), "n_out -1"],
    [() => run({ n_out: 7, epilogue: epilogueCodes.swiglu }), "pairs"],
    [() => run({ x_stride: 7 }), "overlap"],
    [() => run({ y_stride: 7 }), "overlap"],
    [() => run({}, 0), "n_rows 0"],
    [() => run({}, 1, room.address + 4), "aligned"],
  ];
  for (const [call, text] of refused) assertThrows(call, FreeKVError, text);
});
