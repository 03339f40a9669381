// Decode steps of the operations around attention, issued one by one or fused: RoPE, append, check, both retrievals, finish.

import type { DeviceBuffer } from "../../lib/device.ts";
import { FKV_NEXT, FKV_NOW, pack } from "../../lib/device.ts";
import { Random } from "./random.ts";
import { Rig, type RigOptions } from "./rig.ts";
import type { RigRow } from "./rows.ts";

export class Steps implements Disposable {
  readonly rig: Rig;
  /** Nanoseconds that fused retrievals before attention took. */
  readonly stall: DeviceBuffer;
  readonly #fused: boolean;
  readonly #inverseFrequencies: DeviceBuffer;
  readonly #queries: DeviceBuffer;
  readonly #random: Random;

  /** The same seed gives the same memory and the same queries. */
  constructor(options: RigOptions & { fused: boolean; seed: number }) {
    const rig = new Rig(options);
    this.rig = rig;
    this.#fused = options.fused;
    this.#random = new Random(options.seed);
    this.#inverseFrequencies = rig.device.alloc(4 * rig.headDim);
    rig.stream.write(
      this.#inverseFrequencies,
      Float64Array.from({ length: rig.headDim / 2 }, (_, i) => 10000 ** ((-2 * i) / rig.headDim)),
    );
    this.#queries = rig.device.alloc(rig.qkv.bytes);
    this.stall = rig.zeroed(16);
    rig.mapBlocks();
    rig.stream.copy(rig.digests, this.#finite(rig.digests.bytes));
    rig.pool.view(Uint8Array).set(this.#random.bytes(rig.pool.bytes));
    for (const { frames, qPrev, nFrames } of rig.tables) {
      rig.stream.copy(frames, this.#random.bytes(rig.layers * nFrames * rig.frameBytes));
      rig.stream.copy(qPrev, this.#random.normals(rig.layers * rig.kvHeads * rig.group * rig.headDim));
    }
    rig.stream.synchronize();
  }

  /** bf16 bytes: values of magnitude 1 to 2 whose "max" may lie below "min", which both paths treat alike. */
  #finite(bytes: number): Uint8Array {
    const random = this.#random;
    return Uint8Array.from({ length: bytes }, (_, i) =>
      i % 2 === 0 ? random.below(256) : random.next() < 0.5 ? 0x3f : 0xbf,
    );
  }

  /** What a step's layer is fed, before RoPE; near the last one. */
  feed(nRows: number): void {
    this.rig.stream.copy(this.#queries, this.#random.normals(nRows * this.rig.qkvWidth));
  }

  first(rows: readonly (RigRow | undefined)[]): void {
    const { rig } = this;
    rig.load(rows);
    for (let layer = 0; layer < rig.layers; layer++) {
      if (this.#fused) this.#retrieve("first", layer, rows.length);
      else this.#separate("first", layer, rows.length);
    }
  }

  /** One step; `feed` says whether new queries come or, as in a graph, those that lie there. */
  step(rows: readonly (RigRow | undefined)[]): void {
    this.rig.load(rows);
    for (let layer = 0; layer < this.rig.layers; layer++) {
      this.feed(rows.length);
      this.layer(layer, rows.length, rows);
    }
  }

  /** The operations of one layer; all of them read rows and lanes when they run. */
  layer(layer: number, n: number, rows: readonly (RigRow | undefined)[]): void {
    const { rig } = this;
    const { device, cache, stream } = rig;
    stream.copy(rig.qkv, this.#queries, 4 * n * rig.qkvWidth);
    if (this.#fused) this.#retrieve("now", layer, n);
    else {
      device.lib.fkv_rope(pack.fkv_rope_params(this.#rope(n)), stream.handle);
      device.lib.fkv_append(cache, rig.qkv.address, layer, n, stream.handle);
      rig.check(layer, n);
      this.#separate("now", layer, n);
    }
    for (const [row, at] of rows.entries()) if (at !== undefined) rig.keepQuery(row, at.lane, layer);
    if (this.#fused) this.#retrieve("next", layer, n);
    else {
      this.#separate("next", layer, n);
      device.lib.fkv_page_finish(cache, 0, layer, n, stream.handle);
    }
  }

  #separate(stage: "now" | "next" | "first", layer: number, n: number): void {
    this.rig.estimate(stage, layer, n);
    this.rig.select(stage, layer, n);
    this.rig.gather(stage, layer, n);
  }

  #rope(n: number): Parameters<typeof pack.fkv_rope_params>[0] {
    const { rig } = this;
    return {
      n_rows: n,
      n_q_heads: rig.group * rig.kvHeads,
      n_kv_heads: rig.kvHeads,
      head_dim: rig.headDim,
      dtype: 0,
      eps: 0,
      scale: 1,
      qkv: rig.qkv,
      positions: rig.positions,
      inv_freq: this.#inverseFrequencies,
      q_norm: null,
      k_norm: null,
    };
  }

  #retrieve(stage: "now" | "next" | "first", layer: number, n: number): void {
    const { rig } = this;
    const { scores, raw, nMisses, misses } = rig.workspaceOf(stage);
    const params = pack.fkv_retrieve_params({
      layer,
      stage: stage === "now" ? FKV_NOW : stage === "next" ? FKV_NEXT : 2,
      n_rows: n,
      prepare: stage === "now" ? 1 : 0,
      finish: stage === "next" ? 1 : 0,
      digest_kind: 0,
      workspace: { scores, raw, n_misses: nMisses, misses },
      qkv: rig.qkv,
      stall: this.stall,
      rope: stage === "now" ? this.#rope(n) : null,
    });
    rig.device.lib.fkv_retrieve(rig.cache, params, rig.stream.handle);
  }

  /** Everything that a step may have written, as bytes. */
  snapshot(n: number): Record<string, Uint8Array> {
    const { rig } = this;
    const out: Record<string, Uint8Array> = {
      qkv: rig.bytes(rig.qkv.address, 4 * n * rig.qkvWidth),
      flags: rig.bytes(rig.flags.address, rig.flags.bytes),
      digests: rig.bytes(rig.digests.address, rig.digests.bytes),
      pool: rig.pool.view(Uint8Array).slice(),
      counters: Uint8Array.from(rig.lanes.flatMap((_, row) => Object.values(rig.counters(row)))),
      missesNow: new TextEncoder().encode(JSON.stringify(rig.misses("now", n))),
      missesNext: new TextEncoder().encode(JSON.stringify(rig.misses("next", n))),
    };
    for (const [lane, tables] of rig.tables.entries()) {
      out[`frames ${lane}`] = rig.bytes(tables.frames, rig.layers * tables.nFrames * rig.frameBytes);
      for (const [name, table] of Object.entries(rig.state(lane))) {
        out[`${name} ${lane}`] = new Uint8Array(table.buffer, table.byteOffset, table.byteLength);
      }
    }
    return out;
  }

  [Symbol.dispose](): void {
    this.rig[Symbol.dispose]();
  }
}
