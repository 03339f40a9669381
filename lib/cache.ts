/// <reference lib="esnext.disposable" preserve="true" />
// The device state that all sequences of an engine share: tables, control ring, results ring, workspaces.
import { pack, size } from "../ffi/structs.ts";
import type { Device, DeviceBuffer, PinnedBuffer } from "./device.ts";
import { dtypeCode, type Geometry, type Strides } from "./geometry.ts";
import type { HostPool } from "./pages.ts";

/** Control entries in flight: the host writes entry s only after it has seen step s − ring complete. */
export const ringEntries = 4;

export interface CacheOptions {
  maxRows: number;
  maxLanes: number;
  vocab: number;
  pooling: number;
  scoreScale: number;
  /** Address of an `fkv_forced`; none: selections are as they are. */
  forced?: number;
}

/** Fields of `fkv_frames`. */
export interface Frames extends Strides {
  readonly base: number;
  readonly chunks: number;
  readonly shift: number;
}

/** Memory of one retrieval in flight. */
export interface Workspace {
  readonly packed: ArrayBuffer;
  readonly fields: { scores: number; n_misses: number; misses: number };
  readonly nMisses: DeviceBuffer;
  readonly misses: DeviceBuffer;
  /** Misses a head can list. */
  readonly width: number;
}

export class Cache implements Disposable {
  readonly geometry: Geometry;
  readonly pool: HostPool;
  readonly maxRows: number;
  /** `fkv_cache`, as every stage takes it. */
  readonly packed: ArrayBuffer;
  readonly now: Workspace;
  readonly next: Workspace;
  readonly lanes: DeviceBuffer;
  readonly blockTable: DeviceBuffer;
  readonly tokens: DeviceBuffer;
  readonly positions: DeviceBuffer;
  readonly flags: DeviceBuffer;
  readonly step: DeviceBuffer;
  /** Pinned rings: the control of a step, and what it tells. */
  readonly control: PinnedBuffer;
  readonly results: PinnedBuffer;
  /** A one-entry ring on the device for the selection that precedes a sequence's first step. */
  readonly first: DeviceBuffer;
  readonly zeroStep: DeviceBuffer;
  /** Pinned, a lane: what that selection counted. */
  readonly firstCounts: PinnedBuffer;
  readonly counters: DeviceBuffer;
  /** Nanoseconds that attention waited, in all, and where a wait began. */
  readonly stall: DeviceBuffer;
  readonly stallMark: DeviceBuffer;
  readonly sampleScratch: DeviceBuffer;
  readonly #owned: Disposable[] = [];

  constructor(device: Device, geometry: Geometry, pool: HostPool, o: CacheOptions) {
    this.geometry = geometry;
    this.pool = pool;
    this.maxRows = o.maxRows;
    const own = <T extends Disposable>(buffer: T): T => {
      this.#owned.push(buffer);
      return buffer;
    };
    const alloc = (bytes: number): DeviceBuffer => own(device.alloc(bytes));
    const { maxRows } = o;
    const g = geometry;
    // The largest first: what does not fit is refused before anything is touched.
    const workspace = (): Workspace => {
      const width = g.maxPages;
      const misses = alloc(size.fkv_miss * maxRows * g.kvHeads * width);
      const nMisses = alloc(4 * maxRows * g.kvHeads);
      const scores = alloc(4 * maxRows * g.kvHeads * g.maxPages);
      const fields = { scores: scores.address, n_misses: nMisses.address, misses: misses.address };
      return { packed: pack.fkv_workspace(fields), fields, nMisses, misses, width };
    };
    this.now = workspace();
    this.next = workspace();
    this.lanes = alloc(o.maxLanes * size.fkv_lane);
    this.blockTable = alloc(4 * o.maxLanes * g.maxPages);
    this.tokens = alloc(4 * maxRows);
    this.positions = alloc(4 * maxRows);
    this.flags = alloc(g.layers * maxRows * g.kvHeads);
    this.step = alloc(4);
    this.zeroStep = alloc(4);
    this.stall = alloc(8);
    this.stallMark = alloc(8);
    this.first = alloc(maxRows * size.fkv_row);
    this.counters = alloc(maxRows * size.fkv_counters);
    this.firstCounts = own(device.pinned(o.maxLanes * size.fkv_counters));
    this.sampleScratch = alloc(8 * o.vocab * maxRows);
    this.control = own(device.pinned(ringEntries * maxRows * size.fkv_row));
    this.results = own(device.pinned(ringEntries * maxRows * size.fkv_result));
    const strides = { base: 0, chunks: 0, shift: 0 };
    this.packed = pack.fkv_cache({
      dtype: dtypeCode[g.dtype],
      n_layers: g.layers,
      n_q_heads: g.heads,
      n_kv_heads: g.kvHeads,
      head_dim: g.headDim,
      page_size: g.pageSize,
      max_rows: maxRows,
      max_pages: g.maxPages,
      max_slots: this.now.width,
      pooling: o.pooling,
      score_scale: o.scoreScale,
      attention_scale: 1 / Math.sqrt(g.headDim),
      frame_bytes: g.frameBytes,
      device: { ...strides, ...g.device },
      host: this.hostFrames,
      digests: { ...strides, ...g.digests, chunks: pool.digestTable.address, shift: pool.shift },
      lanes: this.lanes.address,
      sampled: alloc(4 * o.maxLanes).address,
      block_table: this.blockTable.address,
      rows: alloc(maxRows * size.fkv_row).address,
      tokens: this.tokens.address,
      positions: this.positions.address,
      flags: this.flags.address,
      counters: this.counters.address,
      forced: o.forced ?? 0,
    });
    using stream = device.stream();
    for (const zeroed of [this.step, this.zeroStep, this.stall, this.flags, this.blockTable])
      stream.memset(zeroed, 0, zeroed.bytes);
    stream.synchronize();
  }

  /** The host pool as frames: page index = block id. */
  get hostFrames(): Frames {
    return { base: 0, chunks: this.pool.hostTable.address, shift: this.pool.shift, ...this.geometry.host };
  }

  /** Device memory at `base`, `frames` pages a layer, as frames. */
  deviceFrames(base: number, frames: number): Frames {
    return { base, chunks: 0, shift: 0, ...this.geometry.device, layer: frames * this.geometry.frameBytes };
  }

  [Symbol.dispose](): void {
    for (const buffer of this.#owned) buffer[Symbol.dispose]();
  }
}
