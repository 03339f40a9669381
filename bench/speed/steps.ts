// Rows of decode steps through the captured graph, as users get them.

import type { State } from "../../lib/state.ts";
import type { PolicyOptions } from "../../lib/types.ts";
import { type Decoded, decode, hostBusyMs } from "./decode.ts";
import type { Line } from "./report.ts";
import type { Rig } from "./rig.ts";
import {
  contextName,
  few,
  floorMs,
  force,
  forcedSteps,
  many,
  medianMs,
  type Run,
  share,
  told,
} from "./run.ts";

/** The published reference's own figure on an H200 at this shape: 32K, batch 1, 12% of heads corrected. */
const publishedMs = 21.5;

const one = async (
  rig: Rig,
  tokens: number,
  policy: PolicyOptions,
  use: (state: State) => Promise<void>,
): Promise<void> => {
  const state = await rig.sequence(tokens, policy);
  try {
    await use(state);
  } finally {
    rig.release(state);
  }
};

const tpot = (row: number | null, name: string, decoded: Decoded, more: Partial<Line> = {}): Line => ({
  ...{ row, case: name, unit: "ms", value: decoded.stepMs, decoded },
  ...more,
});

const against = (run: Run, decoded: Decoded, combined = false): Pick<Line, "against"> => ({
  against: { value: floorMs(run, decoded, combined), is: combined ? "HBM + recall floor" : "HBM floor" },
});

/** A step's time against that of another, which must be `least` times as long. */
const faster = (run: Run, other: string, is: string, least: number): Partial<Line> => {
  const value = run.known.get(other);
  return value === undefined ? {} : { against: { value, is }, inverse: true, target: { of: "ratio", least } };
};

/** Batch 1 at the base context: flags, corrections, host time. */
export async function baseSteps(run: Run, rig: Rig): Promise<void> {
  const { base } = run.shape.contexts;
  const at = contextName(base);
  await one(rig, base, {}, async (state) => {
    const rare = await forcedSteps(rig, [state], few);
    run.known.set("base few", medianMs(rare));
    if (run.wants(3))
      run.emit(
        tpot(3, `TPOT, ${at}, threshold, ${told(few)}`, rare, {
          ...against(run, rare),
          target: { of: "ratio", most: 1.3 },
        }),
      );
    if (run.wants(13))
      run.emit(
        tpot(13, `the published reference on an H200, ${publishedMs} ms, against this on ${run.card}`, rare, {
          against: { value: publishedMs, is: "published on an H200" },
          ...{ inverse: true, target: { of: "ratio", least: 5 } },
        }),
      );
    if (run.wants(6))
      run.emit(
        tpot(
          6,
          `freekv, ${at}, batch 1, ${told(few)}`,
          rare,
          faster(run, "fragmented 1", "retrieve + fragmented", 5),
        ),
      );
    if (run.wants(4, 7, 8)) {
      const often = await forcedSteps(rig, [state], many);
      run.known.set("base many", medianMs(often));
      if (run.wants(4))
        run.emit(
          tpot(4, `TPOT, ${at}, threshold, ${told(many)}`, often, {
            ...against(run, often, true),
            target: { of: "ratio", most: 1.4 },
          }),
        );
      if (run.wants(7))
        run.emit(
          tpot(
            7,
            `freekv, ${at}, ${told(many)}`,
            often,
            faster(run, `published ${many.flagged}`, "as published", 2),
          ),
        );
    }
    if (run.wants(14)) await hostTime(run, rig, state);
  });
  if (run.wants(4)) await corrections(run, rig);
}

async function hostTime(run: Run, rig: Rig, state: State): Promise<void> {
  force(rig, few);
  const { orchestration } = rig.core;
  const step = orchestration.step.bind(orchestration);
  let launchMs = 0;
  orchestration.step = (rows: never): void => {
    const from = performance.now();
    step(rows);
    launchMs += performance.now() - from;
  };
  const { steps } = run.shape;
  await decode(rig, [state], { steps, warmups: 1 }); // or the first samples time code that is still being compiled
  const measure = async (awake: boolean): Promise<{ samples: number[]; launchUs: number }> => {
    const samples: number[] = [];
    launchMs = 0;
    for (let i = 0; i < 4; i++) {
      const busy = await hostBusyMs(awake, async () => {
        await decode(rig, [state], { steps, warmups: 1 });
      });
      samples.push((1e3 * busy) / (steps + 1));
    }
    return { samples, launchUs: (1e3 * launchMs) / (samples.length * (steps + 1)) };
  };
  try {
    for (const awake of [true, false]) {
      const { samples, launchUs } = await measure(awake);
      run.emit({
        ...{ row: 14, unit: "us", value: samples },
        case: `host time a token in TypeScript, captured, a core that ${awake ? "is kept awake" : "sleeps between steps"}`,
        ...(awake && { target: { of: "value", most: 60 } as const }),
        note: `wall time less the time inside Event.done, over ${steps + 1} tokens a sample; ${launchUs.toFixed(1)} us of it is the call that launches the graph`,
      });
    }
  } finally {
    orchestration.step = step;
  }
}

/** The other ways to correct: off, exact, exact with prefetch, and retrieval that blocks. */
async function corrections(run: Run, rig: Rig): Promise<void> {
  const { base } = run.shape.contexts;
  const at = contextName(base);
  const cases: [string, PolicyOptions, number | null][] = [
    ["correction off", { correction: "off" }, null],
    ["exact", { correction: "exact" }, 1.45],
    ["exact, prefetch 8", { correction: "exact", prefetch: 8 }, 1.45],
    ["retrieve", { policy: "retrieve" }, null],
  ];
  for (const [name, policy, most] of cases)
    await one(rig, base, policy, async (state) => {
      const decoded = await forcedSteps(rig, [state], few);
      run.emit(
        tpot(most === null ? null : 4, `TPOT, ${at}, ${name}, ${share(few.missed)} missed`, decoded, {
          ...against(run, decoded, true),
          ...(most === null ? {} : { target: { of: "ratio", most } }),
        }),
      );
    });
}

/** Each context against the one before. `measured`: the base context's, if it is at hand. */
export async function contextSteps(run: Run, rig: Rig): Promise<void> {
  const { short, base, long, longest } = run.shape.contexts;
  let before: { ms: number; tokens: number } | undefined;
  for (const tokens of [short, base, long, longest]) {
    run.say(`${contextName(tokens)} tokens`);
    await one(rig, tokens, {}, async (state) => {
      const decoded = await forcedSteps(rig, [state], few);
      const ms = medianMs(decoded);
      const floor = floorMs(run, decoded);
      run.emit(
        tpot(5, `TPOT, ${contextName(tokens)}, ${told(few)}`, decoded, {
          ...(before && {
            against: { value: before.ms, is: `TPOT at ${contextName(before.tokens)}` },
            target: { of: "ratio", most: 1.2 },
          }),
          note: `${(ms / floor).toFixed(3)} of the HBM floor of ${floor.toFixed(3)} ms`,
        }),
      );
      before = { ms, tokens };
      if (tokens === longest && run.wants(9)) memory(run, rig, state, tokens);
    });
  }
}

/** Frames and digests of one sequence on the device, against all of its K and V. */
function memory(run: Run, rig: Rig, state: State, tokens: number): void {
  const { deviceKvBytes, totalKvBytes } = state.stats();
  const { k, slots } = state.lane.plan;
  const { blockBytes, layers, frameBytes } = rig.core.geometry;
  for (const m of [slots, 3 * k]) {
    const bytes = deviceKvBytes + (m - slots) * layers * frameBytes;
    run.emit({
      ...{ row: 9, case: `device KV bytes at ${contextName(tokens)}, m = ${m / k}k`, unit: "MiB" },
      value: bytes / 2 ** 20,
      against: { value: totalKvBytes / 2 ** 20, is: "all K and V" },
      target: { of: "ratio", most: 0.04 },
      note: `of ${(rig.core.device.memory().allocatedBytes / 2 ** 20).toFixed(0)} MiB that this engine has; a page is ${blockBytes / 1024} KiB`,
    });
  }
}

/** Everything on the device and attended, where it still fits. */
export async function fullSteps(run: Run, rig: Rig): Promise<void> {
  const { long } = run.shape.contexts;
  const at = contextName(long);
  await one(rig, long, { policy: "full" }, async (state) => {
    run.say(`full, ${at}`);
    const decoded = await forcedSteps(rig, [state], few);
    run.known.set("full", medianMs(decoded));
    run.emit(tpot(8, `full, on the device, ${at}`, decoded, against(run, decoded)));
  });
  await one(rig, long, {}, async (state) => {
    for (const forced of [few, many]) {
      const decoded = await forcedSteps(rig, [state], forced);
      run.emit(tpot(8, `freekv, ${at}, ${told(forced)}`, decoded, faster(run, "full", `full, ${at}`, 1.6)));
    }
  });
}

/** Several sequences a step, of different lengths. */
export async function batchSteps(run: Run, rig: Rig, states: readonly State[]): Promise<void> {
  const at = contextName(run.shape.contexts.base);
  const rare = { flagged: few.flagged, missed: 0.1 };
  if (run.wants(6)) {
    const four = await forcedSteps(rig, states.slice(0, 4), few);
    run.emit(
      tpot(
        6,
        `freekv, ${at}, batch 4, ${told(few)}`,
        four,
        faster(run, "fragmented 4", "retrieve + fragmented", 13),
      ),
    );
  }
  if (!run.wants(11)) return;
  let alone: number | undefined;
  for (const batch of [1, 2, 4, 8]) {
    run.say(`batch ${batch}`);
    const decoded = await forcedSteps(rig, states.slice(0, batch), rare);
    alone ??= 1e3 / medianMs(decoded);
    const seconds = decoded.stepMs.map((ms) => (1e3 * batch) / ms);
    const floors = { hbm: floorMs(run, decoded), combined: floorMs(run, decoded, true) };
    run.emit({
      ...{
        row: 11,
        case: `batch ${batch} × ${at}, ragged, ${told(rare)}`,
        unit: "tokens/s",
        value: seconds,
        decoded,
      },
      ...(batch > 1 && { against: { value: alone, is: "batch 1" } }),
      ...(batch === 8 && { target: { of: "ratio", least: 5 } as const }),
      note: `${medianMs(decoded).toFixed(3)} ms a step; HBM floor ${floors.hbm.toFixed(3)}, with recall before attention ${floors.combined.toFixed(3)}`,
    });
  }
}
