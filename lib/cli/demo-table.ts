// The demo's table, at most 100 characters wide.
import type { Policy } from "../options.ts";
import { clip, mebibytes, thousands } from "./output.ts";

export const width = 100;

/** One policy's results; null where the policy has no such thing. */
export interface TableRow {
  readonly title: string;
  readonly correct: number;
  readonly asked: number;
  readonly recalledBytesPerToken: number | null;
  readonly waitedMsPerToken: number | null;
  readonly deviceKvBytes: number;
  /** Of full's, where full was asked. */
  readonly deviceKvShare: number | null;
  readonly tpotMs: number | null;
}

const columns = [21, 8, 15, 17, 15, 17] as const;
const titles = ["policy", "right", "95% interval", "recalled/token", "waited/token", "device KV", "TPOT"];

export const tableHeader: string = layOut(titles);

export function tableLine(row: TableRow): string {
  const {
    correct,
    asked,
    recalledBytesPerToken: bytes,
    waitedMsPerToken: waited,
    deviceKvShare: share,
    tpotMs,
  } = row;
  const percent = share === null ? "" : `${Math.round(100 * share)}%`.padStart(6);
  return layOut([
    row.title,
    `${correct}/${asked}`,
    intervalOf(correct, asked),
    bytes === null ? "–" : `${(bytes / 1024).toFixed(1)} KiB`,
    waited === null ? "–" : `${milliseconds(waited)}`,
    mebibytes(row.deviceKvBytes) + percent,
    tpotMs === null ? "–" : milliseconds(tpotMs),
  ]);
}

function layOut(cells: readonly string[]): string {
  return cells.map((cell, i) => cell.padEnd(columns[i] ?? 0)).join("");
}

export const milliseconds = (ms: number): string => `${ms < 10 ? ms.toFixed(2) : ms.toFixed(1)} ms`;

/** Wilson's 95% score interval of a share. */
export function wilson(right: number, asked: number): [low: number, high: number] {
  const z = 1.959964;
  const share = right / asked;
  const spread = z * Math.sqrt((share * (1 - share)) / asked + (z * z) / (4 * asked * asked));
  const middle = share + (z * z) / (2 * asked);
  const scale = 1 + (z * z) / asked;
  return [Math.max(0, (middle - spread) / scale), Math.min(1, (middle + spread) / scale)];
}

function intervalOf(right: number, asked: number): string {
  const [low, high] = wilson(right, asked).map((share) => Math.round(100 * share));
  return `${low}–${high}%`;
}

/** What a budget is made of. */
export function budgetLine({ budget, sink, window }: Policy, tokens: number): string {
  const parts = `${thousands(sink)} sink + ${thousands(window)} window + ${thousands(budget - sink - window)} selected`;
  const share = `${Math.round((100 * budget) / tokens)}% of the book`;
  return `budget ${thousands(budget)} tokens a head = ${parts} (${share})`;
}

/** One question that a policy lost, in one line of the table's width. */
export function lostLine(lost: { asked: string; expected: string; dropped: string; kept: string }): string {
  const cell = (text: string, most: number): string => clip(text.replace(/\s+/g, " ").trim(), most);
  const cells = [cell(lost.asked, 34), cell(lost.expected, 18), cell(lost.dropped, 18), cell(lost.kept, 18)];
  return `  ${cells.join(" · ")}`;
}
