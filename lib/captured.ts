/// <reference lib="esnext.disposable" preserve="true" />
// The captured orchestration: TypeScript issues the stages once, under capture; each token replays one graph. The device
// reads lengths, flags and miss lists itself. Three launches a layer beside the dense chain.
import { FKV_NEXT, FKV_NOW } from "../ffi/constants.ts";
import { pack } from "../ffi/structs.ts";
import type { Workspace } from "./cache.ts";
import type { Decoder } from "./decoder.ts";
import type { Event, Graph } from "./device.ts";
import type { Stages } from "./layer.ts";
import { decodeStep } from "./model.ts";

export class CapturedOrchestration implements Disposable, Stages {
  readonly #d: Decoder;
  readonly #attended: Event[];
  readonly #branch: Event;
  readonly #graphs = new Map<number, Graph>();
  #rows = 0;

  constructor(decoder: Decoder) {
    this.#d = decoder;
    this.#attended = Array.from({ length: decoder.network.config.layers }, () => decoder.device.event());
    this.#branch = decoder.device.event();
  }

  /** Issues one step: replays the graph of its bucket, which the first step of that size captures. */
  step(rows: readonly unknown[]): void {
    const { compute, waits } = this.#d;
    let graph = this.#graphs.get(rows.length);
    if (!graph) {
      this.#rows = rows.length;
      waits.next();
      graph = compute.capture(() => decodeStep(this.#d, this, rows.length));
      this.#graphs.set(rows.length, graph);
    }
    compute.launch(graph);
  }

  /** A graph ends with its branch joined: nothing runs beside compute between steps. */
  quiesce(): void {}

  /** Memory of the cache was replaced: the next step of each bucket captures anew. */
  forget(): void {
    for (const graph of this.#graphs.values()) graph[Symbol.dispose]();
    this.#graphs.clear();
  }

  // One launch: QK-norm, RoPE, append, check, then the retrieval of flagged heads; see correct().
  prepare(): void {}
  check(): void {}
  // The step before has joined its branch.
  awaitSpeculation(): void {}

  correct(layer: number): void {
    this.#retrieve(layer, FKV_NOW, this.#d.cache.now, {
      prepare: 1,
      finish: 0,
      stall: this.#d.cache.stall.address,
    });
  }

  speculate(layer: number): void {
    const { compute, side, waits } = this.#d;
    const attended = this.#attended[layer] as Event;
    waits.record(compute, attended);
    waits.on(side, attended, "speculate-after-attend");
    this.#retrieve(layer, FKV_NEXT, this.#d.cache.next, { prepare: 0, finish: 1, stall: 0 });
  }

  join(): void {
    const { cache, compute, device, side, waits } = this.#d;
    waits.record(side, this.#branch);
    device.lib.fkv_clock_start(cache.stallMark.address, compute.handle);
    waits.on(compute, this.#branch, "step-after-branch");
    device.lib.fkv_clock_stop(cache.stall.address, cache.stallMark.address, compute.handle);
  }

  #retrieve(
    layer: number,
    stage: number,
    workspace: Workspace,
    o: { prepare: number; finish: number; stall: number },
  ): void {
    const { act, cache, compute, device, digestKind, network, side } = this.#d;
    const params = pack.fkv_retrieve_params({
      layer,
      stage,
      n_rows: this.#rows,
      ...o,
      digest_kind: digestKind,
      workspace: workspace.fields,
      qkv: act.qkv,
      rope: network.ropeFields(act, layer, cache.positions.address, this.#rows),
    });
    device.lib.fkv_retrieve(cache.packed, params, (stage === FKV_NOW ? compute : side).handle);
  }

  [Symbol.dispose](): void {
    this.forget();
    for (const event of [...this.#attended, this.#branch]) event[Symbol.dispose]();
  }
}
