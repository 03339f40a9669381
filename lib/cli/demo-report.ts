// What the demo prints of its questions: header, rows and what follows them, for people and as JSON.
import { existsSync, readdirSync } from "node:fs";
import { join, sep } from "node:path";
import { packageRoot } from "../../ffi/root.ts";
import { resolvePolicy } from "../options.ts";
import { planOf } from "../plan.ts";
import { type Answer, totalsOf } from "./demo-ask.ts";
import type { AskedQuestion, PlacedBook } from "./demo-book.ts";
import type { PolicyRow } from "./demo-policies.ts";
import { budgetLine, lostLine, milliseconds, type tableLine } from "./demo-table.ts";
import { type Prepared, resolved } from "./model.ts";
import { clip, thousands } from "./output.ts";
import { reported } from "./stats.ts";

/** What one row's questions came to. */
export interface Row extends PolicyRow {
  readonly answers: readonly Answer[];
}

/** What the header says beside model and book. */
export interface DemoRun {
  /** "cpu" or "cuda:N". */
  readonly device: string;
  /** What --device said. */
  readonly askedDevice: string;
  readonly ownBook: boolean;
  readonly seed: number;
  readonly prefillMs: number;
}

export function header(run: DemoRun, model: Prepared, book: PlacedBook): string[] {
  const size = countOf(model.parameters);
  const parts = [
    deviceOf(run),
    `${clip(model.name, 24)}, ${size}`,
    `${run.ownBook ? "your book" : "book"} ${thousands(book.ids.length)} tokens, seed ${run.seed}`,
    `prefill ${(run.prefillMs / 1000).toFixed(1)} s, once`,
  ];
  const { slots } = model.options;
  const { recall, orchestration, pageSize, kvDtype } = resolved(model);
  const engine = [
    `slots ${slots === undefined ? "3 × selected" : `${thousands(slots)} pages`}`,
    `pages of ${pageSize} tokens, ${kvDtype}`,
    `recall ${recall}, ${orchestration}`,
  ];
  return [parts.join(" · "), budgetLine(model.policy, book.ids.length), engine.join(" · ")];
}

function deviceOf({ device, askedDevice }: DemoRun): string {
  if (device !== "cpu") return device;
  return askedDevice === "auto" ? "CPU twin (no GPU found)" : "CPU twin";
}

/** 6,030,000 → "6 M". */
function countOf(parameters: number): string {
  if (parameters < 950e3) return `${Math.round(parameters / 1e3)} K`;
  return parameters < 950e6 ? `${Math.round(parameters / 1e6)} M` : `${(parameters / 1e9).toFixed(1)} B`;
}

/** The question alone, without the start of its answer. */
export function shortOf(question: AskedQuestion): string {
  return question.prompt.replace(/\s+/g, " ").replace(/^ Question: /, "");
}

const planOfRow = (
  row: PolicyRow,
  { policy, options, config, maxContext }: Prepared,
): ReturnType<typeof planOf> => {
  const pageSize = options.pageSize ?? 32;
  const own = resolvePolicy(policy, row.policy, pageSize, config.layers);
  return planOf(own, pageSize, Math.ceil(maxContext / pageSize), options.slots);
};

export function recordOf(row: PolicyRow, i: number, question: AskedQuestion, answer: Answer): object {
  const { kind, depth } = question;
  const { said, correct, decodedTokens } = answer;
  const asked = shortOf(question);
  return {
    policy: row.key,
    question: i,
    kind,
    depth,
    asked,
    expected: question.answer.trim(),
    said: said.trim(),
    correct,
    decodedTokens,
  };
}

export function summaryOf(row: Row, model: Prepared): object {
  const totals = totalsOf(row.answers);
  const { correct, asked } = totals;
  return { correct, asked, ...reported(totals, planOfRow(row, model)) };
}

export function rowOf(row: Row, done: readonly Row[], model: Prepared): Parameters<typeof tableLine>[0] {
  const totals = totalsOf(row.answers);
  const stats = reported(totals, planOfRow(row, model));
  const tokens = row.answers.reduce((sum, answer) => sum + answer.decodedTokens, 0);
  const perToken = (sum: number | null): number | null => (sum === null ? null : sum / tokens);
  const full = done.find((each) => each.key === "full");
  return {
    title: row.title,
    correct: totals.correct,
    asked: totals.asked,
    recalledBytesPerToken: perToken(stats.recalledBytes),
    waitedMsPerToken: perToken(stats.stallMs),
    deviceKvBytes: totals.deviceKvBytes,
    deviceKvShare: full === undefined ? null : totals.deviceKvBytes / totalsOf(full.answers).deviceKvBytes,
    tpotMs: totals.tpotMs,
  };
}

export function footer(rows: readonly Row[], book: PlacedBook, device: string): string[] {
  const lines: string[] = [];
  const freekv = rows.find((row) => row.key === "freekv");
  if (freekv !== undefined) {
    const { hitRate, correctedShare, ttftMs } = totalsOf(freekv.answers);
    const percent = (share: number | null): string => (share === null ? "–" : `${(100 * share).toFixed(1)}%`);
    const first = ttftMs === null ? "" : `, first answer token ${milliseconds(ttftMs)} after the question`;
    lines.push(`freekv: hit rate ${percent(hitRate)}, heads corrected ${percent(correctedShare)}${first}`);
  }
  if (device === "cpu") lines.push("Times are the CPU twin's: they show the pipeline, not the speed.");
  const kept = keptGpuFigures();
  if (kept.length > 0) lines.push(`A GPU's, kept in ${join("bench", "results")}: ${kept.join(" · ")}`);
  const lost = lostByDropping(rows, book);
  if (lost.length > 0)
    lines.push("", "What dropping lost: question · expected · streaming said · freekv said", ...lost);
  return ["", ...lines];
}

/** Up to three questions that streaming answers wrong and freekv right. */
function lostByDropping(rows: readonly Row[], book: PlacedBook): string[] {
  const dropped = rows.find((row) => row.key === "streaming")?.answers;
  const kept = rows.find((row) => row.key === "freekv")?.answers;
  if (dropped === undefined || kept === undefined) return [];
  const lost = book.questions.flatMap((question, i) => {
    const [without, within] = [dropped[i] as Answer, kept[i] as Answer];
    if (without.correct || !within.correct) return [];
    const asked = shortOf(question).replace(/ Answer: .*$/, "");
    return [lostLine({ asked, expected: question.answer, dropped: without.said, kept: within.said })];
  });
  return lost.slice(0, 3);
}

/** Benches that ran on a GPU, by its name, where this is a clone that has their results. */
function keptGpuFigures(): string[] {
  const dir = join(packageRoot(), "bench", "results");
  if (!existsSync(dir)) return [];
  const benches = new Map<string, string[]>();
  for (const name of readdirSync(dir).sort()) {
    const [, bench, card] = /^(.+)-(h[12]00)\.csv$/.exec(name) ?? [];
    if (bench && card) benches.set(card, [...(benches.get(card) ?? []), bench]);
  }
  return [...benches].map(([card, names]) => `${card.toUpperCase()} ${names.join(", ")}`);
}

export function next(): string {
  const command = packageRoot().split(sep).includes("node_modules") ? "freekv" : "npm start --";
  return `Next: ${command} demo --book FILE · ${command} generate --model DIR --prompt "…"`;
}
