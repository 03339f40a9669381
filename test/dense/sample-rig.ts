/// <reference lib="esnext.disposable" preserve="true" />
// A batch of lanes with logits on the twin: control rows in, results out.

import type { Read, Values } from "../../ffi/structs.ts";
import {
  type DeviceBuffer,
  type Graph,
  offsets,
  type PinnedBuffer,
  pack,
  read,
  size,
} from "../../lib/device.ts";
import { DenseRig } from "./rig.ts";

export interface SampleRow {
  /** Absent in every row: the lanes' own are sampled. */
  logits?: readonly number[];
  sequence: number;
  seed?: number;
  position?: number;
  target?: number;
  temperature?: number;
  topK?: number;
  topP?: number;
  nTop?: number;
}

export class SampleRig extends DenseRig {
  readonly vocab: number;
  readonly maxRows: number;
  readonly ring: number;
  readonly #lanes: DeviceBuffer;
  readonly #laneLogits: DeviceBuffer[];
  readonly #rows: DeviceBuffer;
  readonly #counters: DeviceBuffer;
  readonly #sampled: DeviceBuffer;
  readonly #logits: DeviceBuffer;
  readonly #scratch: DeviceBuffer;
  readonly #step: DeviceBuffer;
  readonly #stall: DeviceBuffer;
  readonly #results: PinnedBuffer;

  constructor(options: { vocab: number; maxRows: number; ring?: number }) {
    super();
    this.vocab = options.vocab;
    this.maxRows = options.maxRows;
    this.ring = options.ring ?? 4;
    const { maxRows, vocab, ring } = this;
    this.#laneLogits = Array.from({ length: maxRows }, () => this.alloc(4 * vocab));
    const lanes = new Uint8Array(maxRows * size.fkv_lane);
    for (const [i, logits] of this.#laneLogits.entries()) {
      new DataView(lanes.buffer).setBigUint64(
        i * size.fkv_lane + offsets.fkv_lane.logits,
        BigInt(logits.address),
        true,
      );
    }
    this.#lanes = this.upload(lanes);
    this.#rows = this.upload(new Uint8Array(maxRows * size.fkv_row));
    this.#counters = this.upload(new Uint8Array(maxRows * size.fkv_counters));
    this.#sampled = this.upload(new Int32Array(maxRows).fill(-1));
    this.#logits = this.alloc(4 * maxRows * vocab);
    this.#scratch = this.upload(new Uint8Array(8 * maxRows * vocab + 64));
    this.#step = this.upload(new Uint32Array(1));
    this.#stall = this.upload(new BigUint64Array(1));
    this.#results = this.device.pinned(ring * maxRows * size.fkv_result);
  }

  /** The call itself, with changes to its structs. */
  call(changes: {
    rows?: number;
    lanesOwn?: boolean;
    cache?: Partial<Values<"fkv_cache">>;
    params?: Partial<Values<"fkv_sample_params">>;
    structBytes?: number;
  }): void {
    const strides = {
      base: 0,
      chunks: null,
      layer: 1024,
      frame: 1024,
      head: 1024,
      kv: 512,
      row: 16,
      shift: 0,
    };
    const cache = pack.fkv_cache({
      dtype: 1,
      n_layers: 1,
      n_q_heads: 1,
      n_kv_heads: 1,
      head_dim: 8,
      page_size: 32,
      max_rows: this.maxRows,
      max_pages: 1,
      max_slots: 1,
      pooling: 0,
      score_scale: 1,
      attention_scale: 1,
      frame_bytes: 1024,
      device: strides,
      host: null,
      digests: null,
      lanes: this.#lanes,
      sampled: this.#sampled,
      block_table: null,
      rows: this.#rows,
      tokens: null,
      positions: null,
      flags: null,
      counters: this.#counters,
      forced: null,
      attend_scratch: null,
      ...changes.cache,
    });
    const params = pack.fkv_sample_params({
      n_rows: changes.rows ?? 1,
      vocab: this.vocab,
      ring_entries: this.ring,
      logits: changes.lanesOwn ? null : this.#logits,
      results: this.#results,
      step: this.#step,
      stall: this.#stall,
      scratch: this.#scratch,
      ...changes.params,
    });
    if (changes.structBytes !== undefined) new DataView(params).setUint32(0, changes.structBytes, true);
    this.device.call("fkv_sample", cache, params, this.stream.handle);
  }

  capture(rows: number): Graph {
    this.stream.synchronize();
    return this.stream.capture(() => this.call({ rows }));
  }

  /** One step over these rows (by a graph that was captured for as many): the results of those that are not empty. */
  sample(rows: readonly SampleRow[], graph?: Graph): (Read<"fkv_result"> | undefined)[] {
    const control = new Uint8Array(rows.length * size.fkv_row);
    for (const [i, row] of rows.entries()) {
      const values = {
        seed: row.seed ?? 0,
        sequence: row.sequence,
        position: row.position ?? 0,
        token: 0,
        target: row.target ?? -1,
        block: -1,
        correction: 0,
        speculation: 0,
        prefetch: 0,
        top_k: row.topK ?? 0,
        n_top: row.nTop ?? 0,
        temperature: row.temperature ?? 0,
        top_p: row.topP ?? 1,
      };
      pack.fkv_row(values, { into: control.buffer, at: i * size.fkv_row });
    }
    this.stream.copy(this.#rows, control);
    const given = rows.some((row) => row.logits !== undefined);
    if (given) this.stream.copy(this.#logits, Float32Array.from(rows.flatMap((row) => row.logits ?? [])));
    const entry = this.step() % this.ring;
    if (graph) this.stream.launch(graph);
    else this.call({ rows: rows.length, lanesOwn: !given });
    this.stream.synchronize();
    return rows.map((row, i) => {
      if (row.sequence < 0) return undefined;
      return read.fkv_result(new DataView(this.resultBytes(entry, i).buffer), 0);
    });
  }

  resultBytes(entry: number, row: number): Uint8Array<ArrayBuffer> {
    const at = (entry * this.maxRows + row) * size.fkv_result;
    return new Uint8Array(this.#results.buffer.slice(at, at + size.fkv_result));
  }
  fillResults(byte: number): void {
    this.#results.view(Uint8Array).fill(byte);
  }
  step(): number {
    return new Uint32Array(this.download(this.#step))[0] as number;
  }
  sampled(lane: number): number {
    return new Int32Array(this.download(this.#sampled))[lane] as number;
  }
  laneLogits(lane: number): Float32Array {
    return this.floats(this.#laneLogits[lane] as DeviceBuffer);
  }
  setStall(ns: number): void {
    this.stream.copy(this.#stall, BigUint64Array.of(BigInt(ns)));
  }
  setCounters(row: number, counters: Values<"fkv_counters">): void {
    this.stream.copy(
      this.#counters.address + row * size.fkv_counters,
      new Uint8Array(pack.fkv_counters(counters)),
    );
  }
}
