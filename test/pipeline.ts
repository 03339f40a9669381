// What the pipeline's tests share: engines on a tiny random checkpoint, and decoding as values that can be compared bit
// for bit. The shapes leave far more candidate pages than are selected, so that a wrong page shows in every number.

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after } from "node:test";
import { assert } from "@std/assert";
import { Engine, loadCore } from "../lib/engine.ts";
import type { Sequence } from "../lib/sequence.ts";
import type { EngineOptions, GenerateOptions, TokenIds } from "../lib/types.ts";
import type { WaitName } from "../lib/waits.ts";
import { type TinyOptions, writeTinyCheckpoint } from "./checkpoints.ts";
import { onTarget } from "./target.ts";

export const timeout = 60_000;

/** A budget of 8 pages: 2 of sink, 2 of window, 4 selected. */
export const small = { pageSize: 16, budget: 128, sink: 32, window: 32 } as const;
/** What `small` selects a head. */
export const k = 4;

const folders: string[] = [];
after(() => {
  for (const folder of folders) rmSync(folder, { recursive: true, force: true });
});

/** A checkpoint that is gone when the file's tests are done. */
export function checkpoint(options: TinyOptions = {}): string {
  const dir = mkdtempSync(join(tmpdir(), "freekv-pipeline-"));
  folders.push(dir);
  return writeTinyCheckpoint(dir, { layers: 3, ...options });
}

/** On the run's device, with the budget of `small` unless told otherwise. */
export const load = (dir: string, options: EngineOptions = {}): Promise<Engine> =>
  Engine.load(dir, onTarget({ ...small, ...options }));

/** The same without one of its waits. */
export async function loadWithout(dir: string, wait: WaitName, options: EngineOptions): Promise<Engine> {
  return new Engine(await loadCore(dir, onTarget({ ...small, ...options }), wait));
}

/** Token ids that depend on the seed alone. Some follow each other in runs, so that some queries resemble their predecessors. */
export function tokens(length: number, seed = 1, vocab = 96): number[] {
  let state = Math.imul(seed, 0x9e3779b9) | 1;
  const draw = (n: number): number => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) % n;
  };
  for (let i = 0; i < 8; i++) draw(1);
  const ids: number[] = [];
  while (ids.length < length) {
    const id = 3 + draw(vocab - 3); // not one of the special tokens
    for (let n = draw(4); n >= 0 && ids.length < length; n--) ids.push(id);
  }
  return ids;
}

/** What a decode path said of each token: log-probability of the next one, and its own choice. */
export interface Trace {
  logprobs: number[];
  argmax: number[];
}

/** Feeds `ids` through the decode path. */
export async function score(sequence: Sequence, ids: TokenIds): Promise<Trace> {
  const trace: Trace = { logprobs: [], argmax: [] };
  for await (const { logprob, argmax } of sequence.score(ids)) {
    assert(Number.isFinite(logprob) && logprob < 0, `a log-probability of ${logprob}`);
    trace.logprobs.push(logprob);
    trace.argmax.push(argmax);
  }
  return trace;
}

/** `maxTokens` tokens with their log-probabilities. */
export async function generate(sequence: Sequence, options: GenerateOptions): Promise<Trace> {
  const trace: Trace = { logprobs: [], argmax: [] };
  for await (const { id, logprob } of sequence.generate({ ignoreEos: true, logprobs: 0, ...options })) {
    trace.logprobs.push(logprob as number);
    trace.argmax.push(id);
  }
  return trace;
}

/** Prefills the first `at` of `ids` on a sequence of its own and scores the rest. */
export async function scoreFrom(
  engine: Engine,
  ids: readonly number[],
  at: number,
  policy: Parameters<Engine["prefill"]>[1] = {},
): Promise<Trace> {
  using sequence = await engine.prefill(ids.slice(0, at), policy);
  return await score(sequence, ids.slice(at));
}

/** The largest difference of the log-probabilities. */
export function distance(a: Trace, b: Trace): number {
  return Math.max(...a.logprobs.map((value, i) => Math.abs(value - (b.logprobs[i] ?? Number.NaN))));
}
