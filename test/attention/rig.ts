/// <reference lib="esnext.disposable" preserve="true" />
// A cache for tests of attention and pages: stories (K and V of every token) placed where a lane keeps them.
// Device memory starts as NaN, so whatever reads a page that was not placed shows.

import type { Values } from "../../ffi/structs.ts";
import type { Dtype } from "../../lib/checkpoint.ts";
import {
  type Device,
  type DeviceBuffer,
  type PinnedBuffer,
  pack,
  type Stream,
  size,
} from "../../lib/device.ts";
import { fromFloat32, toFloat32 } from "../../lib/float.ts";
import { dtypeCode } from "../../lib/geometry.ts";
import { attend, type View, visitedPages } from "../reference/attention.ts";
import { frameOf, type PageLayout, stridesOf } from "../retrieval/images.ts";
import type { Random } from "../retrieval/random.ts";
import { openTarget } from "../target.ts";

export interface RigOptions {
  group?: number;
  kvHeads?: number;
  headDim?: number;
  pageSize?: number;
  layers?: number;
  maxRows?: number;
  dtype?: Dtype;
  layout?: PageLayout;
  threads?: number;
  scheduleSeed?: number;
  linkBytesPerSecond?: number;
}

/** One page of a head's selection and the slot that holds it. */
export interface Selected {
  page: number;
  slot: number;
}
export interface LaneSpec extends View {
  resident?: boolean;
  nSlots?: number;
  /** [KV head] ascending pages; the same in every layer. */
  selected?: readonly (readonly Selected[])[];
}
export interface Row {
  lane: number;
  position: number;
  block?: number;
}

/** K and V of `tokens` tokens of every KV head, as stored: [kv][token][head][d] as float32, rounded to the dtype. */
export interface Story {
  readonly tokens: number;
  readonly kv: readonly [Float32Array, Float32Array];
}

export class Rig implements Disposable {
  readonly device: Device;
  readonly stream: Stream;
  readonly group: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly pageSize: number;
  readonly layers: number;
  readonly maxRows: number;
  readonly dtype: Dtype;
  readonly layout: PageLayout;
  readonly elementBytes: number;
  readonly frameBytes: number;
  readonly rows: DeviceBuffer;
  readonly lanes: {
    readonly frames: DeviceBuffer;
    readonly qPrev: DeviceBuffer;
    readonly nFrames: number;
    readonly spec: LaneSpec;
  }[] = [];
  readonly #lanes: DeviceBuffer;
  readonly #scratch: DeviceBuffer | null = null; // of fkv_attend
  readonly #kept: Disposable[] = []; // nothing a struct points to may be collected

  constructor(options: RigOptions = {}) {
    this.group = options.group ?? 2;
    this.kvHeads = options.kvHeads ?? 2;
    this.headDim = options.headDim ?? 16;
    this.pageSize = options.pageSize ?? 16;
    this.layers = options.layers ?? 1;
    this.maxRows = options.maxRows ?? 4;
    this.dtype = options.dtype ?? "f32";
    this.layout = options.layout ?? "hnd";
    this.elementBytes = this.dtype === "f32" ? 4 : 2;
    this.frameBytes = this.kvHeads * 2 * this.pageSize * this.headDim * this.elementBytes;
    const { threads, scheduleSeed, linkBytesPerSecond } = options;
    this.device = openTarget({ debug: true, threads, scheduleSeed, linkBytesPerSecond });
    this.stream = this.device.stream();
    this.rows = this.device.alloc(size.fkv_row * this.maxRows);
    this.#lanes = this.device.alloc(size.fkv_lane * 8);
    const bytes = new BigUint64Array(1);
    this.device.call("fkv_attend_scratch_bytes", bytes, this.cache());
    this.#scratch = this.upload(new Uint8Array(Number(bytes[0])));
  }

  get qHeads(): number {
    return this.group * this.kvHeads;
  }
  get qkvWidth(): number {
    return (this.qHeads + 2 * this.kvHeads) * this.headDim;
  }

  alloc(bytes: number): DeviceBuffer {
    const buffer = this.device.alloc(bytes);
    this.#kept.push(buffer);
    return buffer;
  }
  upload(data: ArrayBufferView): DeviceBuffer {
    const buffer = this.alloc(data.byteLength);
    this.stream.copy(buffer, data);
    return buffer;
  }
  pinned(bytes: number): PinnedBuffer {
    const buffer = this.device.pinned(bytes);
    this.#kept.push(buffer);
    return buffer;
  }
  /** Device memory, once everything issued has run. */
  download(
    memory: DeviceBuffer | number,
    bytes: number = (memory as DeviceBuffer).bytes,
  ): Uint8Array<ArrayBuffer> {
    using pinned = this.device.pinned(bytes);
    this.stream.copy(pinned, memory, bytes);
    this.stream.synchronize();
    return new Uint8Array(pinned.buffer.slice(0));
  }
  floats(memory: DeviceBuffer): Float32Array {
    return new Float32Array(this.download(memory).buffer);
  }

  /** The frames of one layer of a lane or a pool, page p at index p. */
  frames(
    base: DeviceBuffer | PinnedBuffer | number,
    layerBytes = 0,
    layout: PageLayout = this.layout,
  ): Values<"fkv_frames"> {
    const address = typeof base === "number" ? base : base.address;
    return {
      ...stridesOf(this, layout),
      base: address,
      chunks: null,
      layer: layerBytes,
      frame: this.frameBytes,
      shift: 0,
    };
  }

  cache(changes: Partial<Values<"fkv_cache">> = {}): ArrayBuffer {
    return pack.fkv_cache({
      dtype: dtypeCode[this.dtype],
      n_layers: this.layers,
      n_q_heads: this.qHeads,
      n_kv_heads: this.kvHeads,
      head_dim: this.headDim,
      page_size: this.pageSize,
      max_rows: this.maxRows,
      max_pages: 64,
      max_slots: 64,
      pooling: 0,
      score_scale: 1 / Math.sqrt(this.headDim),
      attention_scale: 1 / Math.sqrt(this.headDim),
      frame_bytes: this.frameBytes,
      device: this.frames(0),
      host: null,
      digests: null,
      lanes: this.#lanes,
      sampled: null,
      block_table: null,
      rows: this.rows,
      tokens: null,
      positions: null,
      flags: null,
      counters: null,
      forced: null,
      attend_scratch: this.#scratch,
      ...changes,
    });
  }

  story(random: Random, tokens: number): Story {
    const draw = (): Float32Array =>
      toFloat32(fromFloat32(random.normals(tokens * this.kvHeads * this.headDim), this.dtype), this.dtype);
    return { tokens, kv: [draw(), draw()] };
  }
  /** One token's K (kv 0) or V (1) of one head. */
  rowOf(story: Story, kv: number, token: number, head: number): Float32Array {
    const at = (token * this.kvHeads + head) * this.headDim;
    return (story.kv[kv] as Float32Array).subarray(at, at + this.headDim);
  }

  /** One page as a head page of stored bytes: K rows, then V rows; rows past the story are NaN. */
  headPage(story: Story, page: number, head: number): Uint8Array {
    const values = new Float32Array(2 * this.pageSize * this.headDim).fill(Number.NaN);
    for (let kv = 0; kv < 2; kv++) {
      for (let row = 0; row < this.pageSize && page * this.pageSize + row < story.tokens; row++) {
        values.set(
          this.rowOf(story, kv, page * this.pageSize + row, head),
          (kv * this.pageSize + row) * this.headDim,
        );
      }
    }
    return fromFloat32(values, this.dtype);
  }
  framePage(story: Story, page: number, layout: PageLayout = this.layout): Uint8Array {
    return frameOf(
      this,
      layout,
      Array.from({ length: this.kvHeads }, (_, head) => this.headPage(story, page, head)),
    );
  }

  frameIndex(spec: LaneSpec, page: number): number {
    if (spec.resident || spec.attendAll || page < spec.sinkPages) return page;
    return spec.sinkPages + (page % (spec.windowPages + 1));
  }

  /** A lane that holds, of `story`, what its spec keeps at the story's length; returns its index. */
  lane(spec: LaneSpec, story: Story): number {
    const { stream, pageSize } = this;
    const pages = Math.ceil(story.tokens / pageSize);
    const resident = spec.resident || spec.attendAll;
    const slots = spec.nSlots ?? 0;
    const nFrames = resident ? Math.max(1, pages) : spec.sinkPages + spec.windowPages + 1 + slots;
    const frames = this.alloc(this.layers * nFrames * this.frameBytes);
    const place = (frame: number, bytes: Uint8Array): void => {
      for (let layer = 0; layer < this.layers; layer++) {
        stream.copy(frames.address + (layer * nFrames + frame) * this.frameBytes, bytes);
      }
    };
    const kept = resident
      ? Array.from({ length: pages }, (_, page) => page)
      : visitedPages(spec, [], story.tokens - 1, pageSize);
    for (const page of kept) place(this.frameIndex(spec, page), this.framePage(story, page));

    const selected = spec.selected ?? Array.from({ length: this.kvHeads }, () => []);
    const k = Math.max(0, ...selected.map((list) => list.length));
    for (let slot = 0; slot < slots; slot++) {
      const images = selected.map((list, head) => {
        const entry = list.find((entry) => entry.slot === slot);
        return entry
          ? this.headPage(story, entry.page, head)
          : this.headPage({ ...story, tokens: 0 }, 0, head);
      });
      if (!resident) place(spec.sinkPages + spec.windowPages + 1 + slot, frameOf(this, this.layout, images));
    }
    const perLayer = <T>(of: (list: readonly Selected[]) => T[]): Int32Array =>
      Int32Array.from(Array.from({ length: this.layers }, () => selected.flatMap(of)).flat() as number[]);
    const padded = (list: readonly Selected[], of: (entry: Selected) => number): number[] =>
      Array.from({ length: k }, (_, i) => (list[i] ? of(list[i]) : -1));
    const tables = {
      n_selected: this.upload(perLayer((list) => [list.length])),
      selected_page: this.upload(
        k === 0 ? new Int32Array(1) : perLayer((list) => padded(list, (entry) => entry.page)),
      ),
      selected_slot: this.upload(
        k === 0 ? new Int32Array(1) : perLayer((list) => padded(list, (entry) => entry.slot)),
      ),
    };
    const qPrev = this.alloc(4 * this.layers * this.qHeads * this.headDim);
    const packed = pack.fkv_lane({
      frames: frames.address,
      q_prev: qPrev,
      logits: null,
      tau: null,
      slot_page: null,
      slot_used: null,
      ...tables,
      n_frames: nFrames,
      sink_pages: spec.sinkPages,
      window_pages: spec.windowPages,
      k,
      n_slots: slots,
      resident: resident ? 1 : 0,
      attend_all: spec.attendAll ? 1 : 0,
    });
    stream.write(this.#lanes.address + this.lanes.length * size.fkv_lane, packed);
    return this.lanes.push({ frames, qPrev, nFrames, spec }) - 1;
  }

  /** This step's rows; undefined is an empty one. */
  setRows(rows: readonly (Row | undefined)[]): void {
    for (const [i, row] of rows.entries()) {
      const packed = pack.fkv_row({
        seed: 0,
        sequence: row?.lane ?? -1,
        position: row?.position ?? 0,
        token: 0,
        target: -1,
        block: row?.block ?? -1,
        correction: 0,
        speculation: 0,
        prefetch: 0,
        top_k: 0,
        n_top: 0,
        temperature: 0,
        top_p: 1,
      });
      this.stream.write(this.rows.address + i * size.fkv_row, packed);
    }
  }

  /** fkv_attend for these rows with these queries, [row][qHeads·d]; returns [row][qHeads·d]. */
  attend(rows: readonly (Row | undefined)[], q: Float32Array, layer = 0): Float32Array {
    const width = this.qHeads * this.headDim;
    const qkv = new Float32Array(rows.length * this.qkvWidth).fill(Number.NaN); // nothing but q is read
    for (let r = 0; r < rows.length; r++) qkv.set(q.subarray(r * width, (r + 1) * width), r * this.qkvWidth);
    const out = this.alloc(4 * rows.length * width);
    this.setRows(rows);
    this.device.call(
      "fkv_attend",
      out.address,
      this.cache(),
      this.upload(qkv).address,
      layer,
      rows.length,
      this.stream.handle,
    );
    return this.floats(out);
  }

  /** What one row of `attend` should be, in float64. */
  expected(story: Story, spec: LaneSpec, position: number, q: Float32Array): number[] {
    const out: number[] = [];
    for (let h = 0; h < this.qHeads; h++) {
      const head = Math.floor(h / this.group);
      const selected = (spec.selected?.[head] ?? []).map((entry) => entry.page);
      const tokens = visitedPages(spec, selected, position, this.pageSize)
        .flatMap((page) => Array.from({ length: this.pageSize }, (_, row) => page * this.pageSize + row))
        .filter((token) => token <= position);
      const rows = (kv: number): Float32Array[] => tokens.map((token) => this.rowOf(story, kv, token, head));
      const query = q.subarray(h * this.headDim, (h + 1) * this.headDim);
      out.push(...attend(query, rows(0), rows(1), 1 / Math.sqrt(this.headDim)));
    }
    return out;
  }

  [Symbol.dispose](): void {
    this.device[Symbol.dispose]();
  }
}
