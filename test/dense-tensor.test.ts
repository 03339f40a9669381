/// <reference lib="esnext.disposable" preserve="true" />
// Many rows: the families PREFILL and FAST, which a GPU computes on tensor cores, against float64 and against themselves.

import { test } from "node:test";
import { assert, assertEquals, assertGreater } from "@std/assert";
import type { Dtype } from "../lib/checkpoint.ts";
import { type DeviceBuffer, FKV_FAST, FKV_PREFILL } from "../lib/device.ts";
import { bits, DenseRig, type Phase, rounded } from "./dense/rig.ts";
import { densePhase, type Epilogue } from "./reference/dense.ts";
import { Random } from "./retrieval/random.ts";

const timeout = 120_000;
const eps = 1e-5;
const epilogues: readonly Epilogue[] = ["store", "add", "swiglu"];
const families = { PREFILL: FKV_PREFILL, FAST: FKV_FAST } as const;

/** Error of an output, relative to the sum of its products' sizes: x as two values of the weights' type, or as one. */
const allowed: Record<keyof typeof families, Record<Dtype, number>> = {
  PREFILL: { f32: 2e-6, bf16: 2e-5, f16: 4e-6 },
  FAST: { f32: 2e-6, bf16: 2 ** -8, f16: 2 ** -11 + 4e-6 },
};

for (const [name, family] of Object.entries(families)) {
  for (const dtype of ["bf16", "f16", "f32"] as const) {
    test(`${name} matches float64: ${dtype}, ragged rows, k and n_out`, { timeout }, () => {
      using rig = new DenseRig();
      const random = new Random(5);
      const tolerance = allowed[name as keyof typeof families][dtype];
      let cases = 0;
      for (const k of [1, 24, 64, 250, 1031, 1040]) {
        for (const nOut of [2, 6, 130, 258]) {
          for (const rows of [9, 33, 130]) {
            const epilogue = epilogues[cases++ % 3] as Epilogue;
            const bare = cases % 4 === 0;
            const width = epilogue === "swiglu" ? nOut / 2 : nOut;
            const [xStride, yStride] = [k + (cases % 2), width + 2 * (cases % 3)];
            const weight = rounded(random.normals(nOut * k), dtype);
            const bias = bare ? undefined : rounded(random.normals(nOut), dtype);
            const norm = bare ? undefined : rounded(random.normals(k), dtype);
            const x = random.normals(rows * xStride);
            const before = random.normals(rows * yStride);
            const y = rig.upload(before);
            const shape = { nOut, k, dtype, epilogue, eps, xStride, yStride };
            rig.chain(
              [
                {
                  ...shape,
                  weight: rig.stored(weight, dtype),
                  bias: bias && rig.stored(bias, dtype),
                  norm: norm && rig.stored(norm, dtype),
                  x: rig.upload(x),
                  y,
                },
              ],
              rows,
              family,
            );
            const got = rig.floats(y);
            for (const row of [0, 8, rows - 1]) {
              const old = before.subarray(row * yStride, (row + 1) * yStride);
              const at = x.subarray(row * xStride, row * xStride + k);
              const expected = densePhase({ weight, bias, norm, x: at, y: old, nOut, k, epilogue, eps });
              for (let n = 0; n < width; n++) {
                const error = Math.abs((got[row * yStride + n] as number) - (expected.y[n] as number));
                assert(
                  error <= tolerance * (expected.magnitude[n] as number),
                  `k ${k}, n_out ${nOut}, row ${row} of ${rows}, ${epilogue} ${n}: off by ${error}`,
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

test("PREFILL: a row has the same bits alone and in any batch", { timeout }, () => {
  using rig = new DenseRig();
  const random = new Random(11);
  for (const [k, nOut, dtype] of [
    [256, 520, "bf16"],
    [1096, 96, "bf16"],
    [250, 38, "f16"],
    [640, 300, "f16"],
  ] as const) {
    const rows = 300;
    const weight = rig.stored(rounded(random.normals(nOut * k), dtype), dtype);
    const norm = rig.stored(rounded(random.normals(k), dtype), dtype);
    const x = rig.upload(random.normals(rows * k));
    for (const epilogue of epilogues) {
      const width = epilogue === "swiglu" ? nOut / 2 : nOut;
      const run = (first: number, n: number): Uint32Array => {
        const y = rig.upload(new Float32Array(n * width).fill(0.25));
        const phase = { weight, norm, x: x.address + 4 * first * k, y, nOut, k, dtype, epilogue, eps };
        rig.chain([phase], n, FKV_PREFILL);
        return bits(rig.floats(y));
      };
      const all = run(0, rows);
      assertGreater(new Set(all).size, (rows * width) / 2, "outputs differ from each other");
      for (const [first, n] of [
        [0, 1],
        [299, 1],
        [127, 3],
        [120, 130],
        [5, 257],
      ] as const)
        assertEquals(run(first, n), all.slice(first * width, (first + n) * width), `${n} from ${first}`);
    }
  }
});

for (const [name, family] of Object.entries(families)) {
  test(`${name}: a gated phase hands its values to the next as if through memory`, { timeout }, () => {
    using rig = new DenseRig();
    const random = new Random(3);
    for (const [hidden, mlp, dtype] of [
      [128, 320, "bf16"],
      [72, 104, "bf16"],
      [64, 192, "f16"],
    ] as const) {
      const rows = 140;
      const matrix = (n: number): DeviceBuffer => rig.stored(rounded(random.normals(n), dtype), dtype);
      const [up, down, norm] = [matrix(2 * mlp * hidden), matrix(hidden * mlp), matrix(hidden)];
      const start = random.normals(rows * hidden);
      const run = (together: boolean): Uint32Array => {
        const x = rig.upload(start);
        const inner = rig.alloc(4 * rows * mlp);
        const phases: Phase[] = [
          { weight: up, norm, x, y: inner, nOut: 2 * mlp, k: hidden, dtype, epilogue: "swiglu", eps },
          { weight: down, x: inner, y: x, nOut: hidden, k: mlp, dtype, epilogue: "add" },
        ];
        if (together) rig.chain(phases, rows, family);
        else for (const phase of phases) rig.chain([phase], rows, family);
        return bits(rig.floats(x));
      };
      const got = run(true);
      assertEquals(got, run(false));
      assertGreater(new Set(got).size, rows * 10);
    }
  });
}

test("PREFILL keeps f32's range where the weights' type has little", { timeout: 30_000 }, () => {
  using rig = new DenseRig();
  const random = new Random(8);
  const [k, nOut, rows] = [128, 16, 12];
  const weight = rounded(random.normals(nOut * k), "f16");
  for (const size of [1e-9, 1e-3, 1e5, 1e12]) {
    const x = random.normals(rows * k).map((value) => value * size);
    const y = rig.alloc(4 * rows * nOut);
    const phase = { weight: rig.stored(weight, "f16"), x: rig.upload(x), y, nOut, k };
    rig.chain([{ ...phase, dtype: "f16", epilogue: "store" }], rows, FKV_PREFILL);
    const got = rig.floats(y);
    for (let row = 0; row < rows; row++) {
      const at = x.subarray(row * k, (row + 1) * k);
      const expected = densePhase({ weight, x: at, y: [], nOut, k, epilogue: "store", eps });
      for (let n = 0; n < nOut; n++) {
        const error = Math.abs((got[row * nOut + n] as number) - (expected.y[n] as number));
        assert(error <= 4e-6 * (expected.magnitude[n] as number), `${size}: ${n} off by ${error}`);
      }
    }
  }
});

test("values that are not finite stay in their rows", { timeout: 30_000 }, () => {
  using rig = new DenseRig();
  const [k, nOut, rows] = [72, 6, 40];
  for (const family of Object.values(families)) {
    for (const dtype of ["bf16", "f16"] as const) {
      const x = new Float32Array(rows * k).fill(0.5);
      x[k] = Number.NaN;
      x[5 * k + 71] = Number.POSITIVE_INFINITY;
      const y = rig.alloc(4 * rows * nOut);
      const weight = rig.stored(new Float32Array(nOut * k).fill(1), dtype);
      rig.chain([{ weight, x: rig.upload(x), y, nOut, k, dtype, epilogue: "store" }], rows, family);
      const got = rig.floats(y);
      for (let row = 0; row < rows; row++) {
        const expected = row === 1 ? Number.NaN : row === 5 ? Number.POSITIVE_INFINITY : 36;
        assertEquals(Array.from(got.subarray(row * nOut, (row + 1) * nOut)), Array(nOut).fill(expected));
      }
    }
  }
});
