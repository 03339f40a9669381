// The rows of the demo's table, and what the demo asks of the method where nobody says otherwise.
import type { EngineOptions, PolicyOptions } from "../types.ts";

export interface PolicyRow {
  /** Its key in the summary. */
  readonly key: string;
  /** Its name in the table. */
  readonly title: string;
  readonly policy: PolicyOptions;
}

const rows: readonly PolicyRow[] = [
  { key: "full", title: "full", policy: { policy: "full" } },
  { key: "streaming", title: "streaming (drops)", policy: { policy: "streaming" } },
  { key: "retrieve", title: "retrieve (waits)", policy: { policy: "retrieve" } },
  { key: "freekv-off", title: "freekv, uncorrected", policy: { policy: "freekv", correction: "off" } },
  { key: "freekv", title: "freekv", policy: { policy: "freekv", correction: "threshold" } },
  { key: "freekv-exact", title: "freekv, exact", policy: { policy: "freekv", correction: "exact" } },
];
/** Shown where it is asked for by name. */
const quest: PolicyRow = { key: "quest", title: "quest (on device)", policy: { policy: "quest" } };

/** All rows; with --policy that policy's, with --correction that one of freekv's. */
export function chosenRows({ policy, correction }: PolicyOptions): PolicyRow[] {
  if (policy === "quest") return [quest];
  return rows.filter(
    (row) =>
      (policy === undefined || row.policy.policy === policy) &&
      (correction === undefined ||
        row.policy.correction === undefined ||
        row.policy.correction === correction),
  );
}

const sink = 64;
const window = 128;
const shortWindow = 64;
/** The budget is at most this share of the book. */
const budgetShare = 1 / 4;

/** A shorter book would not hold the smallest budget four times, even with the largest pages. */
export const leastTokens = 1024;

/** The options with the demo's own defaults of budget, sink and window, for a book that has `tokens` tokens. */
export function withDemoDefaults(given: EngineOptions, tokens: number): EngineOptions {
  const pageSize = given.pageSize ?? 32;
  const budget = Math.floor((tokens * budgetShare) / pageSize) * pageSize;
  // With large pages the quarter of a short book may hold sink and window and nothing to select.
  const short = budget < sink + window + pageSize;
  return { sink, window: short ? shortWindow : window, budget, ...given };
}
