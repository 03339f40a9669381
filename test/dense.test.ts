/// <reference lib="esnext.disposable" preserve="true" />
// The dense chain against float64, and against itself in other batches. Its edges: dense-edges.test.ts.

import { test } from "node:test";
import { assert, assertEquals, assertGreater, assertLess } from "@std/assert";
import type { Dtype } from "../lib/checkpoint.ts";
import { bits, DenseRig, rounded } from "./dense/rig.ts";
import { densePhase, type Epilogue } from "./reference/dense.ts";
import { Random } from "./retrieval/random.ts";
import { onTwin } from "./target.ts";

const dtypes: readonly Dtype[] = ["f32", "bf16", "f16"];
const epilogues: readonly Epilogue[] = ["store", "add", "swiglu"];
const eps = 1e-5;
/** Error of an output, relative to the sum of its products' sizes. Beside bf16 weights a GPU takes x as two bf16: up to 2^-17 of it is lost. */
const tolerance: Record<Dtype, number> = { f32: 2e-6, bf16: onTwin ? 2e-6 : 2 ** -17 + 2e-6, f16: 2e-6 };

/** Weights on the device and as numbers. */
function matrix(rig: DenseRig, random: Random, nOut: number, k: number, dtype: Dtype) {
  const weight = rounded(random.normals(nOut * k), dtype);
  const bias = rounded(random.normals(nOut), dtype);
  const norm = rounded(random.normals(k), dtype);
  return {
    values: { weight, bias, norm },
    weight: rig.stored(weight, dtype),
    bias: rig.stored(bias, dtype),
    norm: rig.stored(norm, dtype),
  };
}

for (const dtype of dtypes) {
  for (const epilogue of epilogues) {
    test(`a phase matches float64: ${dtype}, ${epilogue}, ragged k and n_out`, { timeout: 60_000 }, () => {
      using rig = new DenseRig();
      const random = new Random(7);
      // A GPU chains the multiples of 64, and of what lies beyond 2048 keeps a slice at a time where there are many rows.
      for (const k of [1, 15, 16, 17, 64, 250, 256, 576, 1024, 1031, 2100, 4160]) {
        for (const nOut of epilogue === "swiglu" ? [2, 6, 10, 34] : [1, 3, 5, 8, 33]) {
          for (const rows of [1, 2, 5, 9]) {
            const plain = (k + nOut + rows) % 3 === 0;
            const w = matrix(rig, random, nOut, k, dtype);
            const width = epilogue === "swiglu" ? nOut / 2 : nOut;
            const xStride = k % 64 === 0 ? k + 4 : k + 3;
            const yStride = width + 2;
            const x = random.normals(rows * xStride);
            const before = random.normals(rows * yStride);
            const y = rig.upload(before);
            rig.chain(
              [
                {
                  weight: w.weight,
                  bias: plain ? undefined : w.bias,
                  norm: plain ? undefined : w.norm,
                  x: rig.upload(x),
                  y,
                  xStride,
                  yStride,
                  nOut,
                  k,
                  dtype,
                  epilogue,
                  eps,
                },
              ],
              rows,
            );
            const got = rig.floats(y);
            for (let row = 0; row < rows; row++) {
              const old = before.subarray(row * yStride, (row + 1) * yStride);
              const expected = densePhase({
                weight: w.values.weight,
                bias: plain ? undefined : w.values.bias,
                norm: plain ? undefined : w.values.norm,
                x: x.subarray(row * xStride, row * xStride + k),
                y: old,
                nOut,
                k,
                epilogue,
                eps,
              });
              for (let n = 0; n < width; n++) {
                const error = Math.abs((got[row * yStride + n] as number) - (expected.y[n] as number));
                const allowed = tolerance[dtype] * (expected.magnitude[n] as number);
                assert(
                  error <= allowed,
                  `k ${k}, n_out ${nOut}, row ${row} of ${rows}, ${n}: off by ${error}`,
                );
              }
              assertEquals(
                got.slice(row * yStride + width, (row + 1) * yStride),
                old.slice(width),
                "what lies between rows of y is left alone",
              );
            }
          }
        }
      }
    });
  }
}

test("a row has the same bits alone and in any batch", { timeout: 60_000 }, () => {
  using rig = new DenseRig();
  const random = new Random(11);
  for (const [k, nOut, dtype] of [
    [256, 96, "bf16"],
    [250, 37, "f16"],
    [17, 5, "f32"],
    [1500, 14, "bf16"],
    [576, 34, "f16"],
    [2816, 34, "bf16"],
  ] as const) {
    for (const epilogue of nOut % 2 === 0 ? epilogues : (["store", "add"] as const)) {
      const w = matrix(rig, random, nOut, k, dtype);
      const width = epilogue === "swiglu" ? nOut / 2 : nOut;
      const rows = 512;
      const x = random.normals(rows * k);
      const xs = rig.upload(x);
      const run = (first: number, n: number): Float32Array => {
        const y = rig.upload(new Float32Array(n * width).fill(0.25));
        const phase = { weight: w.weight, bias: w.bias, norm: w.norm, x: xs.address + 4 * first * k, y };
        rig.chain([{ ...phase, nOut, k, dtype, epilogue, eps }], n);
        return rig.floats(y);
      };
      const all = bits(run(0, rows));
      assertGreater(new Set(all).size, (rows * width) / 2, "outputs differ from each other");
      for (const n of [1, 2, 3, 4, 5, 8, 9, 16, 33]) {
        for (const first of [0, 129, 512 - n]) {
          const part = bits(run(first, n));
          assertEquals(
            part,
            all.slice(first * width, (first + n) * width),
            `${n} rows from ${first}, k ${k}`,
          );
        }
      }
    }
  }
});

test("the number of threads does not change a bit", { timeout: 60_000 }, () => {
  const run = (threads: number, scheduleSeed?: number): Uint32Array => {
    using rig = new DenseRig(scheduleSeed === undefined ? { threads } : { threads, scheduleSeed });
    const random = new Random(3);
    const [k, nOut, rows] = [640, 301, 70];
    const w = matrix(rig, random, nOut, k, "bf16");
    const y = rig.alloc(4 * rows * nOut);
    const x = rig.upload(random.normals(rows * k));
    const phase = { weight: w.weight, bias: w.bias, norm: w.norm, x, y, nOut, k, eps };
    rig.chain([{ ...phase, dtype: "bf16", epilogue: "store" }], rows);
    return bits(rig.floats(y));
  };
  const one = run(1);
  assertGreater(new Set(one).size, 1000);
  for (const threads of [2, 3, 8]) assertEquals(run(threads), one);
  assertEquals(run(2, 5), one, "nor does a shuffled schedule");
});

test("phases of a chain see what earlier ones wrote, also where y is x", { timeout: 30_000 }, () => {
  for (const rows of [1, 6]) {
    using rig = new DenseRig();
    const random = new Random(rows);
    const [hidden, mlp, dtype] = [48, 40, "f16"] as const;
    const up = matrix(rig, random, 2 * mlp, hidden, dtype);
    const down = matrix(rig, random, hidden, mlp, dtype);
    const square = matrix(rig, random, hidden, hidden, dtype);
    const start = random.normals(rows * hidden);
    const make = () => ({ x: rig.upload(start), inner: rig.alloc(4 * rows * mlp) });
    const phases = ({ x, inner }: ReturnType<typeof make>) => [
      {
        weight: up.weight,
        norm: up.norm,
        x,
        y: inner,
        nOut: 2 * mlp,
        k: hidden,
        dtype,
        epilogue: "swiglu" as const,
      },
      { weight: down.weight, x: inner, y: x, nOut: hidden, k: mlp, dtype, epilogue: "add" as const },
      { weight: square.weight, x, y: x, nOut: hidden, k: hidden, dtype, epilogue: "add" as const },
    ];
    const together = make();
    rig.chain(phases(together), rows);
    const apart = make();
    for (const phase of phases(apart)) rig.chain([phase], rows);
    const got = rig.floats(together.x);
    assertEquals(bits(got), bits(rig.floats(apart.x)));

    const common = { eps: 0 };
    for (let row = 0; row < rows; row++) {
      let x = Array.from(start.subarray(row * hidden, (row + 1) * hidden));
      const { y: inner } = densePhase({
        ...common,
        weight: up.values.weight,
        norm: up.values.norm,
        x,
        y: [],
        nOut: 2 * mlp,
        k: hidden,
        epilogue: "swiglu",
      });
      x = densePhase({
        ...common,
        weight: down.values.weight,
        x: inner,
        y: x,
        nOut: hidden,
        k: mlp,
        epilogue: "add",
      }).y;
      x = densePhase({
        ...common,
        weight: square.values.weight,
        x,
        y: x,
        nOut: hidden,
        k: hidden,
        epilogue: "add",
      }).y;
      const worst = Math.max(...x.map((value, i) => Math.abs(value - (got[row * hidden + i] as number))));
      const size = Math.max(...x.map(Math.abs));
      assertLess(worst, 1e-5 * size);
      assertGreater(size, 1);
    }
  }
});
