/// <reference lib="esnext.disposable" preserve="true" />
// The dense part of decode: matrices of several widths alone, and the layers of Llama-3.1-8B as chains with the logits at the end, for
// every bucket of rows that one pass over the weights serves. Each weight is read once a sample and is larger than any cache; what
// counts is its share of the rate at which the device reads memory, measured in the same run.

import { DenseQueue, epilogue, type Linear } from "../lib/dense.ts";
import { Device, FKV_BF16, FKV_DECODE } from "../lib/device.ts";
import type { Bench, Machine } from "./bench.ts";
import { qkvWidth, randomBf16, randomF32, shape } from "./layer8b.ts";
import { deviceMs, spread } from "./measure.ts";
import { measureRates } from "./speed/floors.ts";
import type { Row } from "./table.ts";

const { hidden, intermediate } = shape;
const vocab = 128_256;
const layerWeights = hidden * (hidden + 3 * intermediate + qkvWidth);
/** One matrix, `nOut` rows of `k`. */
const matrices = [
  { k: 4096, nOut: 28_672 },
  { k: 4096, nOut: 4096 },
  { k: 14_336, nOut: 4096 },
  { k: 28_672, nOut: 8192 },
] as const;
const widest = { maxK: 28_672, maxOut: vocab };

/** Work, and how many weights one sample of it reads. */
interface Case {
  readonly name: string;
  readonly weights: number;
  /** How many times one sample does it, each time with other weights. */
  readonly passes: number;
  issue(rows: number): void;
}

export const chain: Bench = {
  title: "Dense chains",
  async run({ device: name = "auto", floors, say, partly }) {
    using owned = new DisposableStack();
    const device = owned.use(Device.open({ device: name as "auto" }));
    const { backend } = device;
    const { model } = device.info();
    const machine: Machine =
      backend === "cpu"
        ? { words: `CPU twin, ${model}`, slug: "twin" }
        : { words: model, slug: (/[A-Z]+\d+/.exec(model)?.[0] ?? "gpu").toLowerCase() };
    const gpu = backend === "cuda";
    const buckets = gpu ? [1, 2, 4, 8, 16, 32] : [1, 8];
    const layers = gpu ? 8 : 1;

    const stream = owned.use(device.stream());
    const cases = casesOf(device, stream, owned, { layers, logits: gpu, maxRows: Math.max(...buckets) });
    // The twin reads as the CPU does.
    const read = gpu ? measureRates(device).read.median : 1e9 * (floors().at(-1)?.read.median ?? Number.NaN);
    const rows: Row[] = [];
    for (const each of cases) {
      for (const n of buckets) {
        say(`${each.name}, ${n} rows`);
        using graph = stream.capture(() => each.issue(n));
        const sampling = gpu ? { atLeast: 20, budgetMs: 0 } : { atLeast: 3, budgetMs: 500 };
        const ms = spread(deviceMs(device, stream, sampling, () => stream.launch(graph)));
        const us = 1e3 / each.passes;
        const rate = (2 * each.weights) / (ms.median / 1e3);
        rows.push({
          ...{ case: each.name, rows: n, us: us * ms.median, p25: us * ms.p25, p75: us * ms.p75 },
          ...{ best: us * ms.least, "GB/s": rate / 1e9, "read GB/s": read / 1e9 },
          ratio: read / rate,
        });
        partly(rows, machine);
      }
    }
    const notes = [
      `bf16 weights, x and y f32. ratio: time over that of reading the weights at the rate of memory read in this run. More than 16 rows run as plain launches.`,
    ];
    return { rows, notes, machine };
  },
};

function casesOf(
  device: Device,
  stream: ReturnType<Device["stream"]>,
  owned: DisposableStack,
  o: { layers: number; logits: boolean; maxRows: number },
): Case[] {
  const alloc = (bytes: number) => owned.use(device.alloc(bytes));
  const most = o.layers * layerWeights + (o.logits ? hidden * vocab : 0);
  const weights = alloc(2 * Math.max(most, ...matrices.map(({ k, nOut }) => k * nOut)));
  using block = device.pinned(2 ** 26);
  new Uint32Array(block.buffer).set(randomBf16(2 ** 25));
  for (let at = 0; at < weights.bytes; at += block.bytes)
    stream.copy(weights.address + at, block, Math.min(block.bytes, weights.bytes - at));
  const input = alloc(4 * o.maxRows * widest.maxK);
  stream.copy(input, randomF32(o.maxRows * widest.maxK));
  const x = alloc(4 * o.maxRows * hidden);
  const wide = alloc(4 * o.maxRows * qkvWidth);
  const mlp = alloc(4 * o.maxRows * intermediate);
  const out = alloc(4 * o.maxRows * vocab);
  const queue = {
    dtype: FKV_BF16,
    eps: 1e-5,
    split: false,
    family: FKV_DECODE,
    maxRows: o.maxRows,
    ...widest,
  };
  const dense = owned.use(new DenseQueue(device, stream, queue));
  stream.synchronize();

  const linear = (at: number, nOut: number, k: number, norm: boolean): Linear => {
    return { weight: weights.address + 2 * at, bias: 0, norm: norm ? weights.address : 0, nOut, k };
  };
  const alone = matrices.map(({ k, nOut }): Case => {
    // Several in a row, so that no sample finds its weights in the cache.
    const copies = Math.max(1, Math.floor(weights.bytes / (2 * k * nOut)));
    return {
      name: `${nOut} × ${k}`,
      weights: copies * k * nOut,
      passes: copies,
      issue(rows) {
        for (let i = 0; i < copies; i++) {
          dense.add(
            linear(i * k * nOut, nOut, k, true),
            epilogue.store,
            input.address,
            k,
            out.address,
            nOut,
            rows,
          );
          dense.run();
        }
      },
    };
  });
  const layersChained: Case = {
    name: `${o.layers} layers of Llama-3.1-8B${o.logits ? " and logits" : ""}`,
    weights: most,
    passes: 1,
    issue(rows) {
      let at = 0;
      const add = (
        nOut: number,
        k: number,
        kind: number,
        [from, to, width, norm]: [number, number, number, boolean],
      ): void => {
        dense.add(linear(at, nOut, k, norm), kind, from, k, to, width, rows);
        at += nOut * k;
      };
      stream.memset(x, 0); // the residual starts anew: what is added does not grow from sample to sample
      for (let layer = 0; layer < o.layers; layer++) {
        add(hidden, hidden, epilogue.add, [input.address, x.address, hidden, false]);
        add(2 * intermediate, hidden, epilogue.swiglu, [x.address, mlp.address, intermediate, true]);
        add(hidden, intermediate, epilogue.add, [mlp.address, x.address, hidden, false]);
        add(qkvWidth, hidden, epilogue.store, [x.address, wide.address, qkvWidth, true]);
        if (layer + 1 < o.layers) dense.run();
      }
      if (o.logits) add(vocab, hidden, epilogue.store, [x.address, out.address, vocab, true]);
      dense.run();
    },
  };
  return [...alone, layersChained];
}
