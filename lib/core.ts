/// <reference lib="esnext.disposable" preserve="true" />
// The inside of an engine: what is loaded once, and the sequences that live on it.
import { FKV_DECODE, FKV_FAST, FKV_FIRST, FKV_PREFILL, FKV_SPECULATE_NEXT } from "../ffi/constants.ts";
import { pack, size } from "../ffi/structs.ts";
import { Cache } from "./cache.ts";
import { CapturedOrchestration } from "./captured.ts";
import { PageCopier } from "./copier.ts";
import { Check } from "./correct.ts";
import type { Decoder } from "./decoder.ts";
import { DenseQueue } from "./dense.ts";
import type { Device, DeviceBuffer, Stream } from "./device.ts";
import { unlessFailed } from "./errors.ts";
import { dtypeCode, type Geometry, geometryOf } from "./geometry.ts";
import { HostOrchestration } from "./host.ts";
import { type Lane, LaneMemory } from "./lane.ts";
import { Activations, Network } from "./network.ts";
import type { Policy } from "./options.ts";
import { Owned } from "./owned.ts";
import { HostPool } from "./pages.ts";
import { type Plan, planOf } from "./plan.ts";
import { defaultChunk, Prefill } from "./prefill.ts";
import { GatherRecall, type Recall } from "./recall.ts";
import { FragmentedRecall } from "./recall-listed.ts";
import { StagedRecall } from "./recall-staged.ts";
import { rowOf } from "./row.ts";
import { select } from "./select.ts";
import type { EngineOptions, TaskOptions } from "./types.ts";
import { type WaitName, Waits } from "./waits.ts";
import type { Checkpoint } from "./weights.ts";

export type CoreOptions = Omit<EngineOptions, keyof TaskOptions> & {
  maxContext: number;
  maxSequences: number;
  hostBytes: number;
  /** For tests: leave out this wait. */
  omitWait?: WaitName | undefined;
  /** For measurements on weights that mean nothing: flags and selections are those of `Core.force`. */
  forced?: boolean | undefined;
};

const estimates = {
  freekv: { pooling: 0, scaled: true },
  "paper-speed": { pooling: 1, scaled: false },
};

export class Core implements Disposable {
  readonly device: Device;
  readonly geometry: Geometry;
  readonly network: Network;
  readonly pool: HostPool;
  readonly cache: Cache;
  readonly decoder: Decoder;
  readonly orchestration: HostOrchestration | CapturedOrchestration;
  readonly prefill: Prefill;
  readonly copier: PageCopier;
  readonly laneMemory: LaneMemory;
  readonly options: CoreOptions;
  readonly #freeLanes: number[];
  readonly #forced: DeviceBuffer | null;
  #owned: Owned;

  private constructor(device: Device, compute: Stream, network: Network, o: CoreOptions, owned: Owned) {
    const { config } = network;
    const recall = o.recall ?? "gather";
    this.device = device;
    this.network = network;
    this.options = o;
    this.#owned = owned;
    this.geometry = geometryOf({
      layers: config.layers,
      heads: config.heads,
      kvHeads: config.kvHeads,
      headDim: config.headDim,
      pageSize: o.pageSize ?? 32,
      dtype: o.kvDtype ?? config.dtype,
      maxContext: o.maxContext,
      layout: o.layout ?? "hnd",
      hostLayout: recall === "fragmented" ? "nhd" : "hnd",
    });
    const maxRows = 2 ** Math.ceil(Math.log2(o.maxSequences)); // the largest bucket
    const { pooling, scaled } = estimates[o.estimate ?? "freekv"];
    this.#forced = o.forced ? owned.use(device.alloc(size.fkv_forced)) : null;
    if (this.#forced) compute.memset(this.#forced, 0);
    this.pool = owned.use(new HostPool(device, this.geometry, o.hostBytes));
    this.cache = owned.use(
      new Cache(device, this.geometry, this.pool, {
        maxRows,
        maxLanes: o.maxSequences,
        vocab: config.vocab,
        pooling,
        scoreScale: scaled ? 1 / Math.sqrt(config.headDim) : 1,
        forced: this.#forced?.address ?? 0,
      }),
    );
    const waits = new Waits(o.omitWait);
    const recalls: Record<typeof recall, () => Recall> = {
      gather: () => new GatherRecall(device, this.cache, waits),
      staged: () => new StagedRecall(device, this.cache, waits, o.stagingBuffers ?? 2),
      fragmented: () => new FragmentedRecall(device, this.cache, waits),
    };
    const dtype = dtypeCode[config.dtype];
    const split = o.chain === "split";
    const fast = device.backend === "cuda" && (o.numerics ?? "fast") === "fast";
    this.decoder = {
      device,
      network,
      cache: this.cache,
      act: owned.use(new Activations(device, config, maxRows)),
      dense: owned.use(
        new DenseQueue(device, compute, {
          ...{ dtype, eps: config.eps, split, maxRows, ...network.widest },
          family: FKV_DECODE,
        }),
      ),
      logits: owned.use(device.alloc(4 * config.vocab * maxRows)).address,
      compute,
      side: owned.use(device.stream()),
      check: owned.use(new Check(device, this.cache)),
      recall: owned.use(recalls[recall]()),
      waits,
      digestKind: o.digest === "arkvale" || o.estimate === "paper-speed" ? 1 : 0,
    };
    this.copier = owned.use(new PageCopier(device, this.cache));
    this.prefill = owned.use(
      new Prefill(this.decoder, this.copier, new Waits(o.omitWait), {
        split,
        dtype,
        family: fast ? FKV_FAST : FKV_PREFILL,
        chunkTokens: o.prefillChunk ?? defaultChunk(device, config, o.maxContext),
        prefillKv: o.prefillKv ?? "device",
      }),
    );
    this.laneMemory = owned.use(new LaneMemory(device));
    const captured = (o.orchestration ?? (recall === "gather" ? "captured" : "host")) === "captured";
    this.orchestration = owned.use(
      captured ? new CapturedOrchestration(this.decoder) : new HostOrchestration(this.decoder),
    );
    this.#freeLanes = Array.from({ length: o.maxSequences }, (_, i) => o.maxSequences - 1 - i);
  }

  /** Uploads a checkpoint; the core owns the device from here on, also when this fails. */
  static async load(
    device: Device,
    checkpoint: Checkpoint,
    options: CoreOptions,
    task: TaskOptions,
  ): Promise<Core> {
    using owned = new Owned();
    owned.use(device);
    const compute = owned.use(device.computeStream());
    const network = owned.use(await Network.load(device, checkpoint, compute, task));
    const core = new Core(device, compute, network, options, owned);
    core.#owned = owned.move();
    return core;
  }

  /** Resolves when the device has done everything issued to the compute stream so far. */
  async reached(): Promise<void> {
    using event = this.device.event();
    this.decoder.compute.record(event);
    await event.done();
  }
  /** Of an engine made with `forced`: how the steps issued from here on flag and select; zeros: as they are. */
  force(forced: { flagged: number; period: number }): void {
    if (!this.#forced) throw new Error("this engine was made without `forced`");
    this.decoder.compute.write(this.#forced, new Uint8Array(pack.fkv_forced(forced)));
  }
  get hasLane(): boolean {
    return this.#freeLanes.length > 0;
  }
  takeLane(): number | undefined {
    return this.#freeLanes.pop();
  }
  giveLane(index: number): void {
    this.#freeLanes.push(index);
  }

  plan(policy: Policy): Plan {
    return planOf(policy, this.geometry.pageSize, this.geometry.maxPages, this.options.slots);
  }

  /** Makes room for lanes of this plan. */
  admit(plan: Plan): void {
    if (plan.slots <= this.cache.slots) return;
    this.orchestration.quiesce();
    this.cache.widen(plan.slots);
    this.orchestration.forget();
  }

  /** Fills a lane whose partial page, q and logits are there: sink and window (or every page) from the host, then the selection that
   * its first step starts from. */
  fill(lane: Lane, length: number, blocks: readonly number[]): void {
    const { cache, copier, geometry } = this;
    const { compute, waits, recall, device, act } = this.decoder;
    lane.install(cache, blocks, compute);
    const held = lane
      .pagesHeld(length, geometry.pageSize)
      .filter((p) => (p + 1) * geometry.pageSize <= length);
    copier.copy(
      { frames: cache.hostFrames, pages: held.map((p) => blocks[p] as number) },
      lane.pages(cache, held),
      { layers: geometry.layers },
      compute,
    );
    if (lane.plan.speculation !== FKV_SPECULATE_NEXT || length >= this.options.maxContext) return; // no step follows a full context
    const row = rowOf(lane, { position: length });
    compute.write(cache.first, new Uint8Array(pack.fkv_row(row)));
    device.lib.fkv_control_load(
      cache.packed,
      cache.first.address,
      cache.zeroStep.address,
      1,
      1,
      compute.handle,
    );
    // The first step's attention waits for all of it.
    device.lib.fkv_clock_start(cache.stallMark.address, compute.handle);
    for (let layer = 0; layer < geometry.layers; layer++) {
      select(device, cache, cache.next, act.qkv, layer, FKV_FIRST, 1, compute);
      waits.on(compute, recall.start(cache.next, layer, [lane], compute).event(), "first-after-selection");
    }
    device.lib.fkv_clock_stop(cache.stall.address, cache.stallMark.address, compute.handle);
    const counts = cache.firstCounts.address + lane.index * size.fkv_counters;
    compute.copy(counts, cache.counters, size.fkv_counters);
  }

  [Symbol.dispose](): void {
    unlessFailed(() => this.device.synchronize());
    this.#owned[Symbol.dispose]();
  }
}
