import type { Rng } from "./rng.ts";
import { COUNTS, LONE, NAMES, VALUES } from "./words.ts";

export type Kind = "single" | "multi-key" | "multi-value" | "multi-query" | "variable-tracking";

export const KINDS: readonly Kind[] = [
  "single",
  "multi-key",
  "multi-value",
  "multi-query",
  "variable-tracking",
];

/**
 * One question about a book. `prompt` follows the book directly; the model says `answer`, then its end-of-sequence
 * token. `depth` is where the answer's first fact stands: 0 at the book's start, 1 at its end.
 */
export interface Question {
  readonly kind: Kind;
  readonly prompt: string;
  readonly answer: string;
  readonly depth: number;
}

/** Statements that belong together, in the order in which the book shows them. */
export interface Fact {
  readonly kind: Exclude<Kind, "multi-query">;
  readonly statements: readonly string[];
  readonly prompt: string;
  readonly answer: string;
  /** The name that a multi-query question may ask for, with its value. */
  readonly code?: { readonly name: string; readonly value: string };
}

/**
 * Every question ends with the words that stand before the value in the book ("The code of amber is"), and an answer
 * of several parts repeats such words before each part. So each value follows from one look-up: where did this word
 * stand before such a verb, and what came next? That one skill a small model learns well over any distance.
 */
const ask = (question: string, lead: string): string => `\n\nQuestion: ${question}\nAnswer: ${lead}`;

function single(what: string, value: string): Fact {
  return {
    kind: "single",
    statements: [`The ${what} is ${value}.`],
    prompt: ask(`What is the ${what}?`, `The ${what} is`),
    answer: ` ${value}.`,
  };
}

function multiKey(name: string, value: string): Fact {
  return {
    kind: "multi-key",
    statements: [`The code of ${name} is ${value}.`],
    prompt: ask(`What is the code of ${name}?`, `The code of ${name} is`),
    answer: ` ${value}.`,
    code: { name, value },
  };
}

/** One name, several values, each in a statement of its own that also names the value before it. */
function multiValue(name: string, values: readonly string[]): Fact {
  const first = values[0] as string;
  const later = values.slice(1).map((value, i) => `after ${values[i]} is ${value}`);
  return {
    kind: "multi-value",
    statements: [
      `The gift of ${name} is ${first}.`,
      ...later.map((words) => `The gift of ${name} ${words}.`),
    ],
    prompt: ask(`What are the ${COUNTS[values.length]} gifts of ${name}?`, `The gift of ${name} is`),
    answer: ` ${[first, ...later].join(", ")}.`,
  };
}

/** A value handed from name to name. Each statement starts where the one before ended. */
function variableTracking(value: string, names: readonly string[]): Fact {
  const number = COUNTS[names.length];
  return {
    kind: "variable-tracking",
    statements: names.map((name, i) =>
      i === 0 ? `The value ${value} reaches ${name}.` : `The value of ${names[i - 1]} reaches ${name}.`,
    ),
    prompt: ask(`Which ${number} names does the value ${value} reach?`, `The value ${value} reaches`),
    answer: ` ${names.join(" reaches ")}.`,
  };
}

/** Several names in one question; each must be among the book's codes. */
export function multiQuery(codes: readonly { name: string; value: string }[]): {
  prompt: string;
  answer: string;
} {
  const names = codes.map((code) => code.name);
  const all = `${names.slice(0, -1).join(", ")} and ${names[names.length - 1]}`;
  return {
    prompt: ask(`What are the codes of ${all}?`, `The code of ${names[0]} is`),
    answer: `${codes.map((code, i) => (i === 0 ? ` ${code.value}` : ` ${code.name} is ${code.value}`)).join(",")}.`,
  };
}

/** How many facts of a kind a full book holds; 16 codes are the 16 keys of the multi-key task. */
const PER_BOOK = { single: 8, multiKey: 16, multiValue: 8, variableTracking: 8 } as const;

/**
 * The facts of one book, shuffled. No name and no value occurs in two of them, so an answer is right or wrong and
 * every fact is a distractor of the others.
 */
export function drawFacts(rng: Rng): Fact[] {
  const names = rng.shuffle(NAMES);
  const values = rng.shuffle(VALUES);
  const take = (from: string[], n: number): string[] => {
    const taken = from.splice(0, n);
    if (taken.length < n)
      throw new RangeError("word lists are too short for one book; lengthen NAMES and VALUES");
    return taken;
  };
  const one = (from: string[]): string => take(from, 1)[0] as string;
  const facts: Fact[] = [];
  for (const what of rng.shuffle(LONE).slice(0, PER_BOOK.single)) facts.push(single(what, one(values)));
  for (let i = 0; i < PER_BOOK.multiKey; i++) facts.push(multiKey(one(names), one(values)));
  for (let i = 0; i < PER_BOOK.multiValue; i++)
    facts.push(multiValue(one(names), take(values, rng.int(2, 4))));
  for (let i = 0; i < PER_BOOK.variableTracking; i++) {
    facts.push(variableTracking(one(values), take(names, rng.int(2, 4))));
  }
  return rng.shuffle(facts);
}

/** Lower-case words of what was said up to its first full stop. */
function words(text: string): string {
  const end = text.indexOf(".");
  return (
    text
      .slice(0, end < 0 ? text.length : end)
      .toLowerCase()
      .match(/[\p{L}\p{N}]+/gu) ?? []
  ).join(" ");
}

/**
 * Whether what was said answers the question: all of the answer's words, in order, and no other before the full stop
 * (the end-of-sequence token is not part of `said`). Text after the full stop is not held against it.
 */
export function grade(question: Pick<Question, "answer">, said: string): boolean {
  return words(said) === words(question.answer);
}
