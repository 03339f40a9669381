/// <reference lib="esnext.disposable" preserve="true" />
// The device state of one sequence: frames for sink, window and slots (or for every page), the slot tables, the selection,
// q of the token before, the logits after the last one. One allocation; only its size depends on the policy.
import { pack, size } from "../ffi/structs.ts";
import type { Cache } from "./cache.ts";
import type { Device, DeviceBuffer, Stream } from "./device.ts";
import type { Frames } from "./geometry.ts";
import type { Plan } from "./plan.ts";

const aligned = (bytes: number): number => Math.ceil(bytes / 256) * 256;

/** Device memory that is kept for a next use, of each kind. */
export const keptBytes: number = 64 * 2 ** 20;

/** What depends on a length is rounded up to eighths of a power of two, so that lanes of like length fit each other's memory. */
const sizeClass = (bytes: number): number => {
  const step = 2 ** Math.max(8, Math.floor(Math.log2(bytes)) - 3);
  return Math.ceil(bytes / step) * step;
};

/**
 * Device buffers of lanes that ended, kept for the next: reuse is safe at once, since every use is ordered on one stream,
 * while giving memory back makes the device finish its work first.
 */
export class LaneMemory implements Disposable {
  readonly #device: Device;
  readonly #free: DeviceBuffer[] = [];
  constructor(device: Device) {
    this.#device = device;
  }
  take(bytes: number, plan: Plan): DeviceBuffer {
    const size = plan.resident ? sizeClass(bytes) : bytes;
    const index = this.#free.findIndex((b) => b.bytes === size);
    if (index >= 0) return this.#free.splice(index, 1)[0] as DeviceBuffer;
    try {
      return this.#device.alloc(size);
    } catch (error) {
      if (this.#free.length === 0) throw error;
      this[Symbol.dispose]();
      return this.#device.alloc(size);
    }
  }
  give(buffer: DeviceBuffer): void {
    this.#free.push(buffer);
    while (this.#free.reduce((n, b) => n + b.bytes, 0) > keptBytes) this.#free.shift()?.[Symbol.dispose]();
  }
  [Symbol.dispose](): void {
    for (const b of this.#free.splice(0)) b[Symbol.dispose]();
  }
}

export class Lane {
  readonly #packed: Uint8Array;
  readonly index: number;
  readonly plan: Plan;
  readonly nFrames: number;
  readonly memory: DeviceBuffer;
  /** Address of the frames. */
  readonly frames: number;
  readonly qPrev: number;
  readonly logits: number;
  /** Bytes of K and V frames. */
  readonly frameBytes: number;

  /** Takes memory and, in stream order, empties it. `pages` is how many pages a resident lane has room for. */
  constructor(
    cache: Cache,
    memory: LaneMemory,
    index: number,
    plan: Plan,
    tau: number | readonly number[],
    pages: number,
    vocab: number,
    stream: Stream,
  ) {
    const g = cache.geometry;
    const heads = g.layers * g.kvHeads;
    this.index = index;
    this.plan = plan;
    this.nFrames = plan.resident ? pages : plan.sinkPages + plan.windowPages + 1 + plan.slots;
    this.frameBytes = g.layers * this.nFrames * g.frameBytes;
    let total = 0;
    const part = (bytes: number): number => {
      const offset = total;
      total += aligned(bytes);
      return offset;
    };
    const frames = part(this.frameBytes);
    const qPrev = part(4 * g.layers * g.heads * g.headDim);
    const logits = part(4 * vocab);
    const taus = part(4 * g.layers);
    const slotPage = part(4 * heads * plan.slots);
    const slotUsed = part(4 * heads * plan.slots);
    const nSelected = part(4 * heads);
    const selectedPage = part(4 * heads * plan.k);
    const selectedSlot = part(4 * heads * plan.k);
    this.memory = memory.take(total, plan);
    const at = this.memory.address;
    this.frames = at + frames;
    this.qPrev = at + qPrev;
    this.logits = at + logits;
    if (plan.slots) stream.memset(at + slotPage, 0xff, 4 * heads * plan.slots);
    if (plan.slots) stream.memset(at + slotUsed, 0, 4 * heads * plan.slots);
    stream.memset(at + nSelected, 0, 4 * heads);
    stream.write(
      at + taus,
      Float32Array.from({ length: g.layers }, (_, l) => (typeof tau === "number" ? tau : (tau[l] as number))),
    );
    this.#packed = new Uint8Array(
      pack.fkv_lane({
        frames: this.frames,
        q_prev: this.qPrev,
        logits: this.logits,
        tau: at + taus,
        slot_page: at + slotPage,
        slot_used: at + slotUsed,
        n_selected: at + nSelected,
        selected_page: at + selectedPage,
        selected_slot: at + selectedSlot,
        n_frames: this.nFrames,
        sink_pages: plan.sinkPages,
        window_pages: plan.windowPages,
        k: plan.k,
        n_slots: plan.slots,
        resident: plan.resident ? 1 : 0,
        attend_all: plan.attendAll ? 1 : 0,
      }),
    );
  }

  /** From here on, in stream order, the lane index means this state and these blocks. */
  install(cache: Cache, blocks: readonly number[], stream: Stream): void {
    stream.write(cache.lanes.address + this.index * size.fkv_lane, this.#packed);
    const piece = 768; // int32 in one fkv_write_async
    for (let i = 0; i < blocks.length; i += piece)
      stream.write(
        cache.blockTable.address + 4 * (this.index * cache.geometry.maxPages + i),
        Int32Array.from(blocks.slice(i, i + piece)),
      );
  }

  /** Frame of a page that sink, window or residence holds. */
  frameOf(page: number): number {
    const { plan } = this;
    if (plan.resident || page < plan.sinkPages) return page;
    return plan.sinkPages + (page % (plan.windowPages + 1));
  }

  /** Those pages as frames of this lane. */
  pages(cache: Cache, pages: readonly number[]): { frames: Frames; pages: number[] } {
    return {
      frames: cache.deviceFrames(this.frames, this.nFrames),
      pages: pages.map((p) => this.frameOf(p)),
    };
  }

  /** Complete and partial pages that the lane holds beside its slots, at `length` tokens. */
  pagesHeld(length: number, pageSize: number): number[] {
    const { plan } = this;
    const end = Math.ceil(length / pageSize);
    const window = plan.resident
      ? 0
      : Math.max(plan.sinkPages, Math.floor(length / pageSize) - plan.windowPages);
    const pages: number[] = [];
    for (let p = 0; p < end; p++) if (p < plan.sinkPages || p >= window) pages.push(p);
    return pages;
  }
}
