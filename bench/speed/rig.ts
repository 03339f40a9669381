/// <reference lib="esnext.disposable" preserve="true" />
// An engine's inside on random weights, and sequences as long as wanted without a prompt being read: their pages are random
// values, written to host blocks as a prefill writes them, digests too.

import { Batch } from "../../lib/batch.ts";
import { Core, type CoreOptions } from "../../lib/core.ts";
import { Device, type DeviceBuffer } from "../../lib/device.ts";
import { defaultPolicy, resolvePolicy } from "../../lib/options.ts";
import { State } from "../../lib/state.ts";
import type { PolicyOptions } from "../../lib/types.ts";
import { randomBf16, randomF32 } from "../layer8b.ts";
import { fedTokens, pagesOf, type Shape } from "./shape.ts";
import { syntheticCheckpoint } from "./synthetic.ts";

/** Pages of distinct contents; blocks repeat them. */
const distinctPages = 32;
const contentBytes = 16 * 2 ** 20;

export interface RigOptions extends Partial<CoreOptions> {
  /** Longest sequence, and the tokens of all of them together. */
  readonly maxContext: number;
  readonly pooledTokens: number;
  /** Bytes of pool that grow() adds to what is pinned by then. */
  readonly grownBytes?: number;
}

export class Rig implements AsyncDisposable {
  readonly shape: Shape;
  readonly core: Core;
  readonly batch: Batch;
  /** Seconds that making the engine took. */
  readonly loadSeconds: number;
  /** Blocks that hold random pages, or pages of a sequence. */
  readonly filled: Set<number> = new Set();
  /** Seconds that growing the pool and filling it took so far. */
  grownSeconds = 0;
  filledSeconds = 0;
  readonly #alive = new Set<State>();
  #pages: DeviceBuffer | null = null;

  private constructor(shape: Shape, core: Core, loadSeconds: number) {
    this.shape = shape;
    this.core = core;
    this.batch = new Batch(core);
    this.loadSeconds = loadSeconds;
  }

  static async open(shape: Shape, device: string, options: RigOptions): Promise<Rig> {
    const began = performance.now();
    const { pooledTokens, grownBytes = 0, ...own } = options;
    using checkpoint = syntheticCheckpoint(shape.config);
    const blockBytes =
      2 * 2 * shape.config.layers * shape.config.kvHeads * shape.config.headDim * shape.pageSize;
    const core = await Core.load(
      Device.open({ device: device as "auto" }),
      checkpoint,
      {
        pageSize: shape.pageSize,
        maxSequences: 1,
        hostBytes:
          blockBytes * pagesOf(shape, pooledTokens + fedTokens(shape) * (own.maxSequences ?? 1)) +
          2 * grownBytes,
        forced: true,
        ...own,
      },
      {},
    );
    return new Rig(shape, core, (performance.now() - began) / 1e3);
  }

  /** A sequence without tokens. */
  empty(policy: PolicyOptions = {}): State {
    const { budget, config, pageSize, sink, window } = this.shape;
    const base = { ...defaultPolicy, budget, sink, window };
    const state = new State(this.core, resolvePolicy(base, policy, pageSize, config.layers));
    this.#alive.add(state);
    return state;
  }

  /** A sequence of `tokens` tokens, a whole number of pages. */
  async sequence(tokens: number, policy: PolicyOptions = {}): Promise<State> {
    const { core, shape } = this;
    const { config } = shape;
    const state = this.empty(policy);
    const blocks = this.#blocks(pagesOf(shape, tokens));
    const ids = Int32Array.from({ length: tokens }, (_, i) => tokenAt(shape, i));
    state.adopt(ids, blocks, randomF32(config.layers * config.heads * config.headDim));
    await core.reached();
    return state;
  }

  release(state: State): void {
    this.#alive.delete(state);
    for (const block of state.blocks) this.filled.add(block);
    state.release();
  }

  /** Adds this to the pool beside whatever decodes. */
  async grow(bytes: number): Promise<void> {
    const { core } = this;
    const blocks = Math.ceil((core.pool.bytes + bytes) / core.geometry.blockBytes) - core.pool.used;
    const taken = core.pool.reserve(blocks, core.decoder.compute);
    await core.pool.whenReady(taken);
    core.pool.release(taken);
  }

  #blocks(n: number): number[] {
    const { compute } = this.core.decoder;
    const began = performance.now();
    const blocks = this.core.pool.reserve(n, compute);
    this.core.pool.awaitReady(blocks);
    const grown = performance.now();
    this.grownSeconds += (grown - began) / 1e3;
    const empty = blocks.filter((block) => !this.filled.has(block));
    if (empty.length === 0) return blocks;
    this.#fill(empty);
    compute.synchronize();
    this.filledSeconds += (performance.now() - grown) / 1e3;
    return blocks;
  }

  #fill(blocks: readonly number[]): void {
    const { cache, copier, decoder, geometry } = this.core;
    const pages = this.#content();
    const from = blocks.map((_, i) => i % distinctPages);
    const made = { frames: cache.deviceFrames(pages.address, distinctPages), pages: from };
    const extent = { layers: geometry.layers };
    copier.copy(made, { frames: cache.hostFrames, pages: blocks }, extent, decoder.compute);
    copier.digest(made, blocks, decoder.digestKind, extent, decoder.compute);
    for (const block of blocks) this.filled.add(block);
  }

  /** Random pages of every layer on the device; layers repeat contents, too. */
  #content(): DeviceBuffer {
    if (this.#pages) return this.#pages;
    const { compute } = this.core.decoder;
    const pages = this.core.device.alloc(distinctPages * this.core.geometry.blockBytes);
    const content = randomBf16(Math.min(contentBytes, pages.bytes) / 2);
    for (let at = 0; at < pages.bytes; at += content.byteLength)
      compute.copy(pages.address + at, content, Math.min(content.byteLength, pages.bytes - at));
    this.#pages = pages;
    return pages;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.core.reached().catch(() => {});
    for (const state of this.#alive) state.release();
    this.batch[Symbol.dispose]();
    this.#pages?.[Symbol.dispose]();
    this.core[Symbol.dispose]();
  }
}

/** The token fed at a position. */
export const tokenAt = (shape: Shape, position: number): number =>
  (position * 7919 + 13) % shape.config.vocab;
