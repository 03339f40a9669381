// Reading a prompt: the first one after loading, and those that find the pool grown.

import { type Spread, spread } from "../measure.ts";
import { type Rig, tokenAt } from "./rig.ts";
import { contextName, type Run } from "./run.ts";
import { promptFlops } from "./shape.ts";

/** Prompts read once the pool is there, as far as they fit this. */
const most = 4;
const budgetMs = 20_000;

/** The least share of the device's bf16 peak. */
const leastShare = 0.45;

export async function prompts(run: Run, rig: Rig): Promise<void> {
  const { base } = run.shape.contexts;
  const at = contextName(base);
  const first = await readPrompt(rig, base);
  run.emit({
    ...{ row: 10, case: `first prompt of ${at} after loading`, unit: "ms", value: first },
    note: `the engine was made in ${rig.loadSeconds.toFixed(1)} s`,
  });
  const taken: number[] = [];
  const began = performance.now();
  while (taken.length < most && (taken.length === 0 || performance.now() - began < budgetMs))
    taken.push(await readPrompt(rig, base));
  run.emit({
    ...{ row: 10, case: `prompt of ${at}, pool grown`, unit: "ms", value: taken },
    target: { of: "value", most: 2000 },
  });
  const flops = promptFlops(run.shape.config, base);
  const peak = run.peers.get("torch bf16 matmul");
  const rates: Spread = spread(taken.map((ms) => flops / (ms / 1e3) / 1e12));
  run.emit({
    ...{ row: 10, case: `prompt of ${at}, rate`, unit: "TFLOP/s", value: rates },
    ...(peak && {
      against: { value: peak.median, is: "torch's bf16 product of 8192³" },
      target: { of: "ratio", least: leastShare } as const,
    }),
  });
}

/** Milliseconds until the device is ready for the first step. */
async function readPrompt(rig: Rig, tokens: number): Promise<number> {
  const state = rig.empty();
  try {
    const ids = Int32Array.from({ length: tokens }, (_, i) => tokenAt(rig.shape, i));
    await rig.core.reached();
    const began = performance.now();
    await state.append(ids, {});
    await rig.core.reached();
    return performance.now() - began;
  } finally {
    rig.release(state);
  }
}
