/// <reference lib="esnext.disposable" preserve="true" />
// A small cache on the twin, with every table in reach of a test: lanes, host pool in chunks, digests, workspaces.

import type { Dtype } from "../../lib/checkpoint.ts";
import {
  type DeviceBuffer,
  FKV_FIRST,
  FKV_NEXT,
  FKV_NOW,
  type PinnedBuffer,
  pack,
  size,
} from "../../lib/device.ts";
import { dtypeCode } from "../../lib/geometry.ts";
import type { Counts, Stage } from "../reference/retrieval.ts";
import { frameOf, headPageOf, type PageLayout, stridesOf } from "./images.ts";
import { type LaneTables, laneTables, packLane, type RigLane } from "./lane.ts";
import { Memory, type MemoryOptions } from "./memory.ts";
import { packRow, type RigRow } from "./rows.ts";

export const stages: Record<Stage, number> = { now: FKV_NOW, next: FKV_NEXT, first: FKV_FIRST };
export interface RigOptions extends MemoryOptions {
  lanes: RigLane[];
  layers?: number;
  kvHeads?: number;
  group?: number;
  headDim?: number;
  pageSize?: number;
  maxPages?: number;
  maxRows?: number;
  dtype?: Dtype;
  pooling?: "softmax" | "raw";
  deviceLayout?: PageLayout;
  hostLayout?: PageLayout;
  scoreScale?: number;
}

/** [layers][kvHeads] of each table, flat. */
export interface LaneState {
  nSelected: Int32Array;
  selectedPage: Int32Array;
  selectedSlot: Int32Array;
  slotPage: Int32Array;
  slotUsed: Int32Array;
}
export interface MissEntry {
  page: number;
  slot: number;
  block: number;
  frame: number;
}
export interface Workspace {
  readonly packed: ArrayBuffer;
  readonly scores: number;
  readonly raw: number;
  readonly nMisses: number;
  readonly misses: number;
}
export interface RowCounters extends Omit<Counts, "misses"> {
  heads: number;
  flagged: number;
  missesNow: number;
  missesNext: number;
}

const chunkShift = 2;

export class Rig extends Memory {
  readonly lanes: RigLane[];
  readonly layers: number;
  readonly kvHeads: number;
  readonly group: number;
  readonly headDim: number;
  readonly pageSize: number;
  readonly maxPages: number;
  readonly maxRows: number;
  readonly maxSlots: number;
  readonly dtype: Dtype;
  readonly elementBytes: number;
  readonly headPageBytes: number;
  readonly frameBytes: number;
  readonly cache: ArrayBuffer;
  readonly tables: LaneTables[] = [];
  readonly now: Workspace;
  readonly next: Workspace;
  readonly qkv: DeviceBuffer;
  readonly digests: DeviceBuffer;
  readonly flags: DeviceBuffer;
  readonly positions: DeviceBuffer;
  readonly tokens: DeviceBuffer;
  readonly sampled: DeviceBuffer;
  readonly blockTable: DeviceBuffer;
  readonly #counters: DeviceBuffer;
  readonly #lanes: DeviceBuffer;
  readonly ring: PinnedBuffer;
  readonly ringEntries = 3;
  readonly step: DeviceBuffer;
  readonly pool: PinnedBuffer;
  readonly deviceLayout: PageLayout;
  readonly hostLayout: PageLayout;
  steps = 0;

  constructor(options: RigOptions) {
    super(options);
    const { lanes, maxPages = 32, maxRows = lanes.length, dtype = "f32" } = options;
    this.lanes = lanes;
    this.layers = options.layers ?? 2;
    this.kvHeads = options.kvHeads ?? 2;
    this.group = options.group ?? 2;
    this.headDim = options.headDim ?? 16;
    this.pageSize = options.pageSize ?? 16;
    this.maxPages = maxPages;
    this.maxRows = maxRows;
    this.maxSlots = Math.max(1, ...lanes.map((lane) => lane.slots));
    this.deviceLayout = options.deviceLayout ?? "nhd";
    this.hostLayout = options.hostLayout ?? "hnd";
    this.dtype = dtype;
    this.elementBytes = dtype === "f32" ? 4 : 2;
    this.headPageBytes = 2 * this.pageSize * this.headDim * this.elementBytes;
    this.frameBytes = this.kvHeads * this.headPageBytes;

    const heads = this.layers * this.kvHeads;
    const qHeads = this.kvHeads * this.group;
    this.qkv = this.device.alloc(4 * maxRows * this.qkvWidth);
    this.#lanes = this.device.alloc(size.fkv_lane * lanes.length);
    this.sampled = this.zeroed(4 * lanes.length);
    this.blockTable = this.device.alloc(4 * lanes.length * maxPages);
    this.stream.memset(this.blockTable, 0xff);
    this.flags = this.zeroed(this.layers * maxRows * this.kvHeads);
    this.#counters = this.zeroed(size.fkv_counters * maxRows);
    this.positions = this.device.alloc(4 * maxRows);
    this.tokens = this.device.alloc(4 * maxRows);
    this.ring = this.device.pinned(size.fkv_row * maxRows * this.ringEntries);
    this.step = this.device.alloc(4);

    const blocks = lanes.length * maxPages;
    const blockBytes = this.layers * this.frameBytes;
    this.pool = this.device.pinned(blocks * blockBytes);
    const chunks = this.device.alloc(8 * Math.ceil(blocks / 2 ** chunkShift));
    const chunkAt = (_: unknown, i: number): bigint =>
      BigInt(this.pool.address + i * 2 ** chunkShift * blockBytes);
    this.stream.copy(chunks, BigUint64Array.from({ length: chunks.bytes / 8 }, chunkAt));
    const digestBytes = 2 * this.headDim * this.elementBytes;
    this.digests = this.device.alloc(blocks * heads * digestBytes);

    for (const [i, lane] of lanes.entries()) {
      const tables = laneTables(this, lane);
      this.tables.push(tables);
      const packed = packLane(this, lane, tables);
      this.stream.write(this.#lanes.address + i * size.fkv_lane, packed);
    }
    const pitches = { base: 0, chunks: null, layer: 0, frame: this.frameBytes, shift: 0 };
    this.cache = pack.fkv_cache({
      dtype: dtypeCode[dtype],
      n_layers: this.layers,
      n_q_heads: qHeads,
      n_kv_heads: this.kvHeads,
      head_dim: this.headDim,
      page_size: this.pageSize,
      max_rows: maxRows,
      max_pages: maxPages,
      max_slots: this.maxSlots,
      pooling: options.pooling === "raw" ? 1 : 0,
      score_scale: options.scoreScale ?? 1 / Math.sqrt(this.headDim),
      attention_scale: 1 / Math.sqrt(this.headDim),
      frame_bytes: this.frameBytes,
      device: { ...pitches, ...stridesOf(this, this.deviceLayout) },
      host: {
        ...stridesOf(this, this.hostLayout),
        base: 0,
        chunks,
        layer: this.frameBytes,
        frame: blockBytes,
        shift: chunkShift,
      },
      digests: {
        base: this.digests.address,
        chunks: null,
        layer: this.kvHeads * digestBytes,
        frame: heads * digestBytes,
        head: digestBytes,
        kv: digestBytes / 2,
        row: 0,
        shift: 0,
      },
      lanes: this.#lanes,
      sampled: this.sampled,
      block_table: this.blockTable,
      rows: this.device.alloc(size.fkv_row * maxRows),
      tokens: this.tokens,
      positions: this.positions,
      flags: this.flags,
      counters: this.#counters,
      forced: null,
      attend_scratch: null,
    });
    this.now = this.#workspace();
    this.next = this.#workspace();
    this.stream.synchronize();
  }

  get qkvWidth(): number {
    return (this.group + 2) * this.kvHeads * this.headDim;
  }

  #workspace(): Workspace {
    const heads = this.maxRows * this.kvHeads;
    const scores = this.device.alloc(4 * heads * this.maxPages).address;
    const nMisses = this.device.alloc(4 * heads).address;
    const misses = this.device.alloc(size.fkv_miss * heads * this.maxSlots).address;
    const raw = this.device.alloc(4 * heads * this.group * this.maxPages).address;
    const packed = pack.fkv_workspace({ scores, raw, n_misses: nMisses, misses });
    return { packed, scores, raw, nMisses, misses };
  }

  blockOf(lane: number, page: number): number {
    return this.lanes.length * page + lane; // neighbours of a sequence are none in the pool
  }

  /** Every page's block, so that steps need not bring them. */
  mapBlocks(): void {
    const table = Int32Array.from({ length: this.lanes.length * this.maxPages }, (_, i) =>
      this.blockOf(Math.floor(i / this.maxPages), i % this.maxPages),
    );
    this.stream.copy(this.blockTable, table);
  }

  /** Writes the ring's entry of the next step and loads it. undefined is an empty row. */
  load(rows: readonly (RigRow | undefined)[]): void {
    this.stream.synchronize(); // an entry is written again only when the step that reads it is done
    const entry = (this.steps % this.ringEntries) * this.maxRows;
    for (const [i, row] of rows.entries()) this.writeRow(entry + i, row);
    this.stream.write(this.step, Uint32Array.of(this.steps++));
    this.loadRing(rows.length);
  }
  loadRing(nRows: number): void {
    const { device, cache, ring, step, ringEntries, stream } = this;
    device.lib.fkv_control_load(cache, ring.address, step.address, ringEntries, nRows, stream.handle);
  }
  writeRow(index: number, row: RigRow | undefined): void {
    packRow(this.ring.buffer, index * size.fkv_row, row);
  }

  check(layer: number, nRows: number): void {
    this.device.lib.fkv_check(this.cache, this.qkv.address, layer, nRows, this.stream.handle);
  }
  estimate(stage: Stage, layer: number, nRows: number): void {
    const { packed } = this.workspaceOf(stage);
    const { cache, qkv, stream } = this;
    this.device.lib.fkv_estimate(cache, packed, qkv.address, layer, stages[stage], nRows, stream.handle);
  }
  select(stage: Stage, layer: number, nRows: number): void {
    const { packed } = this.workspaceOf(stage);
    this.device.lib.fkv_select(this.cache, packed, layer, stages[stage], nRows, this.stream.handle);
  }
  gather(stage: Stage, layer: number, nRows: number): void {
    const { packed } = this.workspaceOf(stage);
    this.device.lib.fkv_recall_gather(this.cache, packed, layer, nRows, this.stream.handle);
  }
  workspaceOf(stage: Stage): Workspace {
    return stage === "now" ? this.now : this.next;
  }

  /** q of a row becomes q of the token before, as attention leaves it. */
  keepQuery(row: number, lane: number, layer: number): void {
    const bytes = 4 * this.group * this.kvHeads * this.headDim;
    const to = (this.tables[lane] as LaneTables).qPrev + layer * bytes;
    this.stream.copy(to, this.qkv.address + 4 * row * this.qkvWidth, bytes);
  }

  state(lane: number): LaneState {
    const tables = this.tables[lane] as LaneTables;
    const { k, slots } = this.lanes[lane] as RigLane;
    const heads = this.layers * this.kvHeads;
    return {
      nSelected: this.ints(tables.nSelected, heads),
      selectedPage: this.ints(tables.selectedPage, heads * k),
      selectedSlot: this.ints(tables.selectedSlot, heads * k),
      slotPage: this.ints(tables.slotPage, heads * slots),
      slotUsed: this.ints(tables.slotUsed, heads * slots),
    };
  }

  /** [row][head] miss lists. */
  misses(stage: Stage, nRows: number): MissEntry[][][] {
    const { nMisses, misses } = this.workspaceOf(stage);
    const counts = this.ints(nMisses, nRows * this.kvHeads);
    const all = this.ints(misses, 4 * nRows * this.kvHeads * this.maxSlots);
    return Array.from({ length: nRows }, (_, row) =>
      Array.from({ length: this.kvHeads }, (_, head) => {
        const list = row * this.kvHeads + head;
        return Array.from({ length: counts[list] as number }, (_, i) => {
          const at = 4 * (list * this.maxSlots + i);
          const [page, slot, block, frame] = all.subarray(at, at + 4) as unknown as [
            number,
            number,
            number,
            number,
          ];
          return { page, slot, block, frame };
        });
      }),
    );
  }

  counters(row: number): RowCounters {
    const at = this.#counters.address + row * size.fkv_counters;
    const [heads, flagged, selected, hits, missesNow, missesNext, moved, prefetched] = this.ints(
      at,
      8,
    ) as unknown as [number, number, number, number, number, number, number, number];
    return { heads, flagged, selected, hits, missesNow, missesNext, moved, prefetched };
  }

  /** Frames of one layer of a lane, read once; then any head page of them. */
  frames(lane: number, layer: number): (frame: number, head: number) => Uint8Array {
    const tables = this.tables[lane] as LaneTables;
    const bytes = tables.nFrames * this.frameBytes;
    const all = this.bytes(tables.frames + layer * bytes, bytes);
    return (frame, head) => headPageOf(this, this.deviceLayout, all.subarray(frame * this.frameBytes), head);
  }
  hostPage(block: number, layer: number, head: number): Uint8Array {
    const at = (block * this.layers + layer) * this.frameBytes;
    return headPageOf(this, this.hostLayout, this.pool.view(Uint8Array, at, this.frameBytes), head);
  }
  /** [layer][head] head pages into a frame of a lane. */
  fillFrame(lane: number, frame: number, pages: readonly (readonly Uint8Array[])[]): void {
    const tables = this.tables[lane] as LaneTables;
    for (const [layer, heads] of pages.entries()) {
      const to = tables.frames + (layer * tables.nFrames + frame) * this.frameBytes;
      this.stream.copy(to, frameOf(this, this.deviceLayout, heads));
    }
  }
  /** Rubbish into a host block. The stream must be idle. */
  spoilBlock(block: number): void {
    const bytes = this.layers * this.frameBytes;
    this.pool.view(Uint8Array, block * bytes, bytes).fill(0x55);
  }
  /** [layer][head] head pages into a host block. The stream must be idle. */
  fillBlock(block: number, pages: readonly (readonly Uint8Array[])[]): void {
    for (const [layer, heads] of pages.entries()) {
      const at = (block * this.layers + layer) * this.frameBytes;
      this.pool.view(Uint8Array, at, this.frameBytes).set(frameOf(this, this.hostLayout, heads));
    }
  }
}
