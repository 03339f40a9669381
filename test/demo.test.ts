// The demo's accuracy claim: 40 fixed questions about one book of 8K tokens, read once, at a quarter of its tokens.
import { test } from "node:test";
import { assert, assertEquals, assertGreaterOrEqual, assertLessOrEqual } from "@std/assert";
import { ask } from "../lib/cli/demo-ask.ts";
import { chooseBook, placeBook } from "../lib/cli/demo-book.ts";
import { withDemoDefaults } from "../lib/cli/demo-policies.ts";
import { demoModel, Engine, type PolicyOptions } from "../lib/index.ts";
import { loadTokenizer } from "../lib/tokenizer.ts";

const asked = 40;

test("the default budget is at most a quarter of the book as it is, not as it was asked for", {
  timeout: 60_000,
}, async () => {
  const tokenizer = await loadTokenizer(demoModel);
  for (const tokens of [1024, 2048, 8192])
    for (const pageSize of [16, 32, 64]) {
      const { ids } = placeBook(chooseBook({ tokens }, tokenizer, 16384), 1, 1, tokenizer, 16384);
      const { budget = 0, sink = 0, window = 0 } = withDemoDefaults({ pageSize }, ids.length);
      const what = `${ids.length} tokens in pages of ${pageSize}`;
      assertLessOrEqual(budget, ids.length / 4, what);
      assertGreaterOrEqual(budget, ids.length / 4 - pageSize, what);
      assertGreaterOrEqual(budget, sink + window + pageSize, what);
      assertEquals(budget % pageSize, 0, what);
    }
});

test("freekv answers as retrieval and as full attention do, where dropping loses half or more", {
  timeout: 120_000,
}, async () => {
  const tokenizer = await loadTokenizer(demoModel);
  const contextLength = 16384;
  const choice = chooseBook({ tokens: 8192 }, tokenizer, contextLength);
  const { ids, questions } = placeBook(choice, 1, asked, tokenizer, contextLength);
  assertEquals(questions.length, asked);
  assertEquals(new Set(questions.map((q) => q.kind)).size, 5, "every kind of question is among them");
  const options = withDemoDefaults({}, ids.length);
  assertLessOrEqual(options.budget ?? Number.POSITIVE_INFINITY, ids.length / 4);

  await using engine = await Engine.load(demoModel, { device: "cpu", ...options });
  using book = await engine.prefill(ids, { policy: "streaming" });
  const right = async (policy: PolicyOptions["policy"]): Promise<number> => {
    let n = 0;
    for (const question of questions) {
      const { correct } = await ask(book, question, { policy }, new AbortController().signal, () => {});
      if (correct) n++;
    }
    return n;
  };
  const [full, streaming, retrieve, freekv] = [
    await right("full"),
    await right("streaming"),
    await right("retrieve"),
    await right("freekv"),
  ];
  const all = `full ${full}, streaming ${streaming}, retrieve ${retrieve}, freekv ${freekv} of ${asked}`;
  console.log(all);
  assertGreaterOrEqual(freekv, retrieve - 1, all);
  assertLessOrEqual(freekv, retrieve + 1, all);
  assertGreaterOrEqual(freekv, full - 1, all);
  assertLessOrEqual(streaming, full / 2, all);
  assert(full >= 0.9 * asked, `full attention answers: ${all}`);
});
