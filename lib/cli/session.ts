// What every command works with.
import type { Output } from "./output.ts";

export interface Session {
  readonly out: Output;
  /** Aborts with the user's signal. */
  readonly signal: AbortSignal;
  /** Prints the record that --json begins with, once the device is known. */
  start(device: string | null, options: object): Promise<void>;
}
