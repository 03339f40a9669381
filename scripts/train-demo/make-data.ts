/**
 * Writes training documents as token ids, by the very code and the very tokenizer that the demo runs: a book, then
 * questions with their answers, each piece encoded by itself and joined, as the demo joins them.
 *
 *   bun scripts/train-demo/make-data.ts --out FILE --length 4096 --documents 64 --seed 1 [--filler LIST]
 *
 * FILE holds `documents` × `length` uint16: the id, plus 0x8000 where the answer loss applies (answers and the
 * end-of-sequence after each), plus 0x4000 where a document is padded. LIST names a file of paths, one a line, to
 * arbitrary text that half of the books are made of.
 * With --evaluate a document is JSON instead: {"text", "book": ids, "questions": [{kind, prompt, answer: ids, depth}]}.
 */
import { readFileSync, renameSync, writeFileSync } from "node:fs";
import { parseArgs } from "node:util";
import { Tokenizer } from "@huggingface/tokenizers";
import { drawFacts, type Fact, multiQuery } from "../../lib/tasks/facts.ts";
import {
  type Book,
  LEAST_TOKENS,
  makeBook,
  NAMES,
  type Question,
  Rng,
  VALUES,
} from "../../lib/tasks/index.ts";

const ANSWER = 0x8000;
const PADDING = 0x4000;
const EOS = 1;
/** Questions take this share of a document and at most so many tokens: all that a full book has, without repeats. */
const QUESTION_SHARE = 0.36;
const QUESTION_TOKENS = 1200;
/** Questions for several codes come first, since each takes its codes from the questions for one. */
const MULTI_QUERIES = 3;
const MODEL = new URL("../../lib/demo-model/", import.meta.url);

const { values: flags } = parseArgs({
  options: {
    out: { type: "string" },
    length: { type: "string", default: "4096" },
    documents: { type: "string", default: "64" },
    seed: { type: "string", default: "1" },
    filler: { type: "string" },
    evaluate: { type: "boolean", default: false },
  },
});
if (flags.out === undefined) throw new Error("--out FILE is needed");
const length = Number(flags.length);
const documents = Number(flags.documents);
const rng = new Rng(Number(flags.seed));

const tokenizer = new Tokenizer(
  JSON.parse(readFileSync(new URL("tokenizer.json", MODEL), "utf8")),
  JSON.parse(readFileSync(new URL("tokenizer_config.json", MODEL), "utf8")),
);
const encode = (text: string): number[] => tokenizer.encode(text, { add_special_tokens: false }).ids;

const paths =
  flags.filler === undefined ? [] : readFileSync(flags.filler, "utf8").split("\n").filter(Boolean);

const texts = new Map<string, string>();
function read(path: string): string {
  const known = texts.get(path);
  if (known !== undefined) return known;
  const text = readFileSync(path, "utf8");
  texts.set(path, text);
  return text;
}

/** Of ten books five are arbitrary text; one of those repeats a short text, as the demo does with a short file. */
function filler(tokens: number): { filler: string } | Record<string, never> {
  if (paths.length === 0 || rng.chance(0.5)) return {};
  const wanted = rng.chance(0.1) ? rng.int(200, 4000) : tokens * 5;
  let text = "";
  for (let tries = 0; text.length < wanted && tries < 64; tries++) {
    const whole = read(rng.pick(paths));
    const start = rng.int(0, Math.max(0, whole.length - wanted));
    text += `${text === "" ? "" : "\n\n"}${whole.slice(start, start + wanted - text.length)}`;
  }
  return text.trim() === "" ? {} : { filler: text };
}

function book(tokens: number): Book {
  return makeBook({ seed: rng.int(0, 2 ** 31), tokens, tokenizer: { encode }, ...filler(tokens) });
}

/** Questions that fit in `room`. A fact is asked about once: a second question would find its answer in the first. */
function choosePieces(all: readonly Question[], room: number): number[][] {
  const isMulti = (question: Question): boolean => question.kind === "multi-query";
  const shuffled = rng.shuffle(all);
  const order = [...shuffled.filter(isMulti).slice(0, MULTI_QUERIES), ...shuffled.filter((q) => !isMulti(q))];
  const said = new Set<string>();
  const pieces: number[][] = [];
  let left = room;
  for (const { prompt, answer } of order) {
    const facts = (answer.match(/\w+/g) ?? []).filter(
      (word) => VALUES.includes(word) || NAMES.includes(word),
    );
    if (facts.some((word) => said.has(word))) continue;
    const piece = [...encode(prompt), ...encode(answer).map((id) => id | ANSWER), EOS | ANSWER];
    if (piece.length > left) continue;
    left -= piece.length;
    for (const word of facts) said.add(word);
    pieces.push(piece);
  }
  return pieces;
}

function trainingDocument(): Uint16Array {
  const questionTokens = Math.min(QUESTION_TOKENS, Math.floor(length * QUESTION_SHARE));
  const made = book(Math.max(LEAST_TOKENS, length - questionTokens));
  const ids = [0, ...encode(made.text)];
  for (const piece of rng.shuffle(choosePieces(made.questions, length - ids.length))) {
    for (const id of piece) ids.push(id);
  }
  if (ids.length > length) throw new Error(`a book of ${ids.length} tokens does not fit ${length}`);
  return Uint16Array.from({ length }, (_, i) => ids[i] ?? EOS | PADDING);
}

/** Of documents this short, this share are drills. */
const DRILLS: Readonly<Record<number, number>> = { 256: 1, 512: 0.5, 1024: 0.25 };
const DRILL_SHARE = 0.3;

/**
 * A drill has no filler: facts, then the same facts again in another order, whose last words count as answers, then
 * questions. So dense, it teaches the look-up in a few hundred steps; books alone take far longer to get there.
 */
function drillDocument(): Uint16Array {
  const statements: string[] = [];
  const facts: Fact[] = [];
  let left = length * DRILL_SHARE;
  for (const fact of drawFacts(rng)) {
    left -= encode(fact.statements.join(" ")).length;
    if (left < 0) break;
    facts.push(fact);
    statements.push(...fact.statements);
  }
  const ids = [0];
  for (const statement of rng.shuffle(statements)) ids.push(...encode(` ${statement}`));
  for (const statement of rng.shuffle(statements)) {
    const end = statement.lastIndexOf(" ");
    ids.push(
      ...encode(` ${statement.slice(0, end)}`),
      ...encode(statement.slice(end)).map((id) => id | ANSWER),
    );
  }
  const questions: Question[] = facts.map((fact) => ({ ...fact, depth: 0 }));
  const codes = rng
    .shuffle(facts.flatMap((fact) => (fact.code === undefined ? [] : [fact.code])))
    .slice(0, 4);
  if (codes.length > 1) questions.push({ kind: "multi-query", ...multiQuery(codes), depth: 0 });
  for (const piece of choosePieces(questions, length - ids.length)) ids.push(...piece);
  return Uint16Array.from({ length }, (_, i) => ids[i] ?? EOS | PADDING);
}

function evaluationDocument(): object {
  const made = book(length);
  return {
    text: made.text,
    book: [0, ...encode(made.text)],
    questions: made.questions.map(({ kind, prompt, answer, depth }) => ({
      kind,
      prompt: encode(prompt),
      answer: [...encode(answer), EOS],
      depth,
    })),
  };
}

// Under another name until it is whole: the trainer takes files as they appear.
const part = `${flags.out}.${process.pid}`;
if (flags.evaluate) {
  writeFileSync(
    part,
    Array.from({ length: documents }, () => `${JSON.stringify(evaluationDocument())}\n`).join(""),
  );
} else {
  const all = new Uint16Array(documents * length);
  for (let i = 0; i < documents; i++)
    all.set(rng.chance(DRILLS[length] ?? 0) ? drillDocument() : trainingDocument(), i * length);
  writeFileSync(part, all);
}
renameSync(part, flags.out);
