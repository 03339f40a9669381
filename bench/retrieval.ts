/// <reference lib="esnext.disposable" preserve="true" />
// Select and recall at 32K tokens, with a new query each time: the three operations, and all of them as one.

import { Device, Event, FKV_NOW, pack, read, size } from "../lib/device.ts";
import type { BenchOptions, Floors } from "./bench.ts";
import { Layer8b, qkvWidth, randomF32, shape } from "./layer8b.ts";
import { spread, sum } from "./measure.ts";
import { rated } from "./rate.ts";
import type { Row } from "./table.ts";

const tokens = 32_768;
const samples = 24;
const warmups = 2;

export function retrieval(floors: Floors, { say }: BenchOptions): Row[] {
  say("select and recall");
  using owned = new DisposableStack();
  const device = owned.use(Device.open({ device: "cpu", threads: floors.threads }));
  const at = owned.use(new Layer8b(device, { layers: 1, tokens, slots: 64 }));
  const { cache, stream } = at;
  at.selectFirst();

  const queries = owned.use(device.alloc(4 * qkvWidth * (warmups + samples)));
  stream.copy(queries, randomF32(qkvWidth * (warmups + samples)));
  const counters = owned.use(device.pinned(size.fkv_counters));
  const counted = new DataView(counters.buffer);
  const { counters: countersAt } = read.fkv_cache(new DataView(cache.packed), 0);
  const marks = Array.from({ length: 4 }, () => owned.use(device.event())) as [Event, Event, Event, Event];

  const times = {
    estimate: [] as number[],
    select: [] as number[],
    recall: [] as number[],
    fused: [] as number[],
  };
  const pages = { recall: [] as number[], fused: [] as number[] };
  for (let i = 0; i < warmups + samples; i++) {
    // The position stays: no page joins the candidates, so that one sample is like another.
    at.load(tokens - 1);
    const qkv = queries.address + 4 * qkvWidth * i;
    device.lib.fkv_check(cache.packed, qkv, 0, 1, stream.handle);
    const fused = i % 2 === 1;
    stream.record(marks[0]);
    if (fused) {
      const stage = { layer: 0, stage: FKV_NOW, n_rows: 1, prepare: 0, finish: 0, digest_kind: 0 };
      const rest = { workspace: cache.now.fields, qkv, stall: 0, rope: null };
      device.lib.fkv_retrieve(cache.packed, pack.fkv_retrieve_params({ ...stage, ...rest }), stream.handle);
    } else {
      device.lib.fkv_estimate(cache.packed, cache.now.packed, qkv, 0, FKV_NOW, 1, stream.handle);
      stream.record(marks[1]);
      device.lib.fkv_select(cache.packed, cache.now.packed, 0, FKV_NOW, 1, stream.handle);
      stream.record(marks[2]);
      device.lib.fkv_recall_gather(cache.packed, cache.now.packed, 0, 1, stream.handle);
    }
    stream.record(marks[3]);
    stream.copy(counters, countersAt, size.fkv_counters);
    stream.synchronize();
    if (i < warmups) continue;
    const recalled = read.fkv_counters(counted, 0).misses_now;
    if (fused) {
      times.fused.push(Event.elapsedMs(marks[0], marks[3]));
      pages.fused.push(recalled);
    } else {
      times.estimate.push(Event.elapsedMs(marks[0], marks[1]));
      times.select.push(Event.elapsedMs(marks[1], marks[2]));
      times.recall.push(Event.elapsedMs(marks[2], marks[3]));
      pages.recall.push(recalled);
    }
  }

  const { plan } = at.lane;
  const candidates = tokens / shape.pageSize - plan.windowPages - plan.sinkPages;
  const digestBytes = candidates * at.geometry.digestBytes;
  const n = spread(pages.recall).median;
  if (sum(pages.recall) + sum(pages.fused) === 0)
    throw new Error("no page was recalled: nothing was measured");
  const recall = `recall of ${n} of ${plan.k * shape.kvHeads} head pages`;
  return [
    rated(
      { name: `estimate of ${candidates} pages`, floor: "read", amount: digestBytes },
      floors,
      times.estimate,
    ),
    rated({ name: `select ${plan.k} of them, slots`, floor: null, amount: 0 }, floors, times.select),
    rated({ name: recall, floor: "copy", amount: n * at.geometry.headPageBytes }, floors, times.recall),
    rated({ name: "the three as one: fkv_retrieve", floor: null, amount: 0 }, floors, times.fused),
  ];
}
