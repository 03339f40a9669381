/// <reference lib="esnext.disposable" preserve="true" />
// Attention: a decode step over the budget, and a chunk of a prompt over everything before it.

import { FKV_FAST } from "../ffi/constants.ts";
import { Device, pack } from "../lib/device.ts";
import type { BenchOptions, Floors } from "./bench.ts";
import { Layer8b, qkvWidth, randomF32, shape } from "./layer8b.ts";
import { deviceMs } from "./measure.ts";
import { rated } from "./rate.ts";
import type { Row } from "./table.ts";

const { heads, headDim } = shape;

export function attention(floors: Floors, options: BenchOptions): Row[] {
  return [decode(floors, options), prefill(floors, options)];
}

/** 2048 tokens a head through the slot tables; every layer has its own pages, 268 MB in all, so that none is in a cache. */
function decode(floors: Floors, { say }: BenchOptions): Row {
  say("decode attention");
  using owned = new DisposableStack();
  const device = owned.use(Device.open({ device: "cpu", threads: floors.threads }));
  const budget = 2048;
  const layers = 32;
  // A context of exactly the budget: what is neither sink nor window is selected.
  const at = owned.use(new Layer8b(device, { layers, tokens: budget, slots: 32 }));
  at.selectFirst();
  at.load(budget - 1);
  const qkv = owned.use(device.alloc(4 * qkvWidth));
  const out = owned.use(device.alloc(4 * heads * headDim));
  at.stream.copy(qkv, randomF32(qkvWidth));
  const { packed } = at.cache;
  const ms = deviceMs(device, at.stream, { atLeast: 5, budgetMs: 1500 }, () => {
    for (let layer = 0; layer < layers; layer++)
      device.lib.fkv_attend(out.address, packed, qkv.address, layer, 1, at.stream.handle);
  });
  const bytes = (budget / shape.pageSize) * at.geometry.frameBytes;
  return rated(
    { name: `decode attention, ${budget} tokens a head`, floor: "read", amount: bytes },
    floors,
    ms.map((each) => each / layers),
  );
}

function prefill(floors: Floors, { say }: BenchOptions): Row {
  say("prefill attention");
  using owned = new DisposableStack();
  const device = owned.use(Device.open({ device: "cpu", threads: floors.threads }));
  const tokens = 8192;
  const n = 256;
  const start = tokens - n;
  const at = owned.use(new Layer8b(device, { layers: 1, tokens, slots: 32 }));
  const qkv = owned.use(device.alloc(4 * n * qkvWidth));
  const out = owned.use(device.alloc(4 * n * heads * headDim));
  at.stream.copy(qkv, randomF32(n * qkvWidth));
  const frames = at.cache.deviceFrames(at.pages.address, tokens / shape.pageSize);
  const params = pack.fkv_prefill_params({ layer: 0, start, n, family: FKV_FAST, qkv, out, frames });
  const ms = deviceMs(device, at.stream, { atLeast: 3, budgetMs: 2000 }, () =>
    device.lib.fkv_prefill_attend(at.cache.packed, params, at.stream.handle),
  );
  // q·K and p·V, two operations each; token i of the chunk sees start + i + 1 keys.
  const keys = n * start + (n * (n + 1)) / 2;
  return rated(
    {
      name: `prefill attention, ${n} tokens after ${start}`,
      floor: "fma",
      amount: 4 * headDim * heads * keys,
    },
    floors,
    ms,
  );
}
