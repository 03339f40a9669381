/// <reference lib="esnext.disposable" preserve="true" />
// Staged recall, the paper's: one copy per head page into staging buffers that are swapped, and a kernel that converts one to
// the device layout while the other fills. Source: FreeKV (hybrid layouts, double-buffered streamed recall).
import { pack, size } from "../ffi/structs.ts";
import type { Cache } from "./cache.ts";
import type { Device, DeviceBuffer, Event, Stream } from "./device.ts";
import { ListedRecall, type Miss } from "./recall-listed.ts";
import type { Waits } from "./waits.ts";

const capacity = 64; // head pages a buffer: 1 MiB at 16 KiB, and entries that fit one fkv_write_async

interface StagingBuffer {
  pages: DeviceBuffer;
  entries: DeviceBuffer;
  filled: Event;
  drained: Event;
  used: boolean;
}

export class StagedRecall extends ListedRecall {
  readonly #convert: Stream;
  readonly #buffers: StagingBuffer[];
  #turn = 0;

  constructor(device: Device, cache: Cache, waits: Waits, stagingBuffers: number) {
    super(device, cache, waits);
    this.#convert = device.stream();
    this.#buffers = Array.from({ length: stagingBuffers }, () => ({
      pages: device.alloc(capacity * cache.geometry.headPageBytes),
      entries: device.alloc(capacity * size.fkv_scatter_entry),
      filled: device.event(),
      drained: device.event(),
      used: false,
    }));
  }

  protected bring(misses: readonly Miss[], layer: number, done: Event): void {
    const { device } = this.cache.geometry;
    for (const m of misses)
      if (m.frame >= 0)
        this.copyHeadPage(
          this.copies,
          this.laneAddress(m.lane, layer, m.slotFrame, m.head),
          device,
          this.laneAddress(m.lane, layer, m.frame, m.head),
          device,
        );
    const fromHost = misses.filter((m) => m.frame < 0);
    for (let i = 0; i < fromHost.length; i += capacity) this.#batch(fromHost.slice(i, i + capacity), layer);
    // The conversions follow the copies; without any, `done` still has to follow the copies on the device.
    if (fromHost.length === 0) this.waits.record(this.copies, done);
    else this.waits.record(this.#convert, done);
  }

  #batch(batch: readonly Miss[], layer: number): void {
    const buffer = this.#buffers[this.#turn] as StagingBuffer;
    this.#turn = (this.#turn + 1) % this.#buffers.length;
    if (buffer.used) this.waits.on(this.copies, buffer.drained, "fill-after-drain", Number.POSITIVE_INFINITY);
    buffer.used = true;
    const { headPageBytes } = this.cache.geometry;
    const entries = new ArrayBuffer(batch.length * size.fkv_scatter_entry);
    for (const [i, m] of batch.entries()) {
      pack.fkv_scatter_entry(
        { lane: m.lane.index, head: m.head, slot: m.slot },
        { into: entries, at: i * size.fkv_scatter_entry },
      );
      this.copies.copy(
        buffer.pages.address + i * headPageBytes,
        this.hostAddress(m.block, layer, m.head),
        headPageBytes,
      );
    }
    this.copies.write(buffer.entries, new Uint8Array(entries));
    this.waits.record(this.copies, buffer.filled);
    this.waits.on(this.#convert, buffer.filled, "convert-after-fill");
    this.device.lib.fkv_recall_scatter(
      this.cache.packed,
      buffer.pages.address,
      buffer.entries.address,
      batch.length,
      layer,
      this.#convert.handle,
    );
    this.waits.record(this.#convert, buffer.drained);
  }

  override [Symbol.dispose](): void {
    for (const b of this.#buffers)
      for (const part of [b.pages, b.entries, b.filled, b.drained]) part[Symbol.dispose]();
    this.#convert[Symbol.dispose]();
    super[Symbol.dispose]();
  }
}
