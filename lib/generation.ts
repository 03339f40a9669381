// A continuation, token by token: draws, decodes text, knows when to stop.

import type { Result } from "./batch.ts";
import { type Batch, Run } from "./batch.ts";
import { FreeKVError } from "./errors.ts";
import type { State } from "./state.ts";
import { StopFilter } from "./stop.ts";
import type { Tokenizer as TextTokenizer } from "./tokenizer.ts";
import type { Completion, GenerateOptions, Generation, Token } from "./types.ts";

/** What a generation starts from: a sequence ready to decode, and how it is given back. */
export interface Source {
  /** `waitedMs`: what handing over the input has taken so far. */
  open(): Promise<{ state: State; waitedMs: number; promptTokens: number; cachedTokens: number }>;
  /** The sequence stays for later calls, so that its last token's step must run. */
  readonly keeps: boolean;
  close(): void;
}

export class TokenStream implements Generation {
  readonly #batch: Batch;
  readonly #source: Source;
  readonly #options: GenerateOptions;
  readonly #tokenizer: () => TextTokenizer | null;
  readonly #eos: readonly number[];
  #read = false;
  #completion: Completion | null = null;

  constructor(
    batch: Batch,
    source: Source,
    options: GenerateOptions,
    tokenizer: () => TextTokenizer | null,
    eos: readonly number[],
  ) {
    this.#batch = batch;
    this.#source = source;
    this.#options = options;
    this.#tokenizer = tokenizer;
    this.#eos = eos;
  }

  async text(): Promise<string> {
    return (await this.result()).text;
  }

  async result(): Promise<Completion> {
    if (this.#completion === null) for await (const _ of this);
    return this.#completion as Completion;
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Token, void, undefined> {
    if (this.#read)
      throw new FreeKVError("BUSY", "a generation is read once; call generate() again for another");
    this.#read = true;
    const o = this.#options;
    o.signal?.throwIfAborted();
    const { state, waitedMs, promptTokens, cachedTokens } = await this.#source.open();
    const base = state.length;
    const room = state.core.options.maxContext - base;
    const limit = Math.min(o.maxTokens ?? 256, room);
    const sampling = {
      temperature: o.temperature ?? 0,
      topP: o.topP ?? 1,
      topK: o.topK ?? 0,
      seed: o.seed ?? randomSeed(),
      nTop: o.logprobs ?? 0,
    };
    const run = new Run(state, this.#source.keeps ? limit + 1 : limit, sampling, (i) =>
      i === 0 ? { draw: true } : { draw: false, token: null, target: -1 },
    );
    const stops = new Set([...(o.ignoreEos ? [] : this.#eos), ...(o.stopTokens ?? [])]);
    const writer = new Writer(this.#tokenizer(), typeof o.stop === "string" ? [o.stop] : (o.stop ?? []));
    const tokens: number[] = [];
    let finishReason: Completion["finishReason"] = (o.maxTokens ?? 256) <= room ? "length" : "context";
    let text = "";
    let last = performance.now();
    let interrupted = true;
    let failed = false;
    try {
      while (tokens.length < limit) {
        const asked = performance.now(); // what the reader does between two tokens is not ours
        const { result, stallMs, at } = await abortable(this.#batch.next(run), o.signal);
        if (tokens.length === 0) state.tally.firstToken(waitedMs + at - last);
        else state.tally.laterToken(at - Math.max(last, asked));
        last = at;
        assertNumbers(result, base + tokens.length - 1);
        state.count(result.counters, stallMs);
        tokens.push(result.token);
        const ends = stops.has(result.token);
        const written = writer.push(result.token, ends || tokens.length === limit);
        const stopped = ends || written.stopped;
        if (stopped) finishReason = "stop";
        text += written.text;
        interrupted = false;
        yield tokenOf(result, written.text, o.logprobs);
        interrupted = true;
        if (stopped) break;
      }
      interrupted = false;
      this.#completion = {
        text,
        tokens,
        finishReason,
        usage: { promptTokens, cachedTokens, completionTokens: tokens.length },
        stats: state.stats(),
      };
    } catch (error) {
      failed = true;
      throw error;
    } finally {
      try {
        await cleanUp(failed, async () => {
          // The draw, and a step for each token yielded.
          const owed = tokens.length > 0 && this.#source.keeps && !interrupted ? 1 + tokens.length : 0;
          await this.#batch.finish(run, owed);
          // An abort came before the token that is under way could be yielded.
          if (interrupted && this.#source.keeps && !state.released && state.length > base + tokens.length)
            state.truncate(base + tokens.length);
        });
      } finally {
        this.#source.close();
      }
    }
  }
}

/** Two generations without a seed draw differently. */
const randomSeed = (): number => crypto.getRandomValues(new Uint32Array(1))[0] as number;

/** Token ids to text that can be shown, up to a stop string. */
class Writer {
  readonly #stream: ReturnType<TextTokenizer["stream"]> | null;
  readonly #filter: StopFilter;
  constructor(tokenizer: TextTokenizer | null, stops: readonly string[]) {
    this.#stream = tokenizer?.stream() ?? null;
    this.#filter = new StopFilter(stops);
  }
  push(id: number, last: boolean): { text: string; stopped: boolean } {
    const text = (this.#stream?.push(id) ?? "") + (last ? (this.#stream?.end() ?? "") : "");
    const out = this.#filter.push(text);
    return last && !out.stopped ? { text: out.text + this.#filter.end(), stopped: false } : out;
  }
}

function tokenOf(result: Result, text: string, logprobs: number | undefined): Token {
  if (logprobs === undefined) return { id: result.token, text };
  const top = result.top_id
    .slice(0, result.n_top)
    .map((id, i) => ({ id, logprob: result.top_logprob[i] as number }));
  return { id: result.token, text, logprob: result.logprob, ...(logprobs > 0 ? { top } : {}) };
}

/** Errors: BAD_CHECKPOINT where the logits after this position are no numbers. */
export function assertNumbers({ logprob }: Result, position: number): void {
  if (Number.isNaN(logprob))
    throw new FreeKVError(
      "BAD_CHECKPOINT",
      `the model's logits after position ${position} are not numbers: its weights are damaged, or overflow their dtype`,
    );
}

/** Does `work`; where something `failed` before, the caller is to hear of that, not of what goes wrong now. */
export async function cleanUp(failed: boolean, work: () => Promise<void>): Promise<void> {
  try {
    await work();
  } catch (error) {
    if (!failed) throw error;
  }
}

/** `promise`, unless the signal aborts first: then a rejection with its reason. */
export function abortable<T>(promise: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (!signal) return promise;
  return new Promise((resolve, reject) => {
    const abort = (): void => reject(signal.reason);
    if (signal.aborted) return abort();
    signal.addEventListener("abort", abort, { once: true });
    promise.then(resolve, reject).finally(() => signal.removeEventListener("abort", abort));
  });
}
