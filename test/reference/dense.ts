// The dense part and sampling as their formulas read, in float64 and plain lists. Nothing here is shared with the library.

export type Epilogue = "store" | "add" | "swiglu";

export interface PhaseReference {
  /** [nOut][k], and the rest, as stored. */
  weight: ArrayLike<number>;
  bias?: ArrayLike<number> | undefined;
  norm?: ArrayLike<number> | undefined;
  x: ArrayLike<number>;
  /** What y held before: read by "add". */
  y: ArrayLike<number>;
  nOut: number;
  k: number;
  epilogue: Epilogue;
  eps: number;
}

/** x·weight/√(mean(x²) + eps). */
export function rmsNorm(x: ArrayLike<number>, weight: ArrayLike<number>, eps: number): number[] {
  const values = Array.from(x);
  const mean = values.reduce((sum, value) => sum + value * value, 0) / values.length;
  return values.map((value, i) => (value / Math.sqrt(mean + eps)) * at(weight, i));
}

/** One row of a phase, and for each output Σ|x·w|: what its rounding error is relative to. */
export function densePhase(phase: PhaseReference): { y: number[]; magnitude: number[] } {
  const { weight, bias, norm, nOut, k, epilogue } = phase;
  const x = norm === undefined ? Array.from(phase.x) : rmsNorm(phase.x, norm, phase.eps);
  const v = Array.from({ length: nOut }, (_, n) => (bias === undefined ? 0 : at(bias, n)));
  const size = v.map(Math.abs);
  for (let n = 0; n < nOut; n++) {
    for (let i = 0; i < k; i++) {
      const product = at(x, i) * at(weight, n * k + i);
      v[n] = at(v, n) + product;
      size[n] = at(size, n) + Math.abs(product);
    }
  }
  if (epilogue === "store") return { y: v, magnitude: size };
  if (epilogue === "add") {
    return {
      y: v.map((value, n) => value + at(phase.y, n)),
      magnitude: size.map((value, n) => value + Math.abs(at(phase.y, n))),
    };
  }
  const pairs = Array.from({ length: nOut / 2 }, (_, i) => i);
  return {
    y: pairs.map((i) => (at(v, 2 * i) / (1 + Math.exp(-at(v, 2 * i)))) * at(v, 2 * i + 1)),
    magnitude: pairs.map((i) => (1 + at(size, 2 * i)) * (1 + at(size, 2 * i + 1))),
  };
}

/** One head: RMSNorm where there is a weight, then pairs (i, i + d/2) turned by position·invFreq[i]. */
export function ropeHead(
  head: ArrayLike<number>,
  position: number,
  invFreq: ArrayLike<number>,
  scale: number,
  norm?: { weight: ArrayLike<number>; eps: number },
): number[] {
  const x = norm === undefined ? Array.from(head) : rmsNorm(head, norm.weight, norm.eps);
  const half = x.length / 2;
  return x.map((value, i) => {
    const angle = position * at(invFreq, i % half);
    const other = i < half ? -at(x, i + half) : at(x, i - half);
    return (value * Math.cos(angle) + other * Math.sin(angle)) * scale;
  });
}

/** NaN counts as −inf. */
export function logSoftmax(logits: ArrayLike<number>): number[] {
  const values = Array.from(logits, (value) => (Number.isNaN(value) ? -Infinity : value));
  const top = Math.max(...values);
  const shifted = values.map((value) => (value === top ? 0 : value - top));
  const logTotal = Math.log(shifted.reduce((sum, value) => sum + Math.exp(value), 0));
  return shifted.map((value) => value - logTotal);
}

/** Ids by falling logit, ties by rising id. */
export function ranked(logits: ArrayLike<number>): number[] {
  const values = Array.from(logits, (value) => (Number.isNaN(value) ? -Infinity : value));
  return values
    .map((_, id) => id)
    .sort((a, b) => (at(values, a) === at(values, b) ? a - b : at(values, b) > at(values, a) ? 1 : -1));
}

/** What a draw takes each id with: temperature, then top-k, then the smallest set that reaches top-p. */
export function drawProbabilities(
  logits: ArrayLike<number>,
  options: { temperature: number; topK: number; topP: number },
): number[] {
  const scaled = Array.from(logits, (value) => value / options.temperature);
  const weights = logSoftmax(scaled).map(Math.exp);
  const first = ranked(logits).slice(0, options.topK > 0 ? options.topK : weights.length);
  const total = first.reduce((sum, id) => sum + at(weights, id), 0);
  const kept: number[] = [];
  let reached = 0;
  for (const id of first) {
    kept.push(id);
    reached += at(weights, id) / total;
    if (reached >= options.topP) break;
  }
  const mass = kept.reduce((sum, id) => sum + at(weights, id), 0);
  return weights.map((weight, id) => (kept.includes(id) ? weight / mass : 0));
}

function at(values: ArrayLike<number>, i: number): number {
  return values[i] as number;
}
