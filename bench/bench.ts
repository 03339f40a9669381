// What a bench is, and what it is given.

import type { Spread } from "./measure.ts";
import type { Row, Table } from "./table.ts";

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
  /** `speed`: these rows of its table alone. */
  readonly only?: readonly number[] | undefined;
  /** `speed`: the model's shape, by name. */
  readonly shape?: string | undefined;
  /** `speed`: the device, as Device.open takes it. */
  readonly device?: string | undefined;
  /** `speed`: steps of a measurement. */
  readonly steps?: number | undefined;
  /** `speed`: what bench/speed/peers.py wrote on this machine. */
  readonly peers?: string | undefined;
  /** This machine's floors: measured once, when first asked for. */
  floors(): readonly Floors[];
  /** A line for whoever waits. */
  say(text: string): void;
  /** The rows so far of a bench that takes minutes: they are kept if it is cut off. `machine` is what its files name. */
  partly(rows: readonly Row[], machine: Machine): void;
}

/** What a bench ran on, if that is not this machine's CPU: in words, and in a file's name. */
export interface Machine {
  readonly words: string;
  readonly slug: string;
}

export interface Bench {
  readonly title: string;
  run(options: BenchOptions): Promise<Table & { machine?: Machine }>;
}
