/// <reference lib="esnext.disposable" preserve="true" />
// The four matrices of a layer as one dense chain: one row of x (decode), and a piece of a prompt (prefill).

import { FKV_DECODE } from "../ffi/constants.ts";
import { DenseQueue, epilogue, type Linear } from "../lib/dense.ts";
import { Device, FKV_BF16 } from "../lib/device.ts";
import type { BenchOptions, Floors } from "./bench.ts";
import { qkvWidth, randomBf16, randomF32, shape } from "./layer8b.ts";
import { deviceMs } from "./measure.ts";
import { rated } from "./rate.ts";
import type { Row } from "./table.ts";

const { hidden, intermediate, heads, headDim } = shape;
/** [n_out][k] of each; together 436 MB, so that a step finds none of them in a cache. */
const matrices = [
  { name: "qkv", nOut: qkvWidth, k: hidden, norm: true },
  { name: "o", nOut: hidden, k: heads * headDim, norm: false },
  { name: "gateUp", nOut: 2 * intermediate, k: hidden, norm: true },
  { name: "down", nOut: hidden, k: intermediate, norm: false },
] as const;
const weights = matrices.reduce((n, { nOut, k }) => n + nOut * k, 0);
const prefillRows = 128;

export function matmul(floors: Floors, { say }: BenchOptions): Row[] {
  using owned = new DisposableStack();
  const device = owned.use(Device.open({ device: "cpu", threads: floors.threads }));
  const stream = owned.use(device.stream());
  const alloc = (bytes: number) => owned.use(device.alloc(bytes));

  const random = randomBf16(2 ** 24);
  const table = alloc(2 * weights);
  for (let at = 0; at < table.bytes; at += random.byteLength)
    stream.copy(table.address + at, random, Math.min(random.byteLength, table.bytes - at));
  let at = table.address;
  const [qkv, o, gateUp, down] = matrices.map(({ nOut, k, norm }): Linear => {
    const linear = { weight: at, bias: 0, norm: norm ? table.address : 0, nOut, k };
    at += 2 * nOut * k;
    return linear;
  }) as [Linear, Linear, Linear, Linear];

  const x = alloc(4 * prefillRows * hidden);
  const wide = alloc(4 * prefillRows * qkvWidth);
  const attended = alloc(4 * prefillRows * heads * headDim);
  const mlp = alloc(4 * prefillRows * intermediate);
  stream.copy(attended, randomF32(prefillRows * heads * headDim));
  const limits = { maxRows: prefillRows, maxK: intermediate, maxOut: 2 * intermediate };
  const dense = owned.use(
    new DenseQueue(device, stream, {
      dtype: FKV_BF16,
      eps: 1e-5,
      split: false,
      family: FKV_DECODE,
      ...limits,
    }),
  );
  const chain = (rows: number): void => {
    const add = (linear: Linear, kind: number, from: number, to: number, width: number): void =>
      dense.add(linear, kind, from, linear.k, to, width, rows);
    stream.memset(x, 0); // the residual starts anew: what is added does not grow from sample to sample
    add(o, epilogue.add, attended.address, x.address, hidden);
    add(gateUp, epilogue.swiglu, x.address, mlp.address, intermediate);
    add(down, epilogue.add, mlp.address, x.address, hidden);
    add(qkv, epilogue.store, x.address, wide.address, qkvWidth);
    dense.run();
  };

  say(`matmul, ${floors.threads} threads`);
  const decode = deviceMs(device, stream, { atLeast: 5, budgetMs: 2500 }, () => chain(1));
  const prefill = deviceMs(device, stream, { atLeast: 3, budgetMs: 3000 }, () => chain(prefillRows));
  const name = "a layer's matmuls";
  return [
    rated({ name: `${name}, decode`, floor: "read", amount: 2 * weights, goal: 60 }, floors, decode),
    rated(
      {
        name: `${name}, prefill of ${prefillRows}`,
        floor: "fma",
        amount: 2 * prefillRows * weights,
        goal: 40,
      },
      floors,
      prefill,
    ),
  ];
}
