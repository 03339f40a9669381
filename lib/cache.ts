/// <reference lib="esnext.disposable" preserve="true" />
// The device state that all sequences of an engine share: tables, control ring, results ring, workspaces.
import { offsets, pack, size } from "../ffi/structs.ts";
import type { Device, DeviceBuffer, PinnedBuffer } from "./device.ts";
import { dtypeCode, type Frames, type Geometry } from "./geometry.ts";
import { Owned } from "./owned.ts";
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

/** Memory of one retrieval in flight. `misses` is replaced where the lists become longer. */
export interface Workspace {
  readonly packed: ArrayBuffer;
  readonly fields: {
    readonly scores: number;
    readonly raw: number;
    readonly n_misses: number;
    misses: number;
  };
  readonly nMisses: DeviceBuffer;
  misses: DeviceBuffer;
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
  /** Nanoseconds that attention waited, in all (and the clock where a retrieval last ended), and where a wait began. */
  readonly stall: DeviceBuffer;
  readonly stallMark: DeviceBuffer;
  readonly sampleScratch: DeviceBuffer;
  readonly #device: Device;
  readonly #owned: Disposable[] = [];
  #slots = 1;

  constructor(device: Device, geometry: Geometry, pool: HostPool, o: CacheOptions) {
    this.#device = device;
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
      const misses = this.#missLists(1);
      const nMisses = alloc(4 * maxRows * g.kvHeads);
      const scores = alloc(4 * maxRows * g.kvHeads * g.maxPages);
      const raw = alloc((scores.bytes * g.heads) / g.kvHeads);
      const fields = {
        scores: scores.address,
        raw: raw.address,
        n_misses: nMisses.address,
        misses: misses.address,
      };
      return { packed: pack.fkv_workspace(fields), fields, nMisses, misses };
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
    this.stall = alloc(16);
    this.stallMark = alloc(8);
    this.first = alloc(maxRows * size.fkv_row);
    this.counters = alloc(maxRows * size.fkv_counters);
    this.firstCounts = own(device.pinned(o.maxLanes * size.fkv_counters));
    this.sampleScratch = alloc(8 * o.vocab * maxRows + 64);
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
      max_slots: this.#slots,
      pooling: o.pooling,
      score_scale: o.scoreScale,
      attention_scale: 1 / Math.sqrt(g.headDim),
      frame_bytes: g.frameBytes,
      device: { ...strides, ...g.device },
      host: this.hostFrames,
      digests: pool.digestFrames,
      lanes: this.lanes.address,
      sampled: alloc(4 * o.maxLanes).address,
      block_table: this.blockTable.address,
      rows: alloc(maxRows * size.fkv_row).address,
      tokens: this.tokens.address,
      positions: this.positions.address,
      flags: this.flags.address,
      counters: this.counters.address,
      forced: o.forced ?? 0,
      attend_scratch: 0,
    });
    const bytes = new BigUint64Array(1);
    device.lib.fkv_attend_scratch_bytes(bytes, this.packed);
    const scratch = alloc(Number(bytes[0]));
    new DataView(this.packed).setBigUint64(offsets.fkv_cache.attend_scratch, BigInt(scratch.address), true);
    using stream = device.stream();
    const zeros = [this.step, this.zeroStep, this.stall, this.flags, this.blockTable];
    for (const zeroed of [...zeros, this.sampleScratch, scratch]) stream.memset(zeroed, 0, zeroed.bytes);
    stream.synchronize();
  }

  /** The most misses that a head can list: lanes have at most so many slots. */
  get slots(): number {
    return this.#slots;
  }

  /** Makes the lists that long, where they are not. Waits for the device; what captured the old ones must not run again. */
  widen(slots: number): void {
    if (slots <= this.#slots) return;
    const workspaces = [this.now, this.next];
    using made = new Owned();
    const lists = workspaces.map(() => made.use(this.#missLists(slots)));
    made.move();
    for (const [i, workspace] of workspaces.entries()) {
      workspace.misses[Symbol.dispose]();
      workspace.misses = lists[i] as DeviceBuffer;
      workspace.fields.misses = workspace.misses.address;
      pack.fkv_workspace(workspace.fields, { into: workspace.packed, at: 0 });
    }
    this.#slots = slots;
    new DataView(this.packed).setInt32(offsets.fkv_cache.max_slots, slots, true);
  }

  #missLists(slots: number): DeviceBuffer {
    return this.#device.alloc(size.fkv_miss * this.maxRows * this.geometry.kvHeads * slots);
  }

  /** The host pool as frames: page index = block id. */
  get hostFrames(): Frames {
    return { base: this.pool.base, chunks: 0, shift: 0, ...this.geometry.host };
  }

  /** Device memory at `base`, `frames` pages a layer, as frames. */
  deviceFrames(base: number, frames: number): Frames {
    return { base, chunks: 0, shift: 0, ...this.geometry.device, layer: frames * this.geometry.frameBytes };
  }

  [Symbol.dispose](): void {
    for (const buffer of [...this.#owned, this.now.misses, this.next.misses]) buffer[Symbol.dispose]();
  }
}
