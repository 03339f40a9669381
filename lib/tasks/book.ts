import { drawFacts, type Fact, KINDS, multiQuery, type Question } from "./facts.ts";
import { generateUnits, splitUnits, type Unit } from "./filler.ts";
import { Rng } from "./rng.ts";

export interface BookOptions {
  readonly seed: number;
  /** The most tokens the book may take, its beginning-of-sequence token included. */
  readonly tokens: number;
  /** Only counts are read; whether it adds special tokens by itself does not matter. */
  readonly tokenizer: { encode(text: string): ArrayLike<number> };
  /** The user's own text. Absent: generated filler. Shorter than the book: it is read again from its start. */
  readonly filler?: string;
}

export interface Book {
  readonly text: string;
  readonly questions: readonly Question[];
}

/** The smallest book: a few facts beside some filler. From about 500 tokens on it has facts of every kind. */
export const LEAST_TOKENS = 128;
/** Facts take at most this share of a book. */
const FACT_SHARE = 0.4;
const MULTI_QUERIES = 8;
/** No statement is shorter, in any tokenizer; spares counting facts that cannot fit. */
const SHORTEST_FACT = 6;
/** A unit that brings its own white space; the others (cut inside an endless word) are given a space. */
const SPACED = /^\s/u;

interface Placed {
  readonly fact: Fact;
  /** For each statement, the filler unit it stands before; ascending. */
  readonly slots: readonly number[];
}

/**
 * A book of about `tokens` tokens with facts of all kinds at random depths, and every question about it.
 * Facts stand between units of filler, that is at sentence or line ends, never inside a word.
 */
export function makeBook(options: BookOptions): Book {
  const { seed, tokens, tokenizer } = options;
  if (!Number.isInteger(tokens) || tokens < LEAST_TOKENS) {
    throw new RangeError(`a book needs at least ${LEAST_TOKENS} tokens, got ${tokens}`);
  }
  const rng = new Rng(seed);
  const special = tokenizer.encode("").length;
  const count = (text: string): number => tokenizer.encode(text).length - special;

  // One of the tokens is the beginning of sequence.
  const facts = chooseFacts(rng, (tokens - 1) * FACT_SHARE, count);
  const units: Unit[] = [];
  let left = tokens - 1 - facts.reduce((sum, fact) => sum + cost(fact, count), 0);
  for (const unit of fillerUnits(rng, options.filler, tokens)) {
    const needed = count(unit) + (SPACED.test(unit) ? 0 : 1);
    if (needed > left) {
      const part = shorten(unit, left - 1, count);
      if (part !== "") units.push(units.length === 0 ? part.trimStart() : part);
      break;
    }
    left -= needed;
    units.push(units.length === 0 ? unit.trimStart() : unit);
  }

  const placed = facts.map(
    (fact): Placed => ({
      fact,
      slots: fact.statements.map(() => rng.int(1, Math.max(1, units.length))).sort((a, b) => a - b),
    }),
  );
  const { text, starts } = weave(rng, units, placed);
  const depthOf = (fact: Fact): number => (starts.get(fact) ?? 0) / text.length;
  const questions: Question[] = facts.map((fact) => ({
    kind: fact.kind,
    prompt: fact.prompt,
    answer: fact.answer,
    depth: depthOf(fact),
  }));
  const coded = facts.filter((fact) => fact.code !== undefined);
  for (let i = 0; i < MULTI_QUERIES && coded.length >= 2; i++) {
    const asked = rng.shuffle(coded).slice(0, rng.int(2, 4));
    const codes = asked.flatMap((fact) => (fact.code === undefined ? [] : [fact.code]));
    questions.push({ kind: "multi-query", ...multiQuery(codes), depth: depthOf(asked[0] as Fact) });
  }
  return { text, questions };
}

/** `n` of a book's questions, kinds in turn, the same ones for the same seed; fewer if the book has fewer. */
export function chooseQuestions(book: Book, n: number, seed = 0): Question[] {
  const rng = new Rng(seed);
  const queues = KINDS.map((kind) =>
    rng.shuffle(book.questions.filter((question) => question.kind === kind)),
  );
  const chosen: Question[] = [];
  while (chosen.length < n && queues.some((queue) => queue.length > 0)) {
    for (const queue of queues) {
      const question = queue.pop();
      if (question !== undefined && chosen.length < n) chosen.push(question);
    }
  }
  return chosen;
}

const cost = (fact: Fact, count: (text: string) => number): number =>
  fact.statements.reduce((sum, statement) => sum + count(`\n${statement}`), 0);

/** All facts of a full book, or as many as fit in `budget` tokens, one of each kind first. */
function chooseFacts(rng: Rng, budget: number, count: (text: string) => number): Fact[] {
  const drawn = drawFacts(rng);
  const seen = new Set<string>();
  const first = drawn.filter((fact) => !seen.has(fact.kind) && seen.add(fact.kind));
  const rest = drawn.filter((fact) => !first.includes(fact));
  let left = budget;
  return [...first, ...rest].filter((fact) => {
    if (left < SHORTEST_FACT) return false;
    const needed = cost(fact, count);
    if (needed > left) return false;
    left -= needed;
    return true;
  });
}

function* fillerUnits(rng: Rng, filler: string | undefined, tokens: number): Generator<Unit> {
  if (filler === undefined) {
    yield* generateUnits(rng);
    return;
  }
  // No text needs more than 32 characters a token; a file of gigabytes is not split for a book of 8,192.
  const units = splitUnits(filler.slice(0, tokens * 32));
  const first = units[0];
  if (first === undefined) throw new RangeError("the book's text is empty; give a file with some text in it");
  yield* units;
  const again = [`\n\n${first.trimStart()}`, ...units.slice(1)];
  for (;;) yield* again;
}

/** As much of a unit as fits: whole words, or whole characters where it has but one word. */
function shorten(unit: Unit, tokens: number, count: (text: string) => number): Unit {
  let part = unit;
  while (part.trim() !== "" && count(part) > tokens) {
    const wordEnd = part.search(/\s+\S*$/u);
    part = part.slice(0, wordEnd).trim() !== "" && wordEnd >= 0 ? part.slice(0, wordEnd) : trim(part);
  }
  return part.trim() === "" ? "" : part;
}

/** Seven eighths of the characters; of one, nothing. */
const trim = (text: string): string => {
  const characters = [...text];
  return characters.slice(0, Math.floor((characters.length * 7) / 8)).join("");
};

/** Puts each statement before its unit, in that unit's manner: on its own line, or after a space. */
function weave(
  rng: Rng,
  units: readonly Unit[],
  placed: readonly Placed[],
): { text: string; starts: Map<Fact, number> } {
  const before = new Map<number, { fact: Fact; statement: string }[]>();
  // Shuffled, so that facts which share a slot come in no order of kind; statements of one fact keep theirs.
  for (const { fact, slots } of rng.shuffle(placed)) {
    fact.statements.forEach((statement, i) => {
      const slot = slots[i] as number;
      const there = before.get(slot) ?? [];
      there.push({ fact, statement });
      before.set(slot, there);
    });
  }
  const starts = new Map<Fact, number>();
  let text = "";
  for (let i = 0; i <= units.length; i++) {
    const unit = units[i] ?? "\n";
    for (const { fact, statement } of before.get(i) ?? []) {
      text += /^\s*\n/u.test(unit) ? "\n" : " ";
      if (!starts.has(fact)) starts.set(fact, text.length);
      text += statement;
    }
    if (i === units.length) break;
    text += i > 0 && !SPACED.test(unit) ? ` ${unit}` : unit;
  }
  return { text, starts };
}
