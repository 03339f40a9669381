/// <reference lib="esnext.disposable" preserve="true" />
// A chain of phases in one call against the same phases one a call: the bits are the same, whatever launches serve them.

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
// The last two are longer along k than a device keeps of eight and of sixteen rows at a time: without and with a norm.
const shapes: Shape[] = [
  { hidden: 256, mlp: 768, qkv: 512, dtype: "bf16" },
  { hidden: 72, mlp: 328, qkv: 103, dtype: "f16" },
  { hidden: 1024, mlp: 2816, qkv: 1536, dtype: "bf16" },
  { hidden: 48, mlp: 4616, qkv: 30, dtype: "bf16" },
  { hidden: 2312, mlp: 600, qkv: 90, dtype: "f16" },
];
for (const { hidden, mlp, qkv, dtype } of shapes) {
  test(`a layer's phases in one call or four, the same bits: ${hidden}, ${mlp}, ${qkv}, ${dtype}`, {
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
      const attended = rig.upload(random.normals(rows * hidden));
      const run = (apart: boolean): Uint32Array[] => {
        const x = rig.upload(start);
        const inner = rig.alloc(4 * rows * mlp);
        const out = rig.alloc(4 * rows * qkv);
        const common = { dtype, eps: 1e-5 };
        const phases: Phase[] = [
          { ...common, weight: weights.o, x: attended, y: x, nOut: hidden, k: hidden, epilogue: "add" },
          {
            ...common,
            weight: weights.gateUp,
            bias: weights.gateUpBias,
            norm: weights.mlpNorm,
            x,
            y: inner,
            nOut: 2 * mlp,
            k: hidden,
            epilogue: "swiglu",
          },
          { ...common, weight: weights.down, x: inner, y: x, nOut: hidden, k: mlp, epilogue: "add" },
          {
            ...common,
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
        if (apart) for (const phase of phases) rig.chain([phase], rows);
        else rig.chain(phases, rows);
        return [x, inner, out].map((memory) => bits(rig.floats(memory)));
      };
      const together = run(false);
      assertEquals(together, run(true), `${rows} rows`);
      assertEquals(together, run(false), `${rows} rows again`);
      const values = together.map((words) => new Float32Array(words.slice().buffer));
      assert(values.every((list) => list.every(Number.isFinite)));
      assertGreater(new Set(together[2]).size, (rows * qkv) / 2, "outputs differ from each other");
    }
  });
}
