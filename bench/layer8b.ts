/// <reference lib="esnext.disposable" preserve="true" />
// One sequence of Llama-3.1-8B's attention shape on a device, for benches of kernels: pages and digests of random values, no model.

import { Cache } from "../lib/cache.ts";
import { PageCopier, range } from "../lib/copier.ts";
import { type Device, type DeviceBuffer, FKV_FIRST, pack, type Stream } from "../lib/device.ts";
import { type Geometry, geometryOf } from "../lib/geometry.ts";
import { Lane, LaneMemory } from "../lib/lane.ts";
import { defaultPolicy, resolvePolicy } from "../lib/options.ts";
import { HostPool } from "../lib/pages.ts";
import { planOf } from "../lib/plan.ts";
import { GatherRecall } from "../lib/recall.ts";
import { rowOf } from "../lib/row.ts";
import { select } from "../lib/select.ts";
import { Waits } from "../lib/waits.ts";

/** A layer of Llama-3.1-8B. */
export const shape = {
  hidden: 4096,
  intermediate: 14_336,
  heads: 32,
  kvHeads: 8,
  headDim: 128,
  pageSize: 32,
} as const;
export const qkvWidth: number = (shape.heads + 2 * shape.kvHeads) * shape.headDim;

/** Random bits, the same each time: xorshift32. */
function randomBits(words: number): Uint32Array {
  let state = 0x9e3779b9;
  return Uint32Array.from({ length: words }, () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return state >>> 0;
  });
}

/** Pairs of bf16 values of magnitude 0.5 to 1, either sign. */
export function randomBf16(values: number): Uint32Array {
  return randomBits(values / 2).map((bits) => (bits & 0x807f807f) | 0x3f003f00);
}

/** Values between −1 and 1. */
export function randomF32(values: number): Float32Array {
  return Float32Array.from(randomBits(values), (bits) => bits / 2 ** 31 - 1);
}

export class Layer8b implements Disposable {
  readonly device: Device;
  readonly stream: Stream;
  readonly geometry: Geometry;
  readonly cache: Cache;
  readonly lane: Lane;
  readonly tokens: number;
  /** All pages of every layer on the device, page p at index p, as a prefill has them. */
  readonly pages: DeviceBuffer;
  readonly #recall: GatherRecall;
  readonly #owned: DisposableStack;

  /** `tokens` tokens at the default budget of 2048, of which `slots` pages a head are cached; `correction` is exact. */
  constructor(device: Device, o: { layers: number; tokens: number; slots: number }) {
    using owned = new DisposableStack();
    const g = geometryOf({
      ...shape,
      layers: o.layers,
      dtype: "bf16",
      maxContext: o.tokens + 1,
      layout: "hnd",
      hostLayout: "hnd",
    });
    const nPages = Math.floor(o.tokens / g.pageSize);
    this.device = device;
    this.tokens = o.tokens;
    this.geometry = g;
    this.stream = owned.use(device.stream());
    const pool = owned.use(new HostPool(device, g, (g.maxPages + 1) * g.blockBytes));
    const scoreScale = 1 / Math.sqrt(g.headDim);
    this.cache = owned.use(
      new Cache(device, g, pool, { maxRows: 1, maxLanes: 1, vocab: 1, pooling: 0, scoreScale }),
    );
    const blocks = pool.reserve(g.maxPages, this.stream);
    pool.awaitReady(blocks);

    this.pages = owned.use(device.alloc(o.layers * nPages * g.frameBytes));
    const layer = randomBf16((nPages * g.frameBytes) / 2);
    for (let i = 0; i < o.layers; i++)
      this.stream.copy(this.pages.address + i * nPages * g.frameBytes, layer);
    const made = { frames: this.cache.deviceFrames(this.pages.address, nPages), pages: range(0, nPages) };
    const kept = blocks.slice(0, nPages);
    const copier = owned.use(new PageCopier(device, this.cache));
    const all = { layers: o.layers };
    copier.copy(made, { frames: this.cache.hostFrames, pages: kept }, all, this.stream);
    copier.digest(made, kept, 0, all, this.stream);

    const policy = resolvePolicy(defaultPolicy, { correction: "exact" }, g.pageSize, o.layers);
    const plan = planOf(policy, g.pageSize, g.maxPages, o.slots);
    const memory = owned.use(new LaneMemory(device));
    this.lane = new Lane(this.cache, memory, 0, plan, 0.8, g.maxPages, 1, this.stream);
    owned.defer(() => memory.give(this.lane.memory));
    this.lane.install(this.cache, blocks, this.stream);
    const held = this.lane.pagesHeld(o.tokens, g.pageSize).filter((page) => page < nPages);
    copier.copy({ frames: made.frames, pages: held }, this.lane.pages(this.cache, held), all, this.stream);
    this.stream.copy(this.lane.qPrev, randomF32(o.layers * g.heads * g.headDim));
    this.#recall = owned.use(new GatherRecall(device, this.cache, new Waits()));
    this.stream.synchronize();
    this.#owned = owned.move();
  }

  /** The control of a step that feeds the token at `position`. */
  load(position: number): void {
    const { cache, lane, stream } = this;
    stream.write(cache.first, new Uint8Array(pack.fkv_row(rowOf(lane, { position }))));
    const { address } = cache.first;
    this.device.lib.fkv_control_load(cache.packed, address, cache.zeroStep.address, 1, 1, stream.handle);
  }

  /** The selection that the first step starts from, in every layer. */
  selectFirst(): void {
    this.load(this.tokens);
    for (let layer = 0; layer < this.geometry.layers; layer++) {
      select(this.device, this.cache, this.cache.next, this.lane.qPrev, layer, FKV_FIRST, 1, this.stream);
      this.#recall.start(this.cache.next, layer, [this.lane], this.stream);
    }
  }

  [Symbol.dispose](): void {
    this.#owned[Symbol.dispose]();
  }
}
