/// <reference lib="esnext.disposable" preserve="true" />
// How much of recall's time speculation hides: the same tokens under retrieve and freekv, over a link as slow as a GPU's is to it.
//
// The link. What matters is the time that moving a step's recalled bytes takes, against the time that the step computes. On an
// H100 at 32K tokens, Llama-3.1-8B in bf16 recalls about 52 head pages of 16 KiB a layer in each step: 52 × 32 layers × 16 KiB =
// 27 MB, at 54 GB/s 0.5 ms, against a step of about 5 ms: a tenth. So a first pass without a link measures what retrieve recalls
// and computes here, in its time without waits, and the link moves those bytes in a tenth of that.
// A budget of a sixteenth of the book is that of 2048 tokens in 32K.
// Compute leaves one core to the side branch, as the dense chain leaves side kernels their part of a GPU.

import { demoModel } from "../lib/demo.ts";
import type { PolicyOptions } from "../lib/types.ts";
import type { Bench } from "./bench.ts";
import { cores } from "./machine.ts";
import { spread, sum } from "./measure.ts";
import { type Material, material, Reader, type Steps } from "./replay.ts";
import type { Row } from "./table.ts";

const bookTokens = 8192;
const leastAsked = 128;
const budget = bookTokens / 16;
const sink = 64;
const window = 128;
const pageSize = 32;
const k = (budget - sink - window) / pageSize;
const moveShare = 0.1;
const repetitions = 5;
/** Most of retrieve's waiting that freekv may keep where nothing is corrected, in per cent. */
const goal = 10;

function open(made: Material, slots: number, linkBytesPerSecond: number): Promise<Reader> {
  return Reader.open(made, {
    device: "cpu",
    ...{ budget, sink, window, pageSize, slots },
    maxContext: bookTokens + 1024,
    maxSequences: 2,
    twin: { threads: Math.max(1, cores - 1), linkBytesPerSecond },
  });
}

interface Calibration {
  /** Bytes a second. */
  readonly link: number;
  /** What retrieve computes in a step, and recalls for it. */
  readonly computeMs: number;
  readonly movedKiB: number;
}

/** From what retrieve recalls and computes where moving costs nothing. */
async function calibrate(made: Material): Promise<Calibration> {
  await using reader = await open(made, 2 * k, 0);
  const [outcome] = await measureAll(reader, [{ name: "retrieve", policy: { policy: "retrieve" } }]);
  const { waited, wall, counters } = outcome as Outcome;
  const computeMs = spread(wall.map((ms, i) => ms - (waited[i] as number))).median;
  const bytes = (counters.misses_now * reader.core.geometry.headPageBytes) / wall.length;
  if (bytes === 0) throw new Error("retrieve recalled nothing: the budget holds the whole book");
  return { link: bytes / ((moveShare * computeMs) / 1e3), computeMs, movedKiB: bytes / 1024 };
}

interface Case {
  readonly name: string;
  readonly policy: PolicyOptions;
}
function cases(slots: number): Case[] {
  const ahead = [0, 4, 16].filter((e) => e <= slots - k);
  const corrected = (["threshold", "exact"] as const).flatMap((correction) =>
    ahead.map((prefetch) => ({ policy: "freekv" as const, correction, prefetch })),
  );
  return [
    { name: "retrieve", policy: { policy: "retrieve" } },
    { name: "freekv, uncorrected", policy: { policy: "freekv", correction: "off" } },
    ...corrected.map((policy) => ({
      name: policy.correction === "exact" ? "freekv, exact" : "freekv",
      policy,
    })),
  ];
}

/** Each step's middle value over the repetitions, all of which feed the same tokens: what else ran here is left out. */
function typical(repetitions: readonly (readonly number[])[]): number[] {
  return (repetitions[0] as readonly number[]).map(
    (_, step) => spread(repetitions.map((each) => each[step] as number)).median,
  );
}

interface Outcome {
  /** Of each step, ms. */
  readonly waited: readonly number[];
  readonly wall: readonly number[];
  readonly counters: Steps["counters"];
}

const mean = (values: readonly number[]): number => sum(values) / values.length;

function rowOf(
  { name, policy }: Case,
  slots: number,
  headPageBytes: number,
  own: Outcome,
  retrieve: Outcome,
): Row {
  const { counters: c, waited } = own;
  const tokens = waited.length;
  const { p25, p75 } = spread(waited);
  const share = (100 * mean(waited)) / mean(retrieve.waited);
  const isGoal = policy.correction === "off";
  const found = c.hits + c.misses_now + c.misses_next;
  return {
    case: name,
    "slots/k": slots / k,
    prefetch: policy.prefetch ?? 0,
    "pages before attention/token": c.misses_now / tokens,
    "beside/token": c.misses_next / tokens,
    "prefetched/token": c.prefetched / tokens,
    "recalled KiB/token": ((c.misses_now + c.misses_next + c.prefetched) * headPageBytes) / tokens / 1024,
    "hits %": found > 0 ? (100 * c.hits) / found : null,
    "heads flagged %": c.heads > 0 ? (100 * c.flagged) / c.heads : null,
    "waited us/token": 1e3 * mean(waited),
    "waited p25": 1e3 * p25,
    "waited p75": 1e3 * p75,
    "of retrieve's %": share,
    "goal %": isGoal ? goal : null,
    met: isGoal ? share <= goal : null,
    "step ms": spread(own.wall).median,
  };
}

/** Every case, in turns, so that all of them meet the same weather. The first repetition warms up and is dropped. */
async function measureAll(reader: Reader, chosen: readonly Case[]): Promise<Outcome[]> {
  const all = chosen.map(() => [] as Steps[]);
  for (let i = 0; i <= repetitions; i++)
    for (const [at, { policy }] of chosen.entries()) {
      const steps = await reader.feed(policy);
      if (i > 0) (all[at] as Steps[]).push(steps);
    }
  return all.map((runs) => ({
    waited: typical(runs.map((run) => run.stallMs)),
    wall: typical(runs.map((run) => run.wallMs)),
    counters: (runs[0] as Steps).counters,
  }));
}

export const overlap: Bench = {
  title: "Overlap: waiting for recall",
  async run({ model, say }) {
    const made = await material(model ?? demoModel, bookTokens, leastAsked);
    say("calibrating the link");
    const { link, computeMs, movedKiB } = await calibrate(made);
    const rows: Row[] = [];
    for (const slots of [k, 2 * k, 4 * k]) {
      say(`${slots} slots: prefill`);
      await using reader = await open(made, slots, link);
      const chosen = cases(slots);
      say(`${slots} slots: ${chosen.length} policies`);
      const outcomes = await measureAll(reader, chosen);
      const retrieve = outcomes[0] as Outcome;
      for (const [i, each] of chosen.entries())
        rows.push(rowOf(each, slots, reader.core.geometry.headPageBytes, outcomes[i] as Outcome, retrieve));
    }
    const notes = [
      `${made.book.length} tokens of book, budget ${budget} = ${sink} sink + ${window} window + ${k} pages of ${pageSize}, ${made.asked.length} tokens of questions fed. Pages are head pages, over all layers and heads. Times of a step are the middle of ${repetitions} repetitions; waited/token is their mean over the steps, its quartiles are over the steps.`,
      `Simulated link of ${(link / 1e6).toFixed(0)} MB/s: it moves the ${movedKiB.toFixed(0)} KiB that retrieve recalls a token in ${100 * moveShare}% of the ${computeMs.toFixed(2)} ms that a step computes, as an H100's link does at 32K tokens of Llama-3.1-8B.`,
    ];
    return { rows, notes };
  },
};
