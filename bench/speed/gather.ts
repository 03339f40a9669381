/// <reference lib="esnext.disposable" preserve="true" />
// How fast scattered head pages come from the host: fkv_recall_gather by itself, on miss lists made here.

import { Event, pack, size, write } from "../../lib/device.ts";
import { rowOf } from "../../lib/row.ts";
import type { State } from "../../lib/state.ts";
import type { Rig } from "./rig.ts";

const samples = 24;
const warmups = 2;

/** As many lists a launch as there are lanes and KV heads, of `pages` pages together, from these blocks. */
export interface GatherCase {
  readonly pages: number;
  readonly blocks: readonly number[];
}

/** Bytes a second, a sample each. A sample is one graph of a launch a layer, each of which brings other pages. */
export function gatherRates(rig: Rig, states: readonly State[], { pages, blocks }: GatherCase): number[] {
  using owned = new DisposableStack();
  const { cache, decoder, device, geometry: g } = rig.core;
  const { compute } = decoder;
  const slots = (states[0] as State).lane.plan.slots;
  const lanes = Math.max(1, Math.ceil(pages / (g.kvHeads * slots)));
  const each = Math.floor(pages / (lanes * g.kvHeads));
  if (lanes > states.length) throw new Error(`${pages} pages need ${lanes} sequences`);
  const chosen = states.slice(0, lanes);
  loadRows(rig, chosen);

  const lists = owned.use(device.pinned(size.fkv_miss * lanes * g.kvHeads * each));
  const counts = owned.use(device.pinned(4 * lanes * g.kvHeads));
  counts.view(Int32Array).fill(each);
  const view = new DataView(lists.buffer);
  const { next } = cache;
  const width = cache.slots * size.fkv_miss;
  let drawn = 1;
  const draw = (n: number): number => {
    drawn = (Math.imul(drawn, 1_664_525) + 1_013_904_223) >>> 0;
    return Math.floor((drawn / 2 ** 32) * n);
  };
  const scatter = (): void => {
    for (let i = 0; i < lanes * g.kvHeads * each; i++)
      write.fkv_miss(view, i * size.fkv_miss, {
        page: 0,
        slot: i % each,
        block: blocks[draw(blocks.length)] as number,
        frame: -1,
      });
  };
  using graph = compute.capture(() => {
    for (let layer = 0; layer < g.layers; layer++)
      device.lib.fkv_recall_gather(cache.packed, next.packed, layer, lanes, compute.handle);
  });
  using from = device.event();
  using to = device.event();
  const ms: number[] = [];
  for (let sample = 0; sample < warmups + samples; sample++) {
    scatter(); // pages that no cache has seen
    compute.copy(next.nMisses, counts, counts.bytes);
    for (let list = 0; list < lanes * g.kvHeads; list++) {
      const entries = lists.address + list * each * size.fkv_miss;
      compute.copy(next.misses.address + list * width, entries, each * size.fkv_miss);
    }
    compute.record(from);
    compute.launch(graph);
    compute.record(to);
    to.synchronize(); // the lists are written anew for the next sample
    if (sample >= warmups) ms.push(Event.elapsedMs(from, to));
  }
  compute.memset(next.nMisses, 0);
  const bytes = g.layers * lanes * g.kvHeads * each * g.headPageBytes;
  return ms.map((each) => bytes / (each / 1e3));
}

/** The control of a step of these sequences, each at its next position, without a ring. */
export function loadRows(rig: Rig, states: readonly State[]): void {
  const { cache, decoder, device } = rig.core;
  const rows = new ArrayBuffer(size.fkv_row * states.length);
  for (const [i, state] of states.entries()) {
    const page = Math.floor(state.length / rig.core.geometry.pageSize);
    const row = rowOf(state.lane, { position: state.length, token: 0, block: state.blocks[page] ?? -1 });
    pack.fkv_row(row, { into: rows, at: i * size.fkv_row });
  }
  decoder.compute.write(cache.first, new Uint8Array(rows));
  const { address } = cache.first;
  const { handle } = decoder.compute;
  device.lib.fkv_control_load(cache.packed, address, cache.zeroStep.address, 1, states.length, handle);
}
