/// <reference lib="esnext.disposable" preserve="true" />
// A model on a device, and the sequences that share it.
import { freemem } from "node:os";
import { Batch } from "./batch.ts";
import { folderPath, type ModelConfig, readConfig } from "./checkpoint.ts";
import { Core, type CoreOptions } from "./core.ts";
import { type Deferred, deferred } from "./deferred.ts";
import { Device } from "./device.ts";
import { FreeKVError } from "./errors.ts";
import { abortable, TokenStream } from "./generation.ts";
import {
  defaultPolicy,
  type Policy,
  parseEngineOptions,
  parsePolicyAndGenerate,
  parsePolicyAndTask,
  resolvePolicy,
} from "./options.ts";
import { planOf } from "./plan.ts";
import { type Host, Sequence } from "./sequence.ts";
import { State } from "./state.ts";
import { sumStats } from "./tally.ts";
import { loadTokenizer, type Tokenizer as TextTokenizer } from "./tokenizer.ts";
import type {
  EngineOptions,
  EngineStats,
  GenerateOptions,
  Generation,
  ModelInfo,
  PolicyOptions,
  Prompt,
  TaskOptions,
  Tokenizer,
} from "./types.ts";
import type { WaitName } from "./waits.ts";
import { openCheckpoint } from "./weights.ts";

/** Concurrent calls share steps: `Promise.all(prompts.map((p) => engine.generate(p).text()))` is one batch. */
export class Engine implements AsyncDisposable {
  readonly model: ModelInfo;
  /** "cpu" (the twin) or "cuda:N". */
  readonly device: string;
  readonly #core: Core;
  readonly #host: Host;
  readonly #policy: Policy;
  readonly #tokenizer: TextTokenizer | FreeKVError;
  readonly #states = new Set<State>();
  #prefills: Promise<void> = Promise.resolve();
  /** Sequences that end by themselves, and who waits for one to end. */
  #own = 0;
  readonly #waiting: Deferred<void>[] = [];
  #disposed = false;

  /** @internal Engines come from Engine.load. */
  constructor({ core, policy, tokenizer }: Loaded) {
    const { config } = core.network;
    this.#core = core;
    this.#policy = policy;
    this.#tokenizer = tokenizer;
    this.device = core.device.name;
    this.model = {
      architecture: config.architecture,
      layers: config.layers,
      heads: config.heads,
      kvHeads: config.kvHeads,
      headDim: config.headDim,
      vocabSize: config.vocab,
      contextLength: core.options.maxContext,
    };
    this.#host = {
      batch: new Batch(core),
      eos: config.eos,
      tokenizer: () => (tokenizer instanceof Error ? null : tokenizer),
      encode: (prompt, length) => this.#encode(prompt, length),
      prefill: (state, ids, task) => this.#prefill(state, ids, task),
      opened: (state) => this.#states.add(state),
      closed: (state) => this.#states.delete(state),
    };
  }

  /**
   * Loads a Hugging Face folder. Whatever can be refused is refused before anything is loaded.
   * Errors: BAD_ARGUMENT, BAD_CHECKPOINT, UNSUPPORTED_MODEL, NO_DEVICE, LIBRARY_NOT_FOUND, ABI_MISMATCH, OUT_OF_MEMORY.
   */
  static async load(dir: string | URL, options: EngineOptions = {}): Promise<Engine> {
    return new Engine(await loadCore(dir, options));
  }

  /** Errors: BAD_CHECKPOINT where the folder's tokenizer.json is missing or malformed. */
  get tokenizer(): Tokenizer {
    if (this.#tokenizer instanceof Error) throw this.#tokenizer;
    return this.#tokenizer;
  }

  /** A sequence that holds the prompt. Errors: BUSY, CONTEXT_TOO_LONG, OUT_OF_MEMORY, BAD_ARGUMENT. */
  async prefill(prompt: Prompt, options: PolicyOptions & TaskOptions = {}): Promise<Sequence> {
    const startedAt = performance.now();
    const state = await this.#start(prompt, parsePolicyAndTask(options), options);
    return new Sequence(this.#host, state, performance.now() - startedAt);
  }

  /** A continuation of the prompt on a sequence of its own, freed at the end. Errors: those of prefill. */
  generate(prompt: Prompt, options: PolicyOptions & GenerateOptions = {}): Generation {
    this.#check();
    const o = parsePolicyAndGenerate(options);
    let state: State | undefined;
    const source = {
      keeps: false,
      open: async () => {
        const startedAt = performance.now();
        while (!this.#core.hasLane && this.#own > 0) await this.#oneEnds(o.signal);
        this.#own++;
        try {
          state = await this.#start(prompt, o, { signal: o.signal });
        } catch (error) {
          this.#ended();
          throw error;
        }
        return {
          state,
          waitedMs: performance.now() - startedAt,
          promptTokens: state.length,
          cachedTokens: 0,
        };
      },
      close: () => {
        if (!state) return;
        this.#states.delete(state);
        state.release();
        this.#ended();
      },
    };
    return new TokenStream(this.#host.batch, source, o, this.#host.tokenizer, this.#host.eos);
  }

  stats(): EngineStats {
    this.#check();
    const core = this.#core;
    return {
      ...sumStats([...this.#states].map((state) => state.stats())),
      stallMs: this.#host.batch.stallMs, // rows of one step wait together
      sequences: this.#states.size,
      hostPages: core.pool.used,
      hostBytes: core.pool.bytes,
      deviceBytes: core.device.memory().allocatedBytes,
    };
  }

  async #start(prompt: Prompt, policy: PolicyOptions, task: TaskOptions): Promise<State> {
    this.#check();
    const core = this.#core;
    const ids = this.#encode(prompt, 0);
    const state = new State(
      core,
      resolvePolicy(this.#policy, policy, core.geometry.pageSize, core.geometry.layers),
    );
    try {
      await this.#prefill(state, ids, task);
    } catch (error) {
      state.release();
      throw error;
    }
    this.#states.add(state);
    return state;
  }

  /** Where all sequences are alive, a generation waits for one that ends by itself. */
  #oneEnds(signal: AbortSignal | undefined): Promise<void> {
    const end = deferred<void>();
    this.#waiting.push(end);
    return abortable(end.promise, signal).finally(() => {
      const place = this.#waiting.indexOf(end);
      if (place >= 0) this.#waiting.splice(place, 1);
    });
  }

  #ended(): void {
    this.#own--;
    for (const waiting of this.#waiting.splice(0)) waiting.resolve(); // each looks again
  }

  /** Prefills share one workspace, so they take turns. */
  async #prefill(state: State, ids: Int32Array, task: TaskOptions): Promise<void> {
    const before = this.#prefills;
    const turn = deferred<void>();
    this.#prefills = before.then(() => turn.promise);
    try {
      task.signal?.throwIfAborted();
      await abortable(before, task.signal);
      await state.append(ids, task);
    } finally {
      turn.resolve();
    }
  }

  #encode(prompt: Prompt, length: number): Int32Array {
    this.#check();
    if (typeof prompt !== "string" && !Array.isArray(prompt) && !(prompt instanceof Int32Array))
      throw new FreeKVError("BAD_ARGUMENT", "a prompt is a string, an array of token ids or an Int32Array");
    let ids: Int32Array;
    if (typeof prompt === "string") {
      if (this.#tokenizer instanceof Error) throw this.#tokenizer;
      ids = this.#tokenizer.encode(prompt, { addBos: length === 0 });
    } else ids = Int32Array.from(prompt, (id) => (typeof id === "number" ? id : Number.NaN));
    const { contextLength, vocabSize } = this.model;
    if (ids.length === 0)
      throw new FreeKVError("BAD_ARGUMENT", "the prompt has no tokens; give at least one");
    const bad = ids.findIndex(
      (id, i) => id < 0 || id >= vocabSize || (typeof prompt !== "string" && prompt[i] !== id),
    );
    if (bad >= 0) {
      const shown =
        typeof prompt === "string"
          ? ids[bad]
          : typeof prompt[bad] === "number"
            ? prompt[bad]
            : `a ${typeof prompt[bad]}`;
      throw new FreeKVError(
        "BAD_ARGUMENT",
        `token ${bad} of the prompt is ${shown}; the vocabulary has ids 0 to ${vocabSize - 1}`,
      );
    }
    if (length + ids.length > contextLength)
      throw new FreeKVError(
        "CONTEXT_TOO_LONG",
        `${length + ids.length} tokens do not fit the context of ${contextLength}; shorten the prompt`,
        {
          detail: { tokens: length + ids.length, contextLength },
        },
      );
    return ids;
  }

  #check(): void {
    if (this.#disposed) throw new FreeKVError("DISPOSED", "the engine was disposed");
  }

  /** Waits for prompts that are being read, ends what decodes (DISPOSED), then frees everything, sequences too. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#disposed) return;
    this.#disposed = true;
    await this.#prefills;
    for (const state of this.#states) state.release();
    this.#states.clear();
    this.#host.batch[Symbol.dispose]();
    this.#core[Symbol.dispose]();
  }
}

/** What an engine is made of. */
export interface Loaded {
  readonly core: Core;
  readonly policy: Policy;
  readonly tokenizer: TextTokenizer | FreeKVError;
}

/** Engine.load without the engine. `omitWait` is for tests: this wait is left out. */
export async function loadCore(
  dir: string | URL,
  options: EngineOptions = {},
  omitWait?: WaitName,
): Promise<Loaded> {
  const { signal, onProgress, ...own } = parseEngineOptions(options);
  const { policy, core } = resolveEngine(readConfig(dir), own);
  using checkpoint = openCheckpoint(dir);
  const tokenizer = await loadTokenizer(folderPath(dir)).catch((error: FreeKVError) => error);
  const { device, libraryPath, debug, plain, twin } = own;
  const opened = Device.open({ device: device as "auto" | undefined, libraryPath, debug, plain, ...twin });
  const task = { signal, onProgress };
  return { core: await Core.load(opened, checkpoint, { ...core, omitWait }, task), policy, tokenizer };
}

/** Checks options against a model, before anything is loaded. Errors: BAD_ARGUMENT. */
export function resolveEngine(
  config: ModelConfig,
  own: EngineOptions,
): { policy: Policy; core: CoreOptions } {
  const pageSize = own.pageSize ?? 32;
  const maxContext = own.maxContext ?? config.contextLength;
  if (maxContext > config.contextLength)
    throw new FreeKVError(
      "BAD_ARGUMENT",
      `maxContext ${maxContext} is over the model's limit of ${config.contextLength}`,
    );
  const recall = own.recall ?? "gather";
  if (own.orchestration === "captured" && recall !== "gather")
    throw new FreeKVError(
      "BAD_ARGUMENT",
      `recall "${recall}" is decided on the host; use orchestration "host" with it, or recall "gather"`,
    );
  if (own.estimate === "paper-speed" && own.digest === "quest")
    throw new FreeKVError(
      "BAD_ARGUMENT",
      'estimate "paper-speed" scores ArkVale digests; leave digest out or use "arkvale"',
    );
  const policy = resolvePolicy(defaultPolicy, own, pageSize, config.layers);
  planOf(policy, pageSize, Math.ceil(maxContext / pageSize), own.slots);
  return {
    policy,
    core: {
      ...own,
      maxContext,
      maxSequences: own.maxSequences ?? 8,
      hostBytes: own.hostBytes ?? Math.floor(0.8 * freemem()),
    },
  };
}
