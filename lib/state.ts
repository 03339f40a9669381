// One sequence as the engine keeps it: its lane, its blocks, its tokens, and every way to make or change it. Everything here is
// issued in the order of the compute stream, after whatever still runs beside it, so nothing has to be waited for on the host.

import { FKV_SPECULATE_NEXT } from "../ffi/constants.ts";
import { read, size } from "../ffi/structs.ts";
import { type Change, chunksOf } from "./change.ts";
import { range } from "./copier.ts";
import type { Core } from "./core.ts";
import { FreeKVError, unlessFailed } from "./errors.ts";
import { Lane } from "./lane.ts";
import type { Policy } from "./options.ts";
import { type Counters, Tally } from "./tally.ts";
import type { Stats, TaskOptions } from "./types.ts";

export class State {
  readonly core: Core;
  readonly policy: Policy;
  readonly tally: Tally = new Tally();
  /** Tokens whose K and V are in the cache, or under way. */
  readonly ids: number[] = [];
  /** Blocks of complete pages and of the page that is being filled. */
  readonly blocks: number[] = [];
  readonly #index: number;
  #lane: Lane | null = null;
  /** The lane whose first selection is counted. */
  #filled: Lane | null = null;
  released = false;
  /** A prompt is being appended: what it writes to is given back only when it has ended. */
  #appending = false;

  /** Errors: BUSY where no sequence is free; BAD_ARGUMENT from the policy's plan; OUT_OF_MEMORY. */
  constructor(core: Core, policy: Policy) {
    core.admit(core.plan(policy));
    const index = core.takeLane();
    if (index === undefined)
      throw new FreeKVError(
        "BUSY",
        `all ${core.options.maxSequences} sequences are alive; dispose one or raise maxSequences`,
      );
    this.core = core;
    this.policy = policy;
    this.#index = index;
  }

  get length(): number {
    return this.ids.length;
  }
  /** Errors: DISPOSED. */
  check(): void {
    if (this.released) throw new FreeKVError("DISPOSED", "the sequence was disposed while it ran");
  }
  get lane(): Lane {
    return this.#lane as Lane;
  }

  /** Appends a prompt through prefill; on failure or abort the sequence is as before. */
  async append(ids: Int32Array, task: TaskOptions): Promise<void> {
    const change = this.#begin(ids.length);
    this.#appending = true;
    try {
      const chunks = [...chunksOf(this.core, change, ids)];
      let before: Promise<void> | undefined;
      for (const [i, { issue, finishes }] of chunks.entries()) {
        await this.core.pool.whenReady(finishes);
        task.signal?.throwIfAborted();
        this.check();
        const end = issue();
        const done = this.core.reached().then(() => {
          task.onProgress?.({ phase: "prefill", done: end, total: ids.length, unit: "tokens" });
        });
        done.catch(() => {}); // it is heard of below, unless an earlier failure ends the loop
        await before; // one chunk computes while the next one is issued
        before = done;
        if (i === chunks.length - 1) await before;
      }
      task.signal?.throwIfAborted();
      this.check();
      this.#commit(change, ids);
    } catch (error) {
      await this.#abandon(change);
      throw error;
    } finally {
      this.core.prefill.end();
      this.#appending = false;
      if (this.released) this.#giveBack();
    }
  }

  /** A new sequence becomes that of `ids`, a whole number of pages, which `blocks`, taken for it, hold already; `q`: the last
   * token's, of every layer. No logits: its first step is fed a token. */
  adopt(ids: Int32Array, blocks: readonly number[], q: Float32Array): void {
    const { core } = this;
    const { compute } = core.decoder;
    core.orchestration.quiesce();
    const lane = this.#newLane(ids.length);
    compute.copy(lane.qPrev, q);
    compute.memset(lane.logits, 0, 4 * core.network.config.vocab);
    core.fill(lane, ids.length, blocks);
    for (const id of blocks) this.blocks.push(id);
    for (const id of ids) this.ids.push(id);
    this.#lane = lane;
  }

  /** A child with its own policy: completed pages are shared. */
  fork(policy: Policy): State {
    const { core } = this;
    const { compute } = core.decoder;
    const child = new State(core, policy);
    try {
      core.orchestration.quiesce();
      const lane = child.#newLane(this.length);
      child.#lane = lane;
      const full = Math.floor(this.length / core.geometry.pageSize);
      const shared = this.blocks.slice(0, full);
      const own = this.length % core.geometry.pageSize ? core.pool.reserve(1, compute) : [];
      core.pool.retain(shared);
      for (const id of [...shared, ...own]) child.blocks.push(id);
      for (const id of this.ids) child.ids.push(id);
      this.#hand(lane);
      core.fill(lane, this.length, child.blocks);
      return child;
    } catch (error) {
      child.release();
      throw error;
    }
  }

  /** Keeps the first `length` tokens; the last of them is computed anew, for its q and its logits. */
  truncate(length: number): void {
    if (length === this.length) return;
    const { core } = this;
    const { pageSize } = core.geometry;
    const { compute } = core.decoder;
    core.orchestration.quiesce();
    const keep = length - 1;
    const full = Math.floor(keep / pageSize);
    const token = this.ids[keep] as number;
    const last = this.blocks[full] as number;
    // A shared page needs a block of its own: that of the page being filled, whose tokens go, or a new one.
    const filling = Math.floor(this.length / pageSize);
    const spare = filling > full && this.length % pageSize > 0 ? this.blocks[filling] : undefined;
    const shared = core.pool.isShared(last);
    const reserved = shared && spare === undefined ? core.pool.reserve(1, compute) : [];
    const own = shared ? (spare ?? (reserved[0] as number)) : last;
    const old = this.lane;
    const partial =
      keep % pageSize === 0
        ? null
        : this.length >= (full + 1) * pageSize
          ? { frames: core.cache.hostFrames, pages: [last] }
          : old.pages(core.cache, [full]);
    const blocks = [...this.blocks.slice(0, full), own];
    let lane: Lane | undefined;
    core.prefill.enter();
    try {
      core.pool.awaitReady([own]);
      lane = this.#newLane(length);
      core.prefill.begin(keep, blocks);
      core.prefill.chunk({ start: keep, ids: Int32Array.of(token), blocks, partial, lane });
      core.fill(lane, length, blocks);
    } catch (error) {
      core.pool.release(reserved);
      this.#restore(lane);
      throw error;
    } finally {
      void core.reached().then(
        () => core.prefill.end(),
        () => {}, // a device that failed frees nothing until it is closed
      );
    }
    core.pool.release(this.blocks.splice(full).filter((id) => id !== own));
    this.blocks.push(own);
    this.ids.length = length;
    this.#replace(lane);
  }

  /**
   * Reserves the block of the next position and, where every page has a frame, makes room for it. Returns the block, which has to
   * be ready before the step is launched that writes it.
   */
  reserve(): number {
    const { core } = this;
    const page = Math.floor(this.length / core.geometry.pageSize);
    if (page === this.blocks.length) this.blocks.push(...core.pool.reserve(1, core.decoder.compute));
    if (this.lane.plan.resident && page >= this.lane.nFrames) this.#grow();
    return this.blocks[page] as number;
  }

  /** Counts a step, and once what the selection before a sequence's first step recalled. */
  count(step: Counters, stallMs: number): void {
    if (this.#filled !== this.#lane) {
      this.#filled = this.#lane;
      const { firstCounts } = this.core.cache;
      if (this.lane.plan.speculation === FKV_SPECULATE_NEXT)
        this.tally.step(
          read.fkv_counters(new DataView(firstCounts.buffer), this.#index * size.fkv_counters),
          0,
        );
    }
    this.tally.step(step, stallMs);
  }

  stats(): Stats {
    const { geometry } = this.core;
    const plan = this.core.plan(this.policy);
    const pages = Math.ceil(this.length / geometry.pageSize);
    const frames = plan.resident ? pages * geometry.blockBytes : (this.#lane?.frameBytes ?? 0);
    const digests = plan.k > 0 ? this.blocks.length * geometry.digestBytes : 0;
    return this.tally.stats(plan, geometry, frames + digests, this.length);
  }

  release(): void {
    if (this.released) return;
    this.released = true;
    if (!this.#appending) this.#giveBack();
  }

  #giveBack(): void {
    unlessFailed(() => this.core.orchestration.quiesce());
    this.core.pool.release(this.blocks.splice(0));
    if (this.#lane) this.core.laneMemory.give(this.#lane.memory);
    this.core.giveLane(this.#index);
  }

  #begin(tokens: number): Change {
    const { core } = this;
    const { pageSize } = core.geometry;
    const start = this.length;
    const total = start + tokens;
    core.orchestration.quiesce();
    const added = core.pool.reserve(Math.ceil(total / pageSize) - this.blocks.length, core.decoder.compute);
    let lane: Lane | undefined;
    core.prefill.enter();
    try {
      lane = this.#newLane(total);
      const blocks = [...this.blocks, ...added];
      core.prefill.begin(start, blocks);
      const partial = start % pageSize ? this.lane.pages(core.cache, [Math.floor(start / pageSize)]) : null;
      return { lane, added, blocks, start, partial };
    } catch (error) {
      core.pool.release(added);
      if (lane) core.laneMemory.give(lane.memory);
      core.prefill.end();
      throw error;
    }
  }

  #commit(change: Change, ids: Int32Array): void {
    this.core.orchestration.quiesce();
    this.core.fill(change.lane, this.length + ids.length, change.blocks);
    for (const id of change.added) this.blocks.push(id);
    for (const id of ids) this.ids.push(id);
    this.#replace(change.lane);
  }

  async #abandon(change: Change): Promise<void> {
    // Its pages still go to blocks that someone else may get now; a device that failed writes nothing.
    await this.core.prefill.settled().catch(() => {});
    this.core.pool.release(change.added);
    this.#restore(change.lane);
  }

  /** After a change that failed: the lane's index means the old state again. */
  #restore(failed: Lane | undefined): void {
    if (failed) this.core.laneMemory.give(failed.memory);
    unlessFailed(() => this.#lane?.install(this.core.cache, this.blocks, this.core.decoder.compute));
  }

  /** Memory for `length` tokens and some more, not yet installed. */
  #newLane(length: number): Lane {
    const { core } = this;
    const { maxPages, pageSize } = core.geometry;
    const pages = Math.min(maxPages, Math.ceil((length * 1.25) / pageSize) + 8);
    const { compute } = core.decoder;
    return new Lane(
      core.cache,
      core.laneMemory,
      this.#index,
      core.plan(this.policy),
      this.policy.tau,
      pages,
      core.network.config.vocab,
      compute,
    );
  }

  #replace(lane: Lane): void {
    if (this.#lane) this.core.laneMemory.give(this.#lane.memory);
    this.#lane = lane;
  }

  /** q, logits and the incomplete page of this sequence → another lane. */
  #hand(lane: Lane): void {
    const { core } = this;
    const { geometry: g } = core;
    const { compute } = core.decoder;
    compute.copy(lane.qPrev, this.lane.qPrev, 4 * g.layers * g.heads * g.headDim);
    compute.copy(lane.logits, this.lane.logits, 4 * core.network.config.vocab);
    const tokens = this.length % g.pageSize;
    const page = [Math.floor(this.length / g.pageSize)];
    if (tokens)
      core.copier.copy(
        this.lane.pages(core.cache, page),
        lane.pages(core.cache, page),
        { layers: g.layers, tokens },
        compute,
      );
  }

  #grow(): void {
    const { core } = this;
    core.orchestration.quiesce();
    const lane = this.#newLane(2 * this.length);
    const pages = range(0, this.lane.nFrames);
    core.copier.copy(
      this.lane.pages(core.cache, pages),
      lane.pages(core.cache, pages),
      { layers: core.geometry.layers },
      core.decoder.compute,
    );
    this.#hand(lane);
    this.#replace(lane);
    lane.install(core.cache, this.blocks, core.decoder.compute);
  }
}
