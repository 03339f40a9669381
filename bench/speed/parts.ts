// Single launches and what a step is made of: recall by itself, retrieval by itself, and a step that grows part by part.

import type { State } from "../../lib/state.ts";
import { spread } from "../measure.ts";
import { gatherRates } from "./gather.ts";
import { type Launched, launchParts, type Parts } from "./launches.ts";
import type { Rig } from "./rig.ts";
import { contextName, few, force, many, type Run, share, told } from "./run.ts";
import { weightBytes } from "./shape.ts";

const gibi = 2 ** 30;

/** Recall of scattered head pages, against one large copy. `states`: as many as lists need lanes. */
export function gatherLines(run: Run, rig: Rig, states: readonly State[]): void {
  const { blockBytes, headPageBytes, kvHeads } = rig.core.geometry;
  const every = [...new Set([...rig.filled, ...states.flatMap(({ blocks }) => blocks)])];
  const near = every.slice(0, Math.ceil(gibi / blockBytes));
  const slots = (states[0] as State).lane.plan.slots;
  const cases: [number, readonly number[], number | undefined][] = [
    [256, near, 0.84],
    [512, every, 0.8],
    [2048, near, 0.9],
    [2048, every, undefined],
    [4096, near, 0.9],
  ];
  for (const [pages, blocks, least] of cases) {
    if (pages > states.length * kvHeads * slots) continue;
    const gib = (blocks.length * blockBytes) / gibi;
    run.say(`gather ${pages} pages`);
    run.emit({
      row: 1,
      case: `gather of ${pages} head pages of ${headPageBytes / 1024} KiB, pool of ${gib.toPrecision(3)} GiB`,
      ...{ unit: "GB/s", value: gatherRates(rig, states, { pages, blocks }).map((rate) => rate / 1e9) },
      against: { value: run.rates.toDevice.median / 1e9, is: "large copy to the device" },
      ...(least !== undefined && { target: { of: "ratio", least } as const }),
    });
  }
}

const served = ({ ms, counters: { flagged, heads, misses_now, misses_next } }: Launched): string =>
  `${flagged} heads of ${heads} flagged and ${misses_now + misses_next} pages recalled in the last of ${ms.length} graphs`;

/** One launch of a layer, of as many in a graph as there are layers; each reads what no cache holds. */
async function launch(run: Run, rig: Rig, o: LaunchCase): Promise<void> {
  const { base } = run.shape.contexts;
  const { layers } = run.shape.config;
  const state = await rig.sequence(base, o.policy);
  force(rig, o.forced);
  if (!o.parts.now) launchParts(rig, [state], { now: true }, 1); // which heads are flagged
  const alone = launchParts(rig, [state], o.parts);
  const perLayer = ({ ms }: Launched): number[] => ms.map((each) => (1e3 * each) / layers);
  if (!o.parts.next) {
    // Between dense chains it begins before the one ahead ends, and the one behind before it ends itself.
    const chain = spread(perLayer(launchParts(rig, [state], { dense: true }))).median;
    const within = launchParts(rig, [state], { dense: true, ...o.parts });
    const value = perLayer(within);
    run.emit({
      ...{ row: null, case: `a dense chain and ${o.name}, ${contextName(base)}`, unit: "us", value },
      against: { value: chain, is: "a dense chain alone" },
      note: `${(spread(value).median - chain).toFixed(2)} us more; ${served(within)}`,
    });
  }
  run.emit({
    ...{ row: o.most === undefined ? null : 2, case: `${o.name}, ${contextName(base)}`, unit: "us" },
    value: perLayer(alone),
    ...(o.floorBytes && {
      against: { value: (1e6 * o.floorBytes(state)) / run.rates.read.median, is: "HBM floor" },
    }),
    ...(o.most !== undefined && { target: { of: "value", most: o.most } as const }),
    note: served(alone),
  });
  rig.release(state);
}

interface LaunchCase {
  readonly name: string;
  readonly policy: Parameters<Rig["sequence"]>[1];
  readonly forced: Parameters<typeof force>[1];
  readonly parts: Parts;
  /** Microseconds that are asked for. */
  readonly most?: number;
  readonly floorBytes?: (state: State) => number;
}

export async function launchLines(run: Run, rig: Rig): Promise<void> {
  const { digestBytes, frameBytes, layers } = rig.core.geometry;
  const still = { flagged: 0, missed: 0 };
  const moving = { flagged: 0, missed: few.missed };
  const digests = ({ length, lane: { plan } }: State): number =>
    (Math.floor(length / run.shape.pageSize) - plan.sinkPages - plan.windowPages) * (digestBytes / layers);
  const attended = ({ lane: { plan } }: State): number =>
    (plan.sinkPages + plan.windowPages + plan.k) * frameBytes;
  const exact = { correction: "exact" } as const;
  const never = { tau: -1 };
  const now = { now: true };
  const cases: LaunchCase[] = [
    { name: "retrieve before attention, no head flagged", policy: never, forced: still, parts: now, most: 3 },
    {
      ...{
        name: "retrieve before attention, all flagged, no miss",
        policy: exact,
        forced: still,
        parts: now,
      },
      ...{ most: 10, floorBytes: digests },
    },
    {
      name: `retrieve before attention, all flagged, ${share(few.missed)} missed`,
      policy: exact,
      forced: moving,
      parts: now,
    },
    {
      name: "retrieve for the next step, no miss",
      policy: never,
      forced: still,
      parts: { next: true },
      floorBytes: digests,
    },
    {
      name: `retrieve for the next step, ${share(few.missed)} missed`,
      policy: never,
      forced: moving,
      parts: { next: true },
    },
    { name: "attend", policy: never, forced: still, parts: { attend: true }, floorBytes: attended },
  ];
  for (const each of cases) await launch(run, rig, each);
}

/** The whole of a step, part after part. */
export async function stepLines(run: Run, rig: Rig): Promise<void> {
  const { base } = run.shape.contexts;
  const grown: [string, Parts][] = [
    ["dense chains", { dense: true }],
    ["+ attend", { dense: true, attend: true }],
    ["+ retrieve before it", { dense: true, attend: true, now: true }],
    ["+ retrieve for the next step", { dense: true, attend: true, now: true, next: true }],
    ["+ embedding, logits, sampling", { dense: true, attend: true, now: true, next: true, ends: true }],
  ];
  for (const forced of [few, many]) {
    const state = await rig.sequence(base);
    force(rig, forced);
    for (const [name, parts] of grown) {
      if (!parts.now && forced === many) continue; // as with few
      const { config } = run.shape;
      const head = 2 * config.vocab * config.hidden;
      const bytes = weightBytes(config) - (parts.ends ? 0 : head);
      const { ms } = launchParts(rig, [state], parts);
      run.emit({
        ...{
          row: null,
          case: `a step of ${name}, ${contextName(base)}, ${told(forced)}`,
          unit: "ms",
          value: ms,
        },
        against: { value: (1e3 * bytes) / run.rates.read.median, is: "weights at HBM read rate" },
        note: `${((1e3 * (spread(ms).median - (1e3 * bytes) / run.rates.read.median)) / config.layers).toFixed(2)} us a layer over the floor`,
      });
    }
    rig.release(state);
  }
}
