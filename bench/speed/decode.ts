// Steps of sequences that share a batch, as a program's generations do: what each took, and what it counted.

import { type Result, Run } from "../../lib/batch.ts";
import { Event } from "../../lib/device.ts";
import { greedy } from "../../lib/row.ts";
import type { State } from "../../lib/state.ts";
import { sum } from "../measure.ts";
import { type Rig, tokenAt } from "./rig.ts";
import { sequenceBytes, weightBytes } from "./shape.ts";

type Counters = Result["counters"];

export interface Decoded {
  /** From one result to the next, which is a token of every sequence. */
  readonly stepMs: readonly number[];
  /** Of each step, what attention waited for selections and recalls. */
  readonly stallMs: readonly number[];
  /** Of a step, over all rows, layers and heads. */
  readonly mean: Readonly<Counters>;
  /** Bytes of a step: every weight, attended K and V, scored digests, once each. */
  readonly bytes: number;
  /** Of a step, recalled before attention and beside the step. */
  readonly beforeBytes: number;
  readonly besideBytes: number;
  readonly flaggedShare: number;
  /** Of the pages selected by every head in a step. */
  readonly missedShare: number;
}

export interface DecodeOptions {
  readonly steps?: number;
  readonly warmups?: number;
  /** No further step begins after this, if there are at least `leastSteps` of them. */
  readonly budgetMs?: number;
  /** Nor after this says so. */
  readonly until?: () => boolean;
}
const leastSteps = 12;

/** Feeds tokens known beforehand, so that random weights do not decide what is measured. */
export async function decode(rig: Rig, states: readonly State[], o: DecodeOptions = {}): Promise<Decoded> {
  const { shape, core } = rig;
  const warmups = o.warmups ?? shape.warmups;
  const steps = warmups + (o.steps ?? shape.steps);
  const at: number[] = [];
  const stallMs: number[] = [];
  const counted: Counters[] = [];
  let deadline = Number.POSITIVE_INFINITY;
  let measured = steps;
  const feed = async (state: State, row: number): Promise<void> => {
    const base = state.length;
    const run = new Run(state, steps, greedy, (i) => ({
      draw: false,
      token: tokenAt(shape, base + i),
      target: -1,
    }));
    for (let i = 0; i < measured; i++) {
      const told = await rig.batch.next(run);
      if (row === 0) {
        at.push(told.at);
        stallMs.push(told.stallMs);
        if (i === warmups) deadline = performance.now() + (o.budgetMs ?? Number.POSITIVE_INFINITY);
        const enough = performance.now() > deadline || o.until?.() === true;
        if (i >= warmups + leastSteps && enough) measured = i + 1;
      }
      if (i >= warmups) counted.push(told.result.counters);
    }
    await rig.batch.finish(run);
  };
  await Promise.all(states.map(feed));

  const n = measured - warmups;
  const names = Object.keys(counted[0] as Counters) as (keyof Counters)[];
  const mean = Object.fromEntries(
    names.map((name) => [name, sum(counted.map((each) => each[name])) / n]),
  ) as unknown as Counters;
  const { headPageBytes, kvHeads, layers } = core.geometry;
  const everySelected = sum(states.map(({ lane }) => lane.plan.k * layers * kvHeads));
  const share = (part: number, whole: number): number => (whole > 0 ? part / whole : 0);
  return {
    stepMs: at.slice(warmups).map((each, i) => each - (at[warmups + i - 1] as number)),
    stallMs: stallMs.slice(warmups),
    mean,
    bytes:
      weightBytes(shape.config) +
      sum(states.map((state) => sequenceBytes(core.geometry, state.lane.plan, state.length))),
    beforeBytes: mean.misses_now * headPageBytes,
    besideBytes: (mean.misses_next + mean.prefetched) * headPageBytes,
    flaggedShare: share(mean.flagged, mean.heads),
    missedShare: share(mean.misses_now + mean.misses_next, everySelected),
  };
}

/**
 * Milliseconds of `work` in which the host did not wait for the device. With `awake`, it waits by asking again and again: a core that
 * sleeps between steps, as it does otherwise, runs slower for a while when it wakes.
 */
export async function hostBusyMs(awake: boolean, work: () => Promise<void>): Promise<number> {
  const own = Event.prototype.done;
  let idle = 0;
  Event.prototype.done = async function (this: Event): Promise<void> {
    const from = performance.now();
    if (awake) while (!this.query());
    else await own.call(this);
    idle += performance.now() - from;
  };
  const began = performance.now();
  try {
    await work();
  } finally {
    Event.prototype.done = own;
  }
  return performance.now() - began - idle;
}
