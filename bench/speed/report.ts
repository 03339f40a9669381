// A line of the speed table: what was measured, against what, and whether that reaches what is asked for.

import { type Spread, spread } from "../measure.ts";
import type { Row } from "../table.ts";
import type { Decoded } from "./decode.ts";

export interface Line {
  /** Of the table; null: measured beside it, to explain. */
  readonly row: number | null;
  readonly case: string;
  readonly unit: string;
  /** Samples, or the one number there is. */
  readonly value: number | readonly number[] | Spread;
  /** The floor, or the other that it is compared with, in the value's unit. */
  readonly against?: { readonly value: number; readonly is: string };
  /** Which way round the ratio is: value/against (default), or against/value. */
  readonly inverse?: boolean;
  /** What the ratio, or the value, must be. */
  readonly target?: { readonly of: "ratio" | "value"; readonly most?: number; readonly least?: number };
  /** What its steps counted. */
  readonly decoded?: Decoded;
  readonly note?: string;
}

const isSpread = (value: Line["value"]): value is Spread => typeof value === "object" && "median" in value;

const digits = (value: number): string => {
  const whole = Math.abs(value) >= 1000 ? Math.round(value) : Number(value.toPrecision(4));
  return whole.toLocaleString("en", { maximumFractionDigits: 6 });
};

/** What a reader wants of a row: the CSV file has the rest. */
export function shown(row: Row): Row {
  const { value, unit, p25, p75, against, ratio, target, met } = row;
  const spreads =
    typeof p25 === "number" && typeof p75 === "number" ? ` (${digits(p25)}–${digits(p75)})` : "";
  return {
    row: row.row ?? null,
    what: row.case ?? null,
    measured: `${digits(value as number)} ${unit}${spreads}`,
    against: typeof against === "number" ? `${row["against is"]}: ${digits(against)}` : null,
    ratio: typeof ratio === "number" ? Number(ratio.toFixed(3)) : null,
    target: target ?? null,
    met: met ?? null,
  };
}

/** Every line has the same columns. */
export function rowOf(line: Line): Row {
  const { value, against, target, decoded } = line;
  const one = typeof value === "number";
  const { median, p25, p75, least, most } = one ? spread([value]) : isSpread(value) ? value : spread(value);
  const ratio = against && (line.inverse ? against.value / median : median / against.value);
  const judged = target?.of === "value" ? median : ratio;
  const met =
    target === undefined || judged === undefined
      ? null
      : judged <= (target.most ?? Number.POSITIVE_INFINITY) && judged >= (target.least ?? 0);
  return {
    row: line.row,
    case: line.case,
    value: median,
    unit: line.unit,
    p25: one ? null : p25,
    p75: one ? null : p75,
    least: one ? null : least,
    most: one ? null : most,
    samples: one || isSpread(value) ? null : value.length,
    against: against?.value ?? null,
    "against is": against?.is ?? null,
    ratio: ratio ?? null,
    target: target === undefined ? null : wanted(target),
    met,
    "flagged %": decoded ? 100 * decoded.flaggedShare : null,
    "missed %": decoded ? 100 * decoded.missedShare : null,
    "before MiB/step": decoded ? decoded.beforeBytes / 2 ** 20 : null,
    "beside MiB/step": decoded ? decoded.besideBytes / 2 ** 20 : null,
    "waited ms/step": decoded ? spread(decoded.stallMs).median : null,
    note: line.note ?? null,
  };
}

const wanted = ({ of, most, least }: NonNullable<Line["target"]>): string =>
  `${of} ${most === undefined ? `≥ ${least}` : `≤ ${most}`}`;
