/// <reference lib="esnext.disposable" preserve="true" />
// What a step is made of: single launches in a graph of one a layer, and a step that grows from its dense part to the whole.

import { type Event, FKV_NEXT, FKV_NOW, pack, read, size } from "../../lib/device.ts";
import type { State } from "../../lib/state.ts";
import { randomF32 } from "../layer8b.ts";
import { deviceMs } from "../measure.ts";
import { loadRows } from "./gather.ts";
import { type Rig, tokenAt } from "./rig.ts";

/** What of a step is issued. */
export interface Parts {
  readonly dense?: boolean;
  /** fkv_retrieve before attention, with RoPE, append and check. */
  readonly now?: boolean;
  readonly attend?: boolean;
  /** fkv_retrieve beside the rest, with what finishes a page. */
  readonly next?: boolean;
  /** Control, embedding, logits, sampling. */
  readonly ends?: boolean;
}

export interface Launched {
  /** A sample each. */
  readonly ms: readonly number[];
  /** Of the last sample. */
  readonly counters: ReturnType<typeof read.fkv_counters>;
}

/** Times these parts of a step of `states`; each sample is one token further. */
export function launchParts(
  rig: Rig,
  states: readonly State[],
  parts: Parts,
  samples: number = rig.shape.steps / 2,
): Launched {
  using owned = new DisposableStack();
  const { cache, decoder: d, device, geometry: g, network } = rig.core;
  const { act, compute, dense, side } = d;
  const rows = states.length;
  const step = owned.use(device.alloc(256)); // sampling counts steps: not the engine's
  compute.memset(step, 0);
  // What no part computes is random: garbage could make x infinite, and then every head is flagged.
  const { hidden, heads, headDim } = network.config;
  compute.copy(act.x, randomF32(rows * hidden));
  compute.copy(act.attended, randomF32(rows * heads * headDim));
  compute.copy(act.qkv, randomF32(rows * network.qkvWidth));
  const attended = Array.from({ length: g.layers }, () => owned.use(device.event())) as Event[];
  const branch = owned.use(device.event());

  const retrieve = (layer: number, stage: number): void => {
    const now = stage === FKV_NOW;
    const params = pack.fkv_retrieve_params({
      ...{ layer, stage, n_rows: rows, prepare: now ? 1 : 0, finish: now ? 0 : 1, digest_kind: d.digestKind },
      workspace: (now ? cache.now : cache.next).fields,
      qkv: act.qkv,
      stall: now ? cache.stall.address : 0,
      rope: network.ropeFields(act, layer, cache.positions.address, rows),
    });
    device.lib.fkv_retrieve(cache.packed, params, (now ? compute : side).handle);
  };
  const issue = (): void => {
    if (parts.ends) network.embed(act, cache.tokens.address, rows, compute);
    for (let layer = 0; layer < g.layers; layer++) {
      if (parts.dense) {
        network.qkv(dense, act, layer, rows);
        dense.run();
      }
      if (parts.now) retrieve(layer, FKV_NOW);
      if (parts.attend)
        device.lib.fkv_attend(act.attended, cache.packed, act.qkv, layer, rows, compute.handle);
      if (parts.next) {
        compute.record(attended[layer] as Event);
        side.wait(attended[layer] as Event);
        retrieve(layer, FKV_NEXT);
      }
      if (parts.dense) network.project(dense, act, layer, rows);
    }
    if (parts.ends) network.logits(dense, act.x, d.logits, rows);
    dense.run();
    if (parts.next) {
      side.record(branch);
      compute.wait(branch);
    }
    if (parts.ends) sample(rig, rows, step.address);
  };
  const graph = owned.use(compute.capture(issue));
  const launch = (): void => compute.launch(graph);
  const sampling = { atLeast: samples, budgetMs: 0 };
  const ms = deviceMs(device, compute, sampling, launch, () => advance(rig, states));
  const counted = owned.use(device.pinned(size.fkv_counters));
  compute.copy(counted, read.fkv_cache(new DataView(cache.packed), 0).counters, size.fkv_counters);
  compute.synchronize();
  return { ms, counters: read.fkv_counters(new DataView(counted.buffer), 0) };
}

/** One token more in each sequence, and the control of the step that feeds it. */
function advance(rig: Rig, states: readonly State[]): void {
  for (const state of states) state.reserve();
  loadRows(rig, states);
  for (const state of states) state.ids.push(tokenAt(rig.shape, state.length));
}

function sample(rig: Rig, rows: number, step: number): void {
  const { cache, decoder: d, device, network } = rig.core;
  const params = pack.fkv_sample_params({
    ...{ n_rows: rows, vocab: network.config.vocab, ring_entries: 1, logits: d.logits, step },
    ...{ results: cache.results.address, stall: cache.stall.address, scratch: cache.sampleScratch.address },
  });
  device.lib.fkv_sample(cache.packed, params, d.compute.handle);
}
