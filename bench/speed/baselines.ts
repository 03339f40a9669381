/// <reference lib="esnext.disposable" preserve="true" />
// What freekv is compared with, of the same kernels: blocking retrieval by fragmented copies, and the paper as published. Each has an
// engine of its own, since its recall path is the engine's.

import { Rig, type RigOptions } from "./rig.ts";
import { averaged, contextName, few, forcedSteps, many, medianMs, type Run, told } from "./run.ts";
import { fedTokens, selectedPages } from "./shape.ts";

/** Fragmented copies take up to half a second a step. */
const budgetMs = 6000;

const options = (run: Run, sequences: number): RigOptions => {
  const { base } = run.shape.contexts;
  return {
    maxContext: base + fedTokens(run.shape),
    pooledTokens: sequences * base,
    maxSequences: sequences,
    orchestration: "host",
  };
};

/** `retrieve` by one 2-D copy per missed page, head and K or V, all queued before one wait: at batch 1 and 4. */
export async function fragmented(run: Run): Promise<void> {
  const { base } = run.shape.contexts;
  await using rig = await Rig.open(run.shape, run.device, { ...options(run, 4), recall: "fragmented" });
  const states = [];
  while (states.length < 4) states.push(await rig.sequence(base, { policy: "retrieve" }));
  for (const batch of [1, 4]) {
    run.say(`retrieve + fragmented, batch ${batch}`);
    const decoded = await forcedSteps(rig, states.slice(0, batch), few, { warmups: 3, budgetMs });
    run.known.set(`fragmented ${batch}`, medianMs(decoded));
    run.emit({
      row: 6,
      case: `retrieve + fragmented, ${contextName(base)}, batch ${batch}`,
      ...{ unit: "ms", value: decoded.stepMs, decoded, note: averaged(decoded) },
    });
  }
}

/** The paper as published: staged recall, decided on the host, a slot for each selected page and no more. */
export async function published(run: Run): Promise<void> {
  const { base } = run.shape.contexts;
  const slots = selectedPages(run.shape);
  await using rig = await Rig.open(run.shape, run.device, { ...options(run, 1), recall: "staged", slots });
  const state = await rig.sequence(base);
  for (const forced of [many, few]) {
    run.say(`staged + host, ${told(forced)}`);
    const decoded = await forcedSteps(rig, [state], forced, { warmups: 3, budgetMs });
    run.known.set(`published ${forced.flagged}`, medianMs(decoded));
    run.emit({
      row: 7,
      case: `the paper as published (staged, host, m = k), ${contextName(base)}, ${told(forced)}`,
      ...{ unit: "ms", value: decoded.stepMs, decoded, note: averaged(decoded) },
    });
  }
}
