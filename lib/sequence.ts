/// <reference lib="esnext.disposable" preserve="true" />
// A sequence, as a program holds it.
import { type Batch, Run } from "./batch.ts";
import { FreeKVError } from "./errors.ts";
import { abortable, assertNumbers, cleanUp, TokenStream } from "./generation.ts";
import { parseGenerateOptions, parsePolicyOptions, resolvePolicy } from "./options.ts";
import { greedy } from "./row.ts";
import type { State } from "./state.ts";
import type { Tokenizer as TextTokenizer } from "./tokenizer.ts";
import type {
  GenerateOptions,
  Generation,
  PolicyOptions,
  Prompt,
  Scored,
  Stats,
  TaskOptions,
  TokenIds,
} from "./types.ts";

/** What sequences need of their engine. */
export interface Host {
  readonly batch: Batch;
  readonly eos: readonly number[];
  tokenizer(): TextTokenizer | null;
  /** Ids of a prompt that follows `length` tokens, checked against vocabulary and context. */
  encode(prompt: Prompt, length: number): Int32Array;
  /** One prefill at a time. */
  prefill(state: State, ids: Int32Array, task: TaskOptions): Promise<void>;
  opened(state: State): void;
  closed(state: State): void;
}

export class Sequence implements Disposable {
  readonly #host: Host;
  readonly #state: State;
  #busy = false;
  /** What reading the input has taken that no token has answered yet. */
  #inputMs: number;

  /** @internal Sequences come from Engine.prefill and fork. */
  constructor(host: Host, state: State, inputMs: number) {
    this.#host = host;
    this.#state = state;
    this.#inputMs = inputMs;
  }

  get length(): number {
    return this.#state.length;
  }
  get policy(): Readonly<Required<PolicyOptions>> {
    return this.#state.policy;
  }

  /** Appends a prompt through prefill. On failure or abort the sequence is as before. Errors: BUSY, CONTEXT_TOO_LONG, OUT_OF_MEMORY. */
  async append(prompt: Prompt, options: TaskOptions = {}): Promise<void> {
    const ids = this.#host.encode(prompt, this.length);
    this.#enter("append");
    try {
      const from = performance.now();
      await this.#host.prefill(this.#state, ids, options);
      this.#inputMs += performance.now() - from;
    } finally {
      this.#busy = false;
    }
  }

  /** Appends what it yields. Errors: BUSY where the sequence already runs. */
  generate(options: GenerateOptions = {}): Generation {
    const o = parseGenerateOptions(options);
    this.#check("generate");
    const source = {
      keeps: true,
      open: async () => {
        this.#enter("generate");
        const waitedMs = this.#inputMs;
        this.#inputMs = 0;
        return { state: this.#state, waitedMs, promptTokens: this.length, cachedTokens: this.length };
      },
      close: () => {
        this.#busy = false;
      },
    };
    return new TokenStream(this.#host.batch, source, o, this.#host.tokenizer, this.#host.eos);
  }

  /**
   * Feeds the tokens through the decode path under the policy, teacher-forced, and appends them. Yields for every token but the last;
   * generate() may follow.
   */
  async *score(tokens: TokenIds, options: TaskOptions = {}): AsyncGenerator<Scored, void, undefined> {
    const ids = this.#host.encode(tokens, this.length);
    this.#enter("score");
    const base = this.length;
    const state = this.#state;
    let failed = false;
    const run = new Run(state, ids.length, greedy, (i) => ({
      draw: false,
      token: ids[i] as number,
      target: ids[i + 1] ?? -1,
    }));
    try {
      for (let i = 0; i < ids.length; i++) {
        const asked = performance.now();
        const { result, stallMs, at } = await abortable(this.#host.batch.next(run), options.signal);
        this.#inputMs += Math.max(0, at - asked);
        assertNumbers(result, base + i);
        state.count(result.counters, stallMs);
        if (i + 1 === ids.length) return;
        yield {
          position: base + i,
          next: ids[i + 1] as number,
          logprob: result.logprob,
          argmax: result.argmax,
        };
      }
    } catch (error) {
      failed = true;
      throw error;
    } finally {
      try {
        await cleanUp(failed, () => this.#host.batch.finish(run));
      } finally {
        this.#busy = false;
      }
    }
  }

  /** A child that shares the completed pages; its policy may differ. Errors: BUSY, BAD_ARGUMENT, OUT_OF_MEMORY. */
  fork(options: PolicyOptions = {}): Sequence {
    this.#check("fork");
    const { layers, pageSize } = this.#state.core.geometry;
    const child = this.#state.fork(
      resolvePolicy(this.#state.policy, parsePolicyOptions(options), pageSize, layers),
    );
    this.#host.opened(child);
    return new Sequence(this.#host, child, 0);
  }

  /** Keeps the first `length` tokens, 1 or more; the last of them is computed anew. */
  truncate(length: number): void {
    this.#check("truncate");
    if (!Number.isInteger(length) || length < 1 || length > this.length)
      throw new FreeKVError(
        "BAD_ARGUMENT",
        `truncate(${length}): the sequence has ${this.length} tokens; give 1 to ${this.length}`,
      );
    this.#state.truncate(length);
  }

  stats(): Stats {
    return this.#state.stats();
  }

  #check(what: string): void {
    if (this.#state.released) throw new FreeKVError("DISPOSED", `${what}() on a sequence that was disposed`);
    if (this.#busy)
      throw new FreeKVError(
        "BUSY",
        `${what}() while the sequence is still running; finish or break the other call first`,
      );
  }
  #enter(what: string): void {
    this.#check(what);
    this.#busy = true;
  }

  [Symbol.dispose](): void {
    if (this.#state.released) return;
    this.#host.closed(this.#state);
    this.#state.release();
  }
}
