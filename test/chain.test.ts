/// <reference lib="esnext.disposable" preserve="true" />
// A chain of phases in one call against the same phases one a call, and against launches that take any shape: the bits are the same,
// whatever launches serve them.

import { test } from "node:test";
import { assert, assertEquals, assertGreater } from "@std/assert";
import type { Dtype } from "../lib/checkpoint.ts";
import type { DeviceBuffer } from "../lib/device.ts";
import { bits, DenseRig, type Phase, rounded } from "./dense/rig.ts";
import { Random } from "./retrieval/random.ts";

interface Shape {
  hidden: number;
  mlp: number;
  qkv: number;
  dtype: Dtype;
}
// A GPU chains k that are multiples of 64. The last two are longer along k than it keeps of eight and of sixteen rows at a time: without
// and with a norm.
const shapes: Shape[] = [
  { hidden: 256, mlp: 768, qkv: 512, dtype: "bf16" },
  { hidden: 64, mlp: 320, qkv: 103, dtype: "f16" },
  { hidden: 1024, mlp: 2816, qkv: 1536, dtype: "bf16" },
  { hidden: 64, mlp: 4672, qkv: 30, dtype: "bf16" },
  { hidden: 2368, mlp: 640, qkv: 90, dtype: "f16" },
];
/** "unaligned": rows are a float apart from each other, which a chain does not take, so each phase is launched for itself. */
type How = "together" | "apart" | "unaligned";
for (const { hidden, mlp, qkv, dtype } of shapes) {
  test(`a layer's phases in one call, in four, or in any launches, the same bits: ${hidden}, ${mlp}, ${qkv}, ${dtype}`, {
    timeout: 120_000,
  }, () => {
    using rig = new DenseRig();
    const random = new Random(hidden);
    const matrix = (n: number): DeviceBuffer => rig.stored(rounded(random.normals(n), dtype), dtype);
    const weights = {
      o: matrix(hidden * hidden),
      gateUp: matrix(2 * mlp * hidden),
      gateUpBias: matrix(2 * mlp),
      mlpNorm: matrix(hidden),
      down: matrix(hidden * mlp),
      qkv: matrix(qkv * hidden),
      qkvBias: matrix(qkv),
      attnNorm: matrix(hidden),
    };
    for (const rows of [1, 2, 3, 4, 5, 8, 9, 16, 17, 40]) {
      const start = random.normals(rows * hidden);
      const attendedRows = random.normals(rows * hidden);
      const run = (how: How): Uint32Array[] => {
        const pitch = (width: number): number => (how === "unaligned" ? width + 1 : width);
        const spread = (values: Float32Array): DeviceBuffer => {
          const all = new Float32Array(rows * pitch(hidden));
          for (let row = 0; row < rows; row++)
            all.set(values.subarray(row * hidden, (row + 1) * hidden), row * pitch(hidden));
          return rig.upload(all);
        };
        const gathered = (memory: DeviceBuffer, width: number): Uint32Array =>
          bits(rig.floats(memory)).filter((_, i) => i % pitch(width) < width);
        const x = spread(start);
        const attended = spread(attendedRows);
        const inner = rig.alloc(4 * rows * pitch(mlp));
        const out = rig.alloc(4 * rows * pitch(qkv));
        const common = { dtype, eps: 1e-5, xStride: pitch(hidden), yStride: pitch(hidden) };
        const phases: Phase[] = [
          { ...common, weight: weights.o, x: attended, y: x, nOut: hidden, k: hidden, epilogue: "add" },
          {
            ...common,
            yStride: pitch(mlp),
            weight: weights.gateUp,
            bias: weights.gateUpBias,
            norm: weights.mlpNorm,
            x,
            y: inner,
            nOut: 2 * mlp,
            k: hidden,
            epilogue: "swiglu",
          },
          {
            ...common,
            xStride: pitch(mlp),
            weight: weights.down,
            x: inner,
            y: x,
            nOut: hidden,
            k: mlp,
            epilogue: "add",
          },
          {
            ...common,
            yStride: pitch(qkv),
            weight: weights.qkv,
            bias: weights.qkvBias,
            norm: weights.attnNorm,
            x,
            y: out,
            nOut: qkv,
            k: hidden,
            epilogue: "store",
          },
        ];
        if (how === "apart") for (const phase of phases) rig.chain([phase], rows);
        else rig.chain(phases, rows);
        return [gathered(x, hidden), gathered(inner, mlp), gathered(out, qkv)];
      };
      const together = run("together");
      for (const how of ["apart", "unaligned", "together"] as const)
        assertEquals(run(how), together, `${rows} rows, ${how}`);
      const values = together.map((words) => new Float32Array(words.slice().buffer));
      assert(values.every((list) => list.every(Number.isFinite)));
      assertGreater(new Set(together[2]).size, (rows * qkv) / 2, "outputs differ from each other");
    }
  });
}
