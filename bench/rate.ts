// A kernel's row: its time, its rate, and the share of its floor.

import type { Floors } from "./bench.ts";
import { spread } from "./measure.ts";
import type { Row } from "./table.ts";

export interface Work {
  readonly name: string;
  /** Which floor binds it; how many bytes or operations one sample is. null: neither. */
  readonly floor: "read" | "copy" | "fma" | null;
  readonly amount: number;
  /** Share of the floor in per cent that the project wants on two threads. */
  readonly goal?: number;
}

const units = { read: "GB/s", copy: "GB/s", fma: "GFLOP/s" };

/** `ms`: samples of the device's clock. */
export function rated(work: Work, floors: Floors, ms: readonly number[]): Row {
  const { median, p25, p75, least } = spread(ms);
  const times = { us: 1e3 * median, p25: 1e3 * p25, p75: 1e3 * p75, best: 1e3 * least };
  const row = { case: work.name, threads: floors.threads, ...times };
  if (work.floor === null)
    return { ...row, rate: null, unit: null, floor: null, "share %": null, "goal %": null, met: null };
  const rate = work.amount / median / 1e6;
  const floor = floors[work.floor].most;
  const share = (100 * rate) / floor;
  const goal = work.goal !== undefined && floors.threads === 2 ? work.goal : null;
  const met = goal === null ? null : share >= goal;
  return { ...row, rate, unit: units[work.floor], floor, "share %": share, "goal %": goal, met };
}
