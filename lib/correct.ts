/// <reference lib="esnext.disposable" preserve="true" />
// Stage: which heads' queries changed too much for the speculated selection. Source: FreeKV (fine-grained correction).
import type { Cache } from "./cache.ts";
import type { Device, Event, PinnedBuffer, Stream } from "./device.ts";

export class Check implements Disposable {
  readonly #device: Device;
  readonly #cache: Cache;
  readonly #flags: PinnedBuffer;
  readonly #view: Uint8Array;
  readonly #copied: Event;

  constructor(device: Device, cache: Cache) {
    this.#device = device;
    this.#cache = cache;
    this.#flags = device.pinned(cache.maxRows * cache.geometry.kvHeads);
    this.#view = this.#flags.view(Uint8Array);
    this.#copied = device.event();
  }

  /** Compares each head's q with the one of the token before and stores the flags. */
  run(qkv: number, layer: number, rows: number, stream: Stream): void {
    this.#device.lib.fkv_check(this.#cache.packed, qkv, layer, rows, stream.handle);
  }

  /** Whether any head of this layer is flagged. Blocks until the device has answered: the cost of deciding on the host. */
  anyFlagged(layer: number, rows: number, stream: Stream): boolean {
    const perLayer = this.#cache.maxRows * this.#cache.geometry.kvHeads;
    const bytes = rows * this.#cache.geometry.kvHeads;
    stream.copy(this.#flags, this.#cache.flags.address + layer * perLayer, bytes);
    stream.record(this.#copied);
    this.#copied.synchronize();
    return this.#view.subarray(0, bytes).includes(1);
  }

  [Symbol.dispose](): void {
    this.#copied[Symbol.dispose]();
    this.#flags[Symbol.dispose]();
  }
}
