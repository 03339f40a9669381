/// <reference lib="esnext.disposable" preserve="true" />
// Stage: bring the missed head pages from the host into their slots. Three paths behind one interface.
import type { Cache, Workspace } from "./cache.ts";
import type { Device, Event, Stream } from "./device.ts";
import type { Lane } from "./lane.ts";
import type { Waits } from "./waits.ts";

/** A recall under way. */
export interface InFlight {
  /** The event after which every page is in its slot; issues whatever has not been issued. */
  event(): Event;
}

/** What a recall needs to know of a step: the lanes of its rows, in row order. */
export type Lanes = readonly (Lane | null)[];

export interface Recall extends Disposable {
  /** Brings what `select` listed in `workspace` for this layer, after what `on` has been given so far. */
  start(workspace: Workspace, layer: number, lanes: Lanes, on: Stream): InFlight;
  /** Issues the copies of earlier recalls whose miss lists have arrived. */
  progress(): void;
}

/** The default: a kernel reads head pages straight from pinned memory by the device's own miss list. */
export class GatherRecall implements Recall {
  readonly #device: Device;
  readonly #cache: Cache;
  readonly #waits: Waits;
  readonly #done = new Map<Workspace, Event[]>();

  constructor(device: Device, cache: Cache, waits: Waits) {
    this.#device = device;
    this.#waits = waits;
    this.#cache = cache;
    for (const workspace of [cache.now, cache.next])
      this.#done.set(
        workspace,
        Array.from({ length: cache.geometry.layers }, () => device.event()),
      );
  }

  start(workspace: Workspace, layer: number, lanes: Lanes, on: Stream): InFlight {
    this.#device.lib.fkv_recall_gather(this.#cache.packed, workspace.packed, layer, lanes.length, on.handle);
    const done = this.#done.get(workspace)?.[layer] as Event;
    this.#waits.record(on, done);
    return { event: () => done };
  }

  progress(): void {}

  [Symbol.dispose](): void {
    for (const events of this.#done.values()) for (const event of events) event[Symbol.dispose]();
  }
}
