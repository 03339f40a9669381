// What a bench is, and what it is given.

import type { Floors } from "./floors.ts";
import type { Table } from "./table.ts";

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
