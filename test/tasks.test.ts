import { readFileSync } from "node:fs";
import { test } from "node:test";
import {
  assert,
  assertEquals,
  assertGreater,
  assertLess,
  assertLessOrEqual,
  assertNotEquals,
  assertThrows,
} from "@std/assert";
import { demoModel } from "../lib/demo.ts";
import {
  COUNTS,
  chooseQuestions,
  grade,
  KINDS,
  LEAST_TOKENS,
  LONE,
  makeBook,
  NAMES,
  type Question,
  Rng,
  VALUES,
} from "../lib/tasks/index.ts";
import { loadTokenizer } from "../lib/tokenizer.ts";

const limit = { timeout: 60_000 };
const tokenizer = await loadTokenizer(demoModel);
const tokens = (text: string): number[] => [...tokenizer.encode(text, { addBos: false })];
const counted = { tokenizer: { encode: (text: string): ArrayLike<number> => tokenizer.encode(text) } };
const book = makeBook({ seed: 1, tokens: 8192, ...counted });
/** The words of a prompt that the book shows before the answer: all that follows "Answer: ". */
const lead = (prompt: string): string => prompt.slice(prompt.indexOf("Answer: ") + "Answer: ".length);

/** Text that no generator of ours would write. */
const texts: Record<string, string> = {
  lines: readFileSync(new URL("../lib/tasks/filler.ts", import.meta.url), "utf8"),
  short: 'Call me what you like. It was dark ("very" dark!) and late.\nWas it?  It was.\n\n\tThe end',
  unbroken: Array.from({ length: 30_000 }, (_, i) => "abcdefgh".charAt((i * i + (i >> 3)) % 8)).join(""),
  chinese: Array.from({ length: 9000 }, (_, i) =>
    i % 17 === 16 ? "。" : String.fromCodePoint(0x4e00 + ((i * 7919) % 5000)),
  ).join(""),
  pictures: "😀🚀 naïve ß\r\n".repeat(300) + "😀".repeat(2000),
};

test("the same seed gives the same book and questions, another seed another", limit, () => {
  assertEquals(makeBook({ seed: 1, tokens: 8192, ...counted }), book);
  assertEquals(chooseQuestions(book, 40, 7), chooseQuestions(book, 40, 7));
  assertNotEquals(makeBook({ seed: 2, tokens: 8192, ...counted }).text, book.text);
  const [a, b] = [new Rng(1), new Rng(2)].map((rng) => Array.from({ length: 8 }, () => rng.int(0, 99)));
  assertNotEquals(a, b);
});

test("a book takes no more tokens than asked and nearly all of them", limit, () => {
  for (const size of [LEAST_TOKENS, 300, 1000, 8192]) {
    for (const seed of [1, 2, 3]) {
      const made = makeBook({ seed, tokens: size, ...counted });
      const length = tokenizer.encode(made.text).length;
      assertLessOrEqual(length, size);
      assertGreater(length, size * 0.93 - 8, `seed ${seed}, ${size} tokens`);
      assert(made.questions.length > 0);
      if (size >= 1000) assertEquals(new Set(made.questions.map(({ kind }) => kind)).size, KINDS.length);
    }
  }
  assertThrows(() => makeBook({ seed: 1, tokens: LEAST_TOKENS - 1, ...counted }), RangeError, "at least");
});

test("a full book asks 16 codes and 8 questions of each other kind, at all depths", limit, () => {
  const count = (kind: string): number => book.questions.filter((question) => question.kind === kind).length;
  assertEquals(KINDS.map(count), [8, 16, 8, 8, 8]);
  const depths = book.questions.map((question) => question.depth);
  assertLess(Math.min(...depths), 0.1);
  assertGreater(Math.max(...depths), 0.85);
});

test(
  "every answer stands in the book, its first value right after the words that the prompt ends with",
  limit,
  () => {
    for (const { kind, prompt, answer, depth } of book.questions) {
      const first = / \w+/.exec(answer)?.[0] ?? "";
      const statement = `${lead(prompt)}${first}.`;
      assertEquals(book.text.split(statement).length, 2, `${kind}: once "${statement}"`);
      assertLess(Math.abs(book.text.indexOf(statement) / book.text.length - depth), 1e-9, kind);
      if (kind === "multi-value") {
        for (const [, before, value] of answer.matchAll(/after (\w+) is (\w+)/g)) {
          assert(book.text.includes(` after ${before} is ${value}.`), `${before} then ${value}`);
        }
      }
      if (kind === "multi-query") {
        for (const [, name, value] of answer.matchAll(/, (\w+) is (\w+)/g)) {
          assert(book.text.includes(`The code of ${name} is ${value}.`), `code of ${name}`);
        }
      }
      if (kind === "variable-tracking") {
        const names = answer.match(/\w+/g)?.filter((word) => word !== "reaches") ?? [];
        for (let i = 1; i < names.length; i++) {
          assert(book.text.includes(`The value of ${names[i - 1]} reaches ${names[i]}.`), `${names[i - 1]}`);
        }
      }
    }
  },
);

test("facts stand between whole words of the given text, which is otherwise untouched", limit, () => {
  for (const [name, filler] of Object.entries(texts)) {
    const made = makeBook({ seed: 3, tokens: 4096, ...counted, filler });
    const length = tokenizer.encode(made.text).length;
    assertLessOrEqual(length, 4096, name);
    assertGreater(length, 4096 * 0.93, name);
    const fact = /The (?:(?:code|gift|value) (?:of )?\w+(?: after \w+)? (?:is|reaches)|.{3,22} is) \w+\./gu;
    const known = new RegExp(
      `\\s(?:${[...LONE, "code of", "gift of", "value"].map((w) => `The ${w} `).join("|")})`,
      "gu",
    );
    assertGreater([...made.text.matchAll(known)].length, 40, name);
    for (const found of made.text.matchAll(fact)) {
      assert(/\s/u.test(made.text.charAt(found.index - 1)), `${name}: "${found[0]}" follows white space`);
      const next = made.text.charAt(found.index + found[0].length);
      assert(
        next === "" || /\s/u.test(next),
        `${name}: "${found[0]}" is followed by white space, not ${next}`,
      );
    }
    if (name === "unbroken" || name === "chinese" || name === "pictures") continue;
    const words = new Set(filler.split(/\s+/u));
    const planted = made.text.replace(known, (start) => start.replace(/\S/u, "\0T"));
    const others = planted
      .replace(/\0T[^.]*\./gu, " ")
      .split(/\s+/u)
      .filter((word) => word !== "" && !words.has(word));
    assertLessOrEqual(others.length, 1, `${name}: words cut or made up: ${others.slice(0, 5)}`);
  }
});

test("an empty text is refused", limit, () => {
  assertThrows(() => makeBook({ seed: 1, tokens: 512, ...counted, filler: " \n " }), RangeError, "empty");
});

test("the right answer is graded right, however spaced or continued", limit, () => {
  for (const question of book.questions) {
    assert(grade(question, question.answer));
    assert(grade(question, `${question.answer.toUpperCase()}\nQuestion: more`));
  }
});

test("a wrong, partial, reordered or longer answer is graded wrong", limit, () => {
  for (const question of book.questions) {
    const words = question.answer.match(/\w+/g) ?? [];
    const last = words[words.length - 1] as string;
    assert(!grade(question, question.answer.replace(last, last === "wolf" ? "bear" : "wolf")));
    assert(!grade(question, ""));
    assert(!grade(question, ` and${question.answer}`));
    assert(!grade(question, question.answer.replace(".", " too.")));
    if (words.length === 1) continue;
    assert(!grade(question, ` ${words[0]}.`));
    assert(!grade(question, ` ${[...words].reverse().join(" ")}.`));
  }
  const other = book.questions.filter(({ kind }) => kind === "single") as [Question, Question];
  assert(!grade(other[0], other[1].answer));
});

test("questions are chosen from all kinds in turn and none twice", limit, () => {
  const chosen = chooseQuestions(book, 40);
  assertEquals(chosen.length, 40);
  assertEquals(new Set(chosen).size, 40);
  for (const kind of KINDS) assertEquals(chosen.filter((question) => question.kind === kind).length, 8, kind);
  assertEquals(chooseQuestions(book, 1000).length, book.questions.length);
});

test(
  "each word of the lists is one token with the space before it, and no word is in two lists",
  limit,
  () => {
    assertGreater(Math.min(NAMES.length, VALUES.length), 100);
    assertEquals(new Set([...NAMES, ...VALUES]).size, NAMES.length + VALUES.length);
    for (const word of [...NAMES, ...VALUES, ...COUNTS]) assertEquals(tokens(` ${word}`).length, 1, word);
  },
);

test("book, prompt and answer encoded apart are the whole encoded at once", limit, () => {
  for (const { prompt, answer } of chooseQuestions(book, 20)) {
    assertEquals([...tokens(prompt), ...tokens(answer)], tokens(prompt + answer));
    assertEquals(
      [...tokens(book.text.slice(-300)), ...tokens(prompt)],
      tokens(book.text.slice(-300) + prompt),
    );
    assertLessOrEqual(tokens(answer).length + 1, 24, "an answer and its end fit the demo's 24 tokens");
  }
});

test("the demo model's tokenizer puts one <s> first and round-trips any text", limit, () => {
  assertEquals([...tokenizer.encode("")], [0]);
  for (const text of [...Object.values(texts), book.text, "\0\x01\x7f\u{10ffff}\ufeff 0123456789 <s"]) {
    const ids = tokens(text);
    assertEquals(tokenizer.decode(ids), text);
    assertLess(Math.max(...ids), 2048);
  }
});
