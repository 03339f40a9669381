// One decode step, top to bottom: control → embedding → layers → logits → sampled tokens.
import { pack } from "../ffi/structs.ts";
import { ringEntries } from "./cache.ts";
import type { Decoder } from "./decoder.ts";
import { decodeLayer, type Stages } from "./layer.ts";

/** Issues a step of `rows` rows whose control is the ring's entry of this step. */
export function decodeStep(d: Decoder, stages: Stages, rows: number): void {
  loadControl(d, rows);
  d.network.embed(d.act, d.cache.tokens.address, rows, d.compute);
  for (let layer = 0; layer < d.network.config.layers; layer++) decodeLayer(d, stages, layer, rows);
  d.network.logits(d.dense, d.act.x, d.logits, rows);
  d.dense.run();
  stages.join();
  sample(d, d.logits, rows);
}

/** Issues what precedes a generation: its first token, from the logits that its lane holds. */
export function sampleFirst(d: Decoder, rows: number): void {
  loadControl(d, rows);
  sample(d, 0, rows);
}

function loadControl(d: Decoder, rows: number): void {
  const { cache } = d;
  d.device.lib.fkv_control_load(
    cache.packed,
    cache.control.address,
    cache.step.address,
    ringEntries,
    rows,
    d.compute.handle,
  );
}

function sample(d: Decoder, logits: number, rows: number): void {
  const { cache } = d;
  const params = pack.fkv_sample_params({
    n_rows: rows,
    vocab: d.network.config.vocab,
    ring_entries: ringEntries,
    logits,
    results: cache.results.address,
    step: cache.step.address,
    stall: cache.stall.address,
    scratch: cache.sampleScratch.address,
  });
  d.device.lib.fkv_sample(cache.packed, params, d.compute.handle);
}
