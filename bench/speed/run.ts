// What the parts of the speed table share: the shape, the device, its rates, which rows are wanted, and where lines go.

import type { State } from "../../lib/state.ts";
import { type Spread, spread, sum } from "../measure.ts";
import { type Decoded, type DecodeOptions, decode } from "./decode.ts";
import type { Rates } from "./floors.ts";
import type { Line } from "./report.ts";
import type { Rig } from "./rig.ts";
import type { Shape } from "./shape.ts";

export interface Run {
  readonly shape: Shape;
  /** As Device.open takes it, and as it is called. */
  readonly device: string;
  readonly card: string;
  readonly rates: Rates;
  /** Figures of other systems in this run, by name; empty where they were not measured. */
  readonly peers: ReadonlyMap<string, Spread>;
  /** Medians that later lines compare with, by name. */
  readonly known: Map<string, number>;
  /** Whether one of these rows was asked for. */
  wants(...rows: readonly number[]): boolean;
  emit(line: Line): void;
  say(text: string): void;
}

/** How often heads are flagged, and what share of a selection is new in each step. */
export interface Forced {
  readonly flagged: number;
  readonly missed: number;
}
/** Shares of flagged heads in published traces at τ = 0.8 and 0.9; a fifth of the selection is new in each step. */
export const few: Forced = { flagged: 0.12, missed: 0.2 };
export const many: Forced = { flagged: 0.59, missed: 0.2 };

export const share = (part: number): string => `${Math.round(100 * part)}%`;
export const told = ({ flagged, missed }: Forced): string =>
  `${share(flagged)} flagged, ${share(missed)} missed`;

export function force(rig: Rig, { flagged, missed }: Forced): void {
  // A share of 0 would be no forcing at all.
  const period = missed > 0 ? Math.round(1 / missed) : 2 ** 30;
  rig.core.force({ flagged: Math.round(1024 * flagged), period });
}

export function forcedSteps(
  rig: Rig,
  states: readonly State[],
  forced: Forced,
  o?: DecodeOptions,
): Promise<Decoded> {
  force(rig, forced);
  return decode(rig, states, o);
}

/** Milliseconds in which the device reads a step's bytes; `combined`: and the bus moves what is recalled before attention. */
export function floorMs({ rates }: Run, decoded: Decoded, combined = false): number {
  const read = decoded.bytes / rates.read.median;
  return 1e3 * (read + (combined ? decoded.beforeBytes / rates.toDevice.median : 0));
}

export const medianMs = (decoded: Decoded): number => spread(decoded.stepMs).median;
/** For steps that the host tells late: two of them then follow each other at once. */
export const averaged = ({ stepMs }: Decoded): string =>
  `${(sum(stepMs) / stepMs.length).toFixed(2)} ms a step over all ${stepMs.length} steps`;

export const contextName = (tokens: number): string =>
  tokens >= 8192 ? `${tokens / 1024}K` : `${tokens} tokens`;
