// Every wait of one stream on another has a name, so that a test can leave out one at a time and see the difference.
import type { Event, Stream } from "./device.ts";

export const waitNames = [
  /** compute → the recall that the step before started for this layer */
  "attend-after-speculation",
  /** compute → the recall that precedes a sequence's first step */
  "first-after-selection",
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
  readonly #recorded = new WeakMap<Event, number>();
  #step = 0;
  constructor(omitted?: WaitName) {
    this.#omitted = omitted;
  }
  /** A step begins: what it waits for has to be recorded in it, or in as many steps before as the wait says. */
  next(): void {
    this.#step++;
  }
  record(stream: Stream, event: Event): void {
    stream.record(event);
    this.#recorded.set(event, this.#step);
  }
  /** Makes `stream` wait for `event`; an event of an earlier step would be no wait at all, so it is refused. */
  on(stream: Stream, event: Event, name: WaitName, stepsBefore = 0): void {
    if ((this.#recorded.get(event) ?? Number.NEGATIVE_INFINITY) < this.#step - stepsBefore)
      throw new Error(`${name}: the event was not recorded for this step`);
    if (name !== this.#omitted) stream.wait(event);
  }
}
