// Attention and digests as their formulas read, in float64 and plain lists. Nothing here is shared with the library.

/** What a lane keeps in view. Counts of pages. */
export interface View {
  sinkPages: number;
  windowPages: number;
  attendAll?: boolean;
}

/** The pages that one head visits at `position`, in order: sink, its selection, window; all of them where everything is attended. */
export function visitedPages(
  view: View,
  selected: readonly number[],
  position: number,
  pageSize: number,
): number[] {
  const last = Math.floor(position / pageSize);
  const all = Array.from({ length: last + 1 }, (_, page) => page);
  if (view.attendAll) return all;
  const windowBegin = Math.floor((position + 1) / pageSize) - view.windowPages;
  return all.filter((page) => page < view.sinkPages || page >= windowBegin || selected.includes(page));
}

/** softmax(q·K·scale)·V over the given vectors. */
export function attend(
  q: ArrayLike<number>,
  keys: readonly ArrayLike<number>[],
  values: readonly ArrayLike<number>[],
  scale: number,
): Float64Array {
  const scores = keys.map((key) => {
    let sum = 0;
    for (let i = 0; i < q.length; i++) sum += (q[i] as number) * (key[i] as number);
    return sum * scale;
  });
  const maximum = Math.max(...scores);
  const weights = scores.map((score) => Math.exp(score - maximum));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  const out = new Float64Array(q.length);
  for (const [t, value] of values.entries()) {
    for (let i = 0; i < out.length; i++) out[i]! += ((weights[t] as number) / total) * (value[i] as number);
  }
  return out;
}

/** Channel-wise minimum and maximum; NaN where a channel has one. */
export function minMax(keys: readonly ArrayLike<number>[]): { low: number[]; high: number[] } {
  const channels = channelsOf(keys);
  return { low: channels.map((x) => Math.min(...x)), high: channels.map((x) => Math.max(...x)) };
}

/** Channel-wise mean −/+ mean absolute deviation. */
export function meanDeviation(keys: readonly ArrayLike<number>[]): { low: number[]; high: number[] } {
  const mean = (x: readonly number[]): number => x.reduce((sum, value) => sum + value, 0) / x.length;
  const centred = channelsOf(keys).map((x) => {
    const centre = mean(x);
    return { centre, spread: mean(x.map((value) => Math.abs(value - centre))) };
  });
  return {
    low: centred.map(({ centre, spread }) => centre - spread),
    high: centred.map(({ centre, spread }) => centre + spread),
  };
}

function channelsOf(keys: readonly ArrayLike<number>[]): number[][] {
  return Array.from({ length: keys[0]?.length ?? 0 }, (_, c) => keys.map((key) => key[c] as number));
}
