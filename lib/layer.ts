// One layer of a decode step: the seven lines of FreeKV, in their order.
import type { Decoder } from "./decoder.ts";

/** The stages between the dense phases, decided by TypeScript at each layer (host) or on the device (captured). */
export interface Stages {
  /** QK-norm, RoPE; K and V of the token into the window. */
  prepare(layer: number): void;
  /** Attention may not run before what the last step recalled for this layer is there. */
  awaitSpeculation(layer: number): void;
  /** Flags the heads whose query turned away from the last one. */
  check(layer: number): void;
  /** Flagged heads select with this step's query and recall what they miss, before attention. */
  correct(layer: number): void;
  /** The others select for the next step and recall beside the rest of this one; a completed page goes to the host. */
  speculate(layer: number): void;
  /** What selects beside the step reads its control and adds to its counts: it ends before the step does. */
  join(): void;
}

export function decodeLayer(d: Decoder, stages: Stages, layer: number, rows: number): void {
  d.network.qkv(d.dense, d.act, layer, rows);
  d.dense.run();
  stages.prepare(layer);
  stages.awaitSpeculation(layer);
  stages.check(layer);
  stages.correct(layer);
  attend(d, layer, rows);
  stages.speculate(layer);
  d.network.project(d.dense, d.act, layer, rows);
}

/** Sink, window and selected pages of each head; then q becomes the last token's q. */
function attend(d: Decoder, layer: number, rows: number): void {
  d.device.lib.fkv_attend(d.act.attended, d.cache.packed, d.act.qkv, layer, rows, d.compute.handle);
}
