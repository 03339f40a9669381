// Every wait of one stream on another has a name, so that a test can leave out one at a time and see the difference.
import type { Event, Stream } from "./device.ts";

export const waitNames = [
  /** compute → the recall that the step before started for this layer */
  "attend-after-speculation",
  /** compute → the recall of flagged heads */
  "attend-after-correction",
  /** side → attention of this layer, which reads the slots that are about to change */
  "speculate-after-attend",
  /** compute → everything the side stream does in this step, before the step's counts are told and its control is replaced */
  "step-after-branch",
  /** copy → the conversion that empties a staging buffer */
  "fill-after-drain",
  /** convert → the copies that fill a staging buffer */
  "convert-after-fill",
  /** side → K and V of a prompt chunk, before they go to the host */
  "store-after-append",
  /** compute → the pages on the host and a free half of the workspace, before earlier pages stream back */
  "load-after-store",
  /** compute → the pages on the host, before a lane is filled from them */
  "fill-after-store",
] as const;
export type WaitName = (typeof waitNames)[number];

export class Waits {
  readonly #omitted: WaitName | undefined;
  constructor(omitted?: WaitName) {
    this.#omitted = omitted;
  }
  /** Makes `stream` wait for `event`. */
  on(stream: Stream, event: Event, name: WaitName): void {
    if (name !== this.#omitted) stream.wait(event);
  }
}
