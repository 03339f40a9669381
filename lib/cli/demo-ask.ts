/// <reference lib="esnext.disposable" preserve="true" />
// Questions to one prefilled sequence under one policy, and what they come to together.

import type { Sequence } from "../sequence.ts";
import { grade } from "../tasks/index.ts";
import type { PolicyOptions, Stats } from "../types.ts";
import type { AskedQuestion } from "./demo-book.ts";

export interface Answer {
  readonly said: string;
  readonly correct: boolean;
  /** Tokens fed through the decode path: the question's, and the answer's but for its last. */
  readonly decodedTokens: number;
  readonly answerTokens: number;
  /** From the handing over of the question; a fork inherits its parent's clock, so it is taken here. */
  readonly stats: Stats;
}

/** Forks the book, feeds the question through the decode path and lets the answer come. `onText` sees it grow. */
export async function ask(
  book: Sequence,
  question: AskedQuestion,
  policy: PolicyOptions,
  signal: AbortSignal,
  onText: (said: string) => void,
): Promise<Answer> {
  using fork = book.fork(policy);
  const askedAt = performance.now();
  for await (const _ of fork.score(question.ids, { signal }));
  let said = "";
  let answerTokens = 0;
  let ttftMs: number | null = null;
  for await (const { text } of fork.generate({ maxTokens: question.answerTokens, signal })) {
    ttftMs ??= performance.now() - askedAt;
    answerTokens++;
    said += text;
    onText(said);
  }
  const decodedTokens = question.ids.length + answerTokens - 1;
  return {
    said,
    correct: grade(question, said),
    decodedTokens,
    answerTokens,
    stats: { ...fork.stats(), ttftMs },
  };
}

export interface Totals extends Stats {
  readonly correct: number;
  readonly asked: number;
}

/** Sums of what adds up, means of what does not: of a first token by questions, of a later one and of shares by tokens. */
export function totalsOf(answers: readonly Answer[]): Totals {
  const sum = (pick: (answer: Answer) => number | null): number =>
    answers.reduce((all, a) => all + (pick(a) ?? 0), 0);
  const mean = (pick: (a: Answer) => number | null, weight: (a: Answer) => number): number | null => {
    const known = answers.filter((a) => pick(a) !== null && weight(a) > 0);
    const weights = known.reduce((all, a) => all + weight(a), 0);
    return weights > 0 ? known.reduce((all, a) => all + (pick(a) as number) * weight(a), 0) / weights : null;
  };
  const decoded = (a: Answer): number => a.decodedTokens;
  return {
    correct: answers.filter((a) => a.correct).length,
    asked: answers.length,
    ttftMs: mean(
      (a) => a.stats.ttftMs,
      () => 1,
    ),
    tpotMs: mean(
      (a) => a.stats.tpotMs,
      (a) => a.answerTokens - 1,
    ),
    stallMs: answers.some((a) => a.stats.stallMs !== null) ? sum((a) => a.stats.stallMs) : null,
    recalledPages: sum((a) => a.stats.recalledPages),
    recalledBytes: sum((a) => a.stats.recalledBytes),
    hitRate: mean((a) => a.stats.hitRate, decoded),
    correctedShare: mean((a) => a.stats.correctedShare, decoded),
    deviceKvBytes: Math.max(...answers.map((a) => a.stats.deviceKvBytes)),
    totalKvBytes: Math.max(...answers.map((a) => a.stats.totalKvBytes)),
  };
}
