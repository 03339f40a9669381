/// <reference lib="esnext.disposable" preserve="true" />
// A model that has read a book, and the same tokens fed to forks of that sequence under one policy after another.

import { existsSync } from "node:fs";
import { join } from "node:path";
import { Batch, type Result, Run } from "../lib/batch.ts";
import { folderPath, readConfig } from "../lib/checkpoint.ts";
import { Core } from "../lib/core.ts";
import { Device } from "../lib/device.ts";
import { resolveEngine } from "../lib/engine.ts";
import { type Policy, resolvePolicy } from "../lib/options.ts";
import { greedy } from "../lib/row.ts";
import { State } from "../lib/state.ts";
import { chooseQuestions, makeBook } from "../lib/tasks/index.ts";
import { loadTokenizer } from "../lib/tokenizer.ts";
import type { EngineOptions, PolicyOptions } from "../lib/types.ts";
import { openCheckpoint } from "../lib/weights.ts";
import { sum } from "./measure.ts";

export interface Material {
  readonly dir: string;
  readonly book: Int32Array;
  /** Questions about the book and their answers, as they would follow it. */
  readonly asked: Int32Array;
}

/** A book of `tokens` tokens, and at least `least` tokens of questions about it. */
export async function material(dir: string | URL, tokens: number, least: number): Promise<Material> {
  const path = folderPath(dir);
  if (!existsSync(join(path, "model.safetensors")))
    throw new Error(`${path} has no model.safetensors; give a model with --model DIR`);
  const tokenizer = await loadTokenizer(path);
  const made = makeBook({ seed: 1, tokens, tokenizer });
  const asked: number[] = [];
  for (const { prompt, answer } of chooseQuestions(made, 40, 1)) {
    if (asked.length >= least) break;
    asked.push(...tokenizer.encode(prompt + answer, { addBos: false }));
  }
  return { dir: path, book: tokenizer.encode(made.text), asked: Int32Array.from(asked) };
}

/** What one policy did, a step each. */
export interface Steps {
  /** Time that attention waited for recall. */
  readonly stallMs: readonly number[];
  /** From one result to the next. */
  readonly wallMs: readonly number[];
  /** Sums over all steps, layers and heads. */
  readonly counters: Readonly<Result["counters"]>;
}

export class Reader implements AsyncDisposable {
  readonly core: Core;
  readonly #batch: Batch;
  readonly #asked: Int32Array;
  readonly #policy: Policy;
  readonly #book: State;

  private constructor(core: Core, policy: Policy, book: State, asked: Int32Array) {
    this.core = core;
    this.#policy = policy;
    this.#book = book;
    this.#asked = asked;
    this.#batch = new Batch(core);
  }

  static async open(made: Material, options: EngineOptions): Promise<Reader> {
    const { policy, core: own } = resolveEngine(readConfig(made.dir), options);
    using checkpoint = openCheckpoint(made.dir);
    const device = Device.open({ device: options.device as "cpu" | undefined, ...options.twin });
    const core = await Core.load(device, checkpoint, own, {});
    const book = new State(core, policy);
    await book.append(made.book, {});
    return new Reader(core, policy, book, made.asked);
  }

  /** Feeds the questions through the decode path of a fork, teacher-forced: every policy sees the same tokens. */
  async feed(policy: PolicyOptions): Promise<Steps> {
    const { layers, pageSize } = this.core.geometry;
    const state = this.#book.fork(resolvePolicy(this.#policy, policy, pageSize, layers));
    await this.core.reached();
    const asked = this.#asked;
    const run = new Run(state, asked.length, greedy, (i) => ({
      draw: false,
      token: asked[i] as number,
      target: asked[i + 1] ?? -1,
    }));
    const stallMs: number[] = [];
    const wallMs: number[] = [];
    const results: Result[] = [];
    let before = performance.now();
    for (let i = 0; i < asked.length; i++) {
      const { result, stallMs: waited } = await this.#batch.next(run);
      const now = performance.now();
      stallMs.push(waited);
      wallMs.push(now - before);
      before = now;
      results.push(result);
    }
    await this.#batch.finish(run);
    state.release();
    const names = Object.keys(results[0]!.counters) as (keyof Result["counters"])[];
    const total = (name: keyof Result["counters"]): number => sum(results.map((each) => each.counters[name]));
    const counters = Object.fromEntries(names.map((name) => [name, total(name)])) as Result["counters"];
    return { stallMs, wallMs, counters };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.core.reached();
    this.#book.release();
    this.#batch[Symbol.dispose]();
    this.core[Symbol.dispose]();
  }
}
