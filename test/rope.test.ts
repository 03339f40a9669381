/// <reference lib="esnext.disposable" preserve="true" />
// Rotary positions and QK-norm, against float64.

import { test } from "node:test";
import { assert, assertEquals, assertGreater, assertThrows } from "@std/assert";
import type { Dtype } from "../lib/checkpoint.ts";
import { FreeKVError, pack } from "../lib/device.ts";
import { dtypeCode } from "../lib/geometry.ts";
import { bits, DenseRig, rounded } from "./dense/rig.ts";
import { ropeHead } from "./reference/dense.ts";
import { Random } from "./retrieval/random.ts";

interface Case {
  headDim: number;
  positions: number[];
  dtype?: Dtype;
  qHeads?: number;
  kvHeads?: number;
  qNorm?: boolean;
  kNorm?: boolean;
  scale?: number;
}
const eps = 1e-6;

/** Runs one case; returns what went in and what came out. */
function run(rig: DenseRig, c: Case, qkv: Float32Array, norms: readonly [Float32Array, Float32Array]) {
  const { headDim: d, dtype = "f32", qHeads = 5, kvHeads = 2, scale = 1 } = c;
  const invFreq = Float64Array.from({ length: d / 2 }, (_, i) => 10000 ** (-2 * (i / d)));
  const memory = rig.upload(qkv);
  const params = pack.fkv_rope_params({
    n_rows: c.positions.length,
    n_q_heads: qHeads,
    n_kv_heads: kvHeads,
    head_dim: d,
    dtype: dtypeCode[dtype],
    eps,
    scale,
    qkv: memory,
    positions: rig.upload(Int32Array.from(c.positions)),
    inv_freq: rig.upload(invFreq),
    q_norm: c.qNorm ? rig.stored(norms[0], dtype) : null,
    k_norm: c.kNorm ? rig.stored(norms[1], dtype) : null,
  });
  rig.device.call("fkv_rope", params, rig.stream.handle);
  return { got: rig.floats(memory), invFreq };
}

const cases: Case[] = [
  { headDim: 64, positions: [0, 1, 31, 100_000] },
  { headDim: 96, positions: [100_000, 7], qNorm: true, kNorm: true, dtype: "bf16" },
  { headDim: 128, positions: [100_000, 99_999, 12], kNorm: true, dtype: "f16", scale: 1.2079441541679836 },
  { headDim: 256, positions: [5, 100_000], qNorm: true, qHeads: 8, kvHeads: 1 },
  { headDim: 2, positions: [3] },
  { headDim: 20, positions: [40, 41], qNorm: true, kNorm: true },
];
for (const c of cases) {
  const { headDim: d, positions, dtype = "f32", qHeads = 5, kvHeads = 2, scale = 1 } = c;
  test(`RoPE matches float64: d ${d}, positions ${positions.join(" ")}, ${dtype}`, {
    timeout: 30_000,
  }, () => {
    using rig = new DenseRig();
    const random = new Random(d);
    const heads = qHeads + 2 * kvHeads;
    const qkv = random.normals(positions.length * heads * d);
    const norms = [rounded(random.normals(d), dtype), rounded(random.normals(d), dtype)] as const;
    const { got, invFreq } = run(rig, c, qkv, norms);
    let moved = 0;
    for (const [row, position] of positions.entries()) {
      for (let head = 0; head < heads; head++) {
        const at = (row * heads + head) * d;
        const before = qkv.subarray(at, at + d);
        const after = got.subarray(at, at + d);
        if (head >= qHeads + kvHeads) {
          assertEquals(after, before, "v heads are left alone");
          continue;
        }
        const q = head < qHeads;
        const norm = (q ? c.qNorm : c.kNorm) ? { weight: norms[q ? 0 : 1], eps } : undefined;
        const expected = ropeHead(before, position, invFreq, scale, norm);
        for (const [i, value] of expected.entries()) {
          const error = Math.abs(value - (after[i] as number));
          assert(error < 3e-6, `row ${row}, head ${head}, ${i}: ${after[i]} for ${value}`);
          moved = Math.max(moved, Math.abs(value - (before[i] as number)));
        }
      }
    }
    assertGreater(moved, 0.5, "something turned");
  });
}

test("RoPE leaves an empty row alone, and a row has the same bits in any batch", { timeout: 30_000 }, () => {
  using rig = new DenseRig();
  const random = new Random(1);
  const c = { headDim: 96, qNorm: true, kNorm: true };
  const norms = [random.normals(96), random.normals(96)] as const;
  const width = 9 * 96;
  const rows = 600;
  const qkv = random.normals(rows * width);
  qkv.fill(Number.NaN, 3 * width, 4 * width);
  const positions = Array.from({ length: rows }, (_, row) => (row % 5 === 3 ? -1 : row * 977));
  const { got } = run(rig, { ...c, positions }, qkv, norms);
  for (const [row, position] of positions.entries()) {
    if (row >= 40 && row % 53 !== 0) continue;
    const before = qkv.slice(row * width, (row + 1) * width);
    const alone = run(rig, { ...c, positions: [position] }, before, norms).got;
    assertEquals(bits(got.slice(row * width, (row + 1) * width)), bits(alone));
    if (position === -1) assertEquals(bits(alone), bits(before));
  }
});

test("RoPE refuses what it cannot run", { timeout: 30_000 }, () => {
  using rig = new DenseRig();
  const memory = rig.alloc(4096);
  const good = {
    n_rows: 1,
    n_q_heads: 2,
    n_kv_heads: 1,
    head_dim: 8,
    dtype: dtypeCode.f32,
    eps,
    scale: 1,
    qkv: memory,
    positions: memory,
    inv_freq: memory,
    q_norm: null,
    k_norm: null,
  };
  const call = (changes: Partial<typeof good> | { qkv: null }, structBytes?: number): void => {
    const params = pack.fkv_rope_params({ ...good, ...changes });
    if (structBytes !== undefined) new DataView(params).setUint32(0, structBytes, true);
    rig.device.call("fkv_rope", params, rig.stream.handle);
  };
  const refused: [() => void, string][] = [
    [() => call({ qkv: null }), "qkv"],
    [() => call({ head_dim: 7 }), "head_dim 7"],
    [() => call({ head_dim: 0 }), "head_dim 0"],
    [() => call({ n_rows: 0 }), "n_rows 0"],
    [() => call({ dtype: 9 }), "dtype 9"],
    [() => call({}, 8), "struct_bytes"],
  ];
  for (const [run, text] of refused) assertThrows(run, FreeKVError, text);
});
