// What a bench is, and what it is given.

import type { Spread } from "./measure.ts";
import type { Table } from "./table.ts";

/** The rates of some threads together. */
export interface Floors {
  readonly threads: number;
  /** Bytes read from memory, GB/s. */
  readonly read: Spread;
  /** Bytes copied (each is read once and written once), GB/s. */
  readonly copy: Spread;
  /** Fused multiply-adds in f32, two operations each, GFLOP/s. */
  readonly fma: Spread;
}

export interface BenchOptions {
  /** A Hugging Face folder in place of the demo model. */
  readonly model?: string | undefined;
  /** `start`: also in a fresh clone under a new HOME. */
  readonly cold?: boolean | undefined;
  /** This machine's floors: measured once, when first asked for. */
  floors(): readonly Floors[];
  /** A line for whoever waits. */
  say(text: string): void;
}

export interface Bench {
  readonly title: string;
  run(options: BenchOptions): Promise<Table>;
}
