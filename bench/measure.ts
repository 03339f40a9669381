// Samples, their spread, and the clock of a device.

import { type Device, Event, type Stream } from "../lib/device.ts";

/** Of samples in one unit: the middle one, the quartiles around it, the best. */
export interface Spread {
  readonly median: number;
  readonly p25: number;
  readonly p75: number;
  readonly least: number;
  readonly most: number;
}

export function spread(samples: readonly number[]): Spread {
  if (samples.length === 0) throw new RangeError("no samples");
  const sorted = [...samples].sort((a, b) => a - b);
  const at = (share: number): number => {
    const place = share * (sorted.length - 1);
    const low = sorted[Math.floor(place)] as number;
    return low + (place % 1) * ((sorted[Math.ceil(place)] as number) - low);
  };
  return { median: at(0.5), p25: at(0.25), p75: at(0.75), least: at(0), most: at(1) };
}

/** The same in another unit. */
export function scaled(of: Spread, factor: number): Spread {
  const { median, p25, p75, least, most } = of;
  return {
    ...{ median: factor * median, p25: factor * p25, p75: factor * p75 },
    ...{ least: factor * least, most: factor * most },
  };
}

export const sum = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0);

export interface Sampling {
  /** Samples taken whatever they cost. */
  readonly atLeast: number;
  /** No further sample begins after this. */
  readonly budgetMs: number;
}

/**
 * Milliseconds of the device's clock that what `issue` issues takes, once for each sample; two more samples come first and
 * are dropped. `issue` is told the sample's number, so that inputs can be distinct; what `before` issues is not timed.
 */
export function deviceMs(
  device: Device,
  stream: Stream,
  { atLeast, budgetMs }: Sampling,
  issue: (sample: number) => void,
  before: () => void = () => {},
): number[] {
  using start = device.event();
  using end = device.event();
  const warmups = 2;
  const samples: number[] = [];
  let deadline = Number.POSITIVE_INFINITY;
  for (let i = 0; samples.length < atLeast || performance.now() < deadline; i++) {
    if (i === warmups) deadline = performance.now() + budgetMs;
    before();
    stream.record(start);
    issue(i);
    stream.record(end);
    end.synchronize();
    if (i >= warmups) samples.push(Event.elapsedMs(start, end));
  }
  return samples;
}
