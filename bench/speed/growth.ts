// How long a step is held up while the pool of host pages grows beside it.

import { spread } from "../measure.ts";
import { decode } from "./decode.ts";
import type { Rig } from "./rig.ts";
import { contextName, few, force, type Run } from "./run.ts";

export async function growth(run: Run, rig: Rig): Promise<void> {
  const { base } = run.shape.contexts;
  const state = await rig.sequence(base);
  force(rig, few);
  const { stepMs: alone } = await decode(rig, [state]);
  const usual = spread(alone);

  const before = rig.core.pool.bytes;
  const began = performance.now();
  let ended = false;
  const growing = rig.grow(run.shape.grownBytes).finally(() => {
    ended = true;
  });
  growing.catch(() => {}); // it is heard of below
  const { stepMs: beside } = await decode(rig, [state], {
    warmups: 1,
    steps: 4 * run.shape.steps,
    until: () => ended,
  });
  await growing;
  const seconds = (performance.now() - began) / 1e3;
  const gib = (rig.core.pool.bytes - before) / 2 ** 30;
  const stalls = beside.map((ms) => Math.max(0, ms - usual.median));
  run.emit({
    ...{
      row: 15,
      case: `longest stall of a step while ${gib.toPrecision(3)} GiB of pool is added`,
      unit: "ms",
    },
    value: Math.max(...stalls),
    target: { of: "value", most: 2 },
    note: `over the median of ${usual.median.toFixed(3)} ms at ${contextName(base)} without it; then the longest is ${(usual.most - usual.median).toFixed(3)} over it; ${beside.length} steps, ${(gib / seconds).toFixed(2)} GiB/s`,
  });
  run.emit({
    ...{ row: 15, case: "stall of a step meanwhile", unit: "ms", value: stalls },
    note: `median ${spread(stalls).median.toFixed(3)} ms`,
  });
  rig.release(state);
}
