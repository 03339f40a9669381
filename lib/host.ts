/// <reference lib="esnext.disposable" preserve="true" />
// The host orchestration: TypeScript looks at flags and miss lists at each layer and decides. Any recall path.
import {
  FKV_CORRECT_EXACT,
  FKV_CORRECT_THRESHOLD,
  FKV_NEXT,
  FKV_NOW,
  FKV_SPECULATE_LAZY,
  FKV_SPECULATE_NEXT,
} from "../ffi/constants.ts";
import type { Decoder } from "./decoder.ts";
import type { Event } from "./device.ts";
import type { Lane } from "./lane.ts";
import type { Stages } from "./layer.ts";
import { decodeStep } from "./model.ts";
import type { InFlight } from "./recall.ts";
import { select } from "./select.ts";

/** A row as the host orchestration needs it: its lane, and whether this step's token completes a page. */
export interface HostRow {
  readonly lane: Lane;
  readonly completesPage: boolean;
}

export class HostOrchestration implements Disposable, Stages {
  readonly #d: Decoder;
  readonly #attended: Event[];
  readonly #speculations: (InFlight | null)[];
  readonly #branch: Event;
  #rows: readonly (HostRow | null)[] = [];
  #lanes: readonly (Lane | null)[] = [];

  constructor(decoder: Decoder) {
    this.#d = decoder;
    this.#attended = Array.from({ length: decoder.network.config.layers }, () => decoder.device.event());
    this.#speculations = this.#attended.map(() => null);
    this.#branch = decoder.device.event();
  }

  /** Issues one step. */
  step(rows: readonly (HostRow | null)[]): void {
    this.#rows = rows;
    this.#lanes = rows.map((row) => row?.lane ?? null);
    this.#d.waits.next();
    decodeStep(this.#d, this, rows.length);
  }

  /** Compute waits for the recalls that still run beside it: before a sequence is made or changed. */
  quiesce(): void {
    for (let layer = 0; layer < this.#speculations.length; layer++) this.awaitSpeculation(layer);
  }

  /** Nothing is kept of a step but what quiesce() ends. */
  forget(): void {}

  prepare(layer: number): void {
    const { network, act, cache, compute, device } = this.#d;
    network.rope(act, layer, cache.positions.address, this.#rows.length, compute);
    device.lib.fkv_append(cache.packed, act.qkv, layer, this.#rows.length, compute.handle);
  }

  awaitSpeculation(layer: number): void {
    const { compute, recall, waits } = this.#d;
    recall.progress();
    const speculation = this.#speculations[layer];
    if (!speculation) return;
    this.#speculations[layer] = null;
    const event = speculation.event();
    this.#stalled(() => waits.on(compute, event, "attend-after-speculation", 1));
  }

  check(layer: number): void {
    if (this.#any((lane) => lane.plan.k > 0))
      this.#d.check.run(this.#d.act.qkv, layer, this.#rows.length, this.#d.compute);
  }

  correct(layer: number): void {
    const { check, compute, device, cache, act, recall, waits } = this.#d;
    const rows = this.#rows.length;
    const always = this.#any(
      (l) =>
        l.plan.k > 0 &&
        (l.plan.correction === FKV_CORRECT_EXACT || l.plan.speculation === FKV_SPECULATE_LAZY),
    );
    if (!always && !this.#any((l) => l.plan.correction === FKV_CORRECT_THRESHOLD)) return;
    this.#stalled(() => {
      if (!always && !check.anyFlagged(layer, rows, compute)) return;
      select(device, cache, cache.now, act.qkv, layer, FKV_NOW, rows, compute);
      const recalled = recall.start(cache.now, layer, this.#lanes, compute);
      waits.on(compute, recalled.event(), "attend-after-correction");
    });
  }

  speculate(layer: number): void {
    const { act, cache, compute, device, digestKind, recall, side, waits } = this.#d;
    const rows = this.#rows.length;
    const speculates = this.#any((lane) => lane.plan.speculation === FKV_SPECULATE_NEXT);
    const finishes = this.#rows.some((row) => row?.completesPage);
    if (!speculates && !finishes) return;
    const attended = this.#attended[layer] as Event;
    waits.record(compute, attended);
    waits.on(side, attended, "speculate-after-attend");
    if (speculates) {
      select(device, cache, cache.next, act.qkv, layer, FKV_NEXT, rows, side);
      this.#speculations[layer] = recall.start(cache.next, layer, this.#lanes, side);
    }
    if (finishes) device.lib.fkv_page_finish(cache.packed, digestKind, layer, rows, side.handle);
  }

  join(): void {
    const { compute, side, waits } = this.#d;
    waits.record(side, this.#branch);
    this.#stalled(() => waits.on(compute, this.#branch, "step-after-branch"));
  }

  /** Counts the time that compute spends in what `work` issues. */
  #stalled(work: () => void): void {
    const { cache, compute, device } = this.#d;
    device.lib.fkv_clock_start(cache.stallMark.address, compute.handle);
    work();
    device.lib.fkv_clock_stop(cache.stall.address, cache.stallMark.address, compute.handle);
  }

  #any(test: (lane: Lane) => boolean): boolean {
    return this.#lanes.some((lane) => lane !== null && test(lane));
  }

  [Symbol.dispose](): void {
    for (const event of [...this.#attended, this.#branch]) event[Symbol.dispose]();
  }
}
