// Generating: what is drawn, when it ends, and what the sequence holds afterwards.

import { test } from "node:test";
import {
  assert,
  assertAlmostEquals,
  assertEquals,
  assertGreater,
  assertNotEquals,
  assertRejects,
} from "@std/assert";
import type { Engine } from "../lib/engine.ts";
import { FreeKVError } from "../lib/errors.ts";
import type { Sequence } from "../lib/sequence.ts";
import type { EngineOptions, GenerateOptions } from "../lib/types.ts";
import { checkpoint, generate, load, score, timeout, tokens } from "./pipeline.ts";

const dir = checkpoint();
const text = checkpoint({ tokenizer: true, layers: 2, seed: 3 });
const ids = tokens(400);
const drawn = { temperature: 1, seed: 11, ignoreEos: true } as const;
const engines: Record<string, EngineOptions> = {
  captured: { orchestration: "captured", tau: 0 },
  host: { orchestration: "host", tau: 0 },
  staged: { recall: "staged", tau: 0 },
};

/** Token ids until the loop breaks after `n` of them. */
async function take(sequence: Sequence, n: number, options: GenerateOptions = drawn): Promise<number[]> {
  const found: number[] = [];
  for await (const { id } of sequence.generate(options)) {
    found.push(id);
    if (found.length === n) break;
  }
  return found;
}

const completed = (sequence: Sequence, options: GenerateOptions) =>
  sequence.generate({ ...drawn, ...options }).result();

for (const [name, options] of Object.entries(engines)) {
  test(`${name}: a generation in pieces gives the tokens of one that is not interrupted`, {
    timeout,
  }, async () => {
    await using engine = await load(dir, options);
    using parent = await engine.prefill(ids.slice(0, 390));
    using whole = parent.fork();
    const { tokens: expected } = await completed(whole, { maxTokens: 40 });
    assertEquals(whole.length, 430);
    assertGreater(new Set(expected).size, 10);

    using pieces = parent.fork();
    const found: number[] = [];
    for (const n of [1, 2, 9, 13]) {
      found.push(...(await take(pieces, n)));
      assertEquals(pieces.length, 390 + found.length); // exactly what was yielded
    }
    found.push(...(await completed(pieces, { maxTokens: 15 })).tokens);
    assertEquals(found, expected);

    // What was yielded is what is held: scored, it gives the same numbers.
    using again = parent.fork();
    const scored = await score(again, expected);
    using third = parent.fork();
    const generated = await generate(third, { ...drawn, maxTokens: 40 });
    assertEquals(generated.argmax, expected);
    assertEquals(scored.logprobs, generated.logprobs.slice(1));
  });

  test(`${name}: an abort holds what was yielded and rejects with its reason`, { timeout }, async () => {
    await using engine = await load(dir, options);
    using parent = await engine.prefill(ids.slice(0, 390));
    for (const n of [0, 1, 2, 10, 11]) {
      using sequence = parent.fork();
      const controller = new AbortController();
      const reason = new Error(`after ${n}`);
      const found: number[] = [];
      if (n === 0) setTimeout(() => controller.abort(reason), 0);
      const error = await assertRejects(async () => {
        for await (const { id } of sequence.generate({
          ...drawn,
          maxTokens: 1e6,
          signal: controller.signal,
        })) {
          found.push(id);
          if (found.length === n) controller.abort(reason);
        }
      });
      assert(error === reason);
      assertEquals(sequence.length, 390 + found.length);
      if (n > 0) assertEquals(found.length, n);
      // It goes on from there: the same as where a prompt ended with those tokens, but for how their K and V came about.
      const { tokens: more } = await completed(sequence, { maxTokens: 5 });
      assertEquals(more.length, 5);
      assertEquals(sequence.length, 390 + found.length + 5);
    }
  });

  test(`${name}: many generations that start, break and go on at different times hold what they yielded`, {
    timeout,
  }, async () => {
    await using engine = await load(dir, { ...options, maxSequences: 16 });
    const alone = async (seed: number): Promise<number[]> => {
      using sequence = await engine.prefill(ids.slice(0, 300 + seed));
      return (await completed(sequence, { maxTokens: 24, seed })).tokens;
    };
    const pause = (turns: number): Promise<void> =>
      turns > 0 ? new Promise((resolve) => setImmediate(() => resolve(pause(turns - 1)))) : Promise.resolve();
    const broken = async (seed: number): Promise<number[]> => {
      using sequence = await engine.prefill(ids.slice(0, 300 + seed));
      const found: number[] = [];
      for (let n = 1 + (seed % 4); found.length < 24; n = 1 + ((n + seed) % 5)) {
        for await (const { id } of sequence.generate({ ...drawn, seed })) {
          found.push(id);
          await pause((seed * n) % 7);
          if (--n <= 0 || found.length === 24) break;
        }
        assertEquals(sequence.length, 300 + seed + found.length, `sequence ${seed}`);
        // The token held last is known, too: it is computed anew.
        sequence.truncate(sequence.length);
      }
      const { length } = sequence;
      sequence.truncate(length - 1);
      assertEquals(sequence.length, length - 1);
      return found;
    };
    const seeds = Array.from({ length: 12 }, (_, i) => i + 1);
    const found = await Promise.all(seeds.map(broken));
    for (const seed of seeds) assertEquals(found[seed - 1], await alone(seed), `sequence ${seed}`);
  });
}

test("draws depend on seed and position alone; temperature 0 is greedy", { timeout }, async () => {
  await using engine = await load(dir, { tau: 0 });
  using parent = await engine.prefill(ids.slice(0, 390));
  const run = async (options: GenerateOptions): Promise<number[]> => {
    using sequence = parent.fork();
    return (await completed(sequence, { maxTokens: 12, ...options })).tokens;
  };
  const greedy = await run({ temperature: 0 });
  assertEquals(await run({ temperature: 0, seed: 99 }), greedy);
  assertEquals(await run({ temperature: 2, topK: 1 }), greedy);
  assertEquals(await run({ temperature: 2, topP: 1e-6 }), greedy);
  const one = await run({ seed: 1 });
  assertNotEquals(one, greedy);
  assertNotEquals(await run({ seed: 2 }), one);
  const together = await Promise.all([
    run({ seed: 2 }),
    run({ temperature: 0 }),
    run({ seed: 1 }),
    run({ seed: 1, temperature: 3 }),
  ]);
  assertEquals(together[2], one);
  assertEquals(together[1], greedy);
  assertNotEquals(together[3], one);
});

test("logprobs: of the drawn token, and of the most probable ones in order", { timeout }, async () => {
  await using engine = await load(dir);
  using sequence = await engine.prefill(ids.slice(0, 100));
  let n = 0;
  for await (const { id, logprob, top } of sequence.generate({ ...drawn, maxTokens: 8, logprobs: 5 })) {
    assertEquals(top?.length, 5);
    const values = (top ?? []).map((each) => each.logprob);
    assertEquals(
      values,
      values.toSorted((a, b) => b - a),
    );
    assert(logprob !== undefined && logprob <= (values[0] as number));
    assertEquals(logprob, top?.find((each) => each.id === id)?.logprob ?? logprob);
    assert(values.reduce((sum, value) => sum + Math.exp(value), 0) <= 1 + 1e-5);
    n++;
  }
  assertEquals(n, 8);
  for await (const token of sequence.generate({ ...drawn, maxTokens: 1 }))
    assertEquals(Object.keys(token), ["id", "text"]);
});

test("it ends by length, at a stop token, at EOS, and where the context is full", { timeout }, async () => {
  await using engine = await load(dir, { maxContext: 400 });
  using parent = await engine.prefill(ids.slice(0, 380));
  using a = parent.fork();
  const whole = await completed(a, { maxTokens: 1000 });
  assertEquals([whole.finishReason, whole.tokens.length, a.length], ["context", 20, 400]);
  assertEquals(whole.usage, { promptTokens: 380, cachedTokens: 380, completionTokens: 20 });
  const nothing = await completed(a, {});
  assertEquals([nothing.finishReason, nothing.tokens], ["context", []]);

  using b = parent.fork();
  const short = await completed(b, { maxTokens: 7 });
  assertEquals([short.finishReason, short.tokens, b.length], ["length", whole.tokens.slice(0, 7), 387]);

  using c = parent.fork();
  const last = whole.tokens[9] as number;
  const stopped = await completed(c, { stopTokens: Int32Array.of(last) });
  const at = whole.tokens.indexOf(last) + 1;
  assertEquals(
    [stopped.finishReason, stopped.tokens, c.length],
    ["stop", whole.tokens.slice(0, at), 380 + at],
  );

  const ending = checkpoint({ config: { eos_token_id: [last, 1] } });
  await using other = await load(ending);
  using d = await other.prefill(ids.slice(0, 380));
  const eos = await d.generate({ ...drawn, ignoreEos: false }).result();
  assertEquals([eos.finishReason, eos.tokens], ["stop", whole.tokens.slice(0, at)]);
  await using third = await load(ending);
  using e = await third.prefill(ids.slice(0, 380));
  assertEquals((await completed(e, { maxTokens: 20 })).tokens, whole.tokens);
});

test("texts join to the whole; a stop string is found across tokens and not shown", { timeout }, async () => {
  await using engine = await load(text);
  const prompt = "The key of the blue house is 4711. ".repeat(8);
  const run = async (engine: Engine, options: GenerateOptions) => {
    const texts: string[] = [];
    const generation = engine.generate(prompt, { ...drawn, maxTokens: 60, ...options });
    for await (const token of generation) texts.push(token.text);
    return texts;
  };
  // Ascii tokens only: a byte of a longer character prints nothing by itself.
  using sequence = await engine.prefill(prompt);
  const whole = await sequence.generate({ ...drawn, maxTokens: 60 }).result();
  assertEquals((await run(engine, {})).join(""), whole.text);
  const found = /[\x20-\x7e]{2,3}/.exec(whole.text.slice(1));
  assert(found, `no stop string in ${JSON.stringify(whole.text)}`);
  const stop = found[0];
  const before = whole.text.slice(0, whole.text.indexOf(stop));
  const texts = await run(engine, { stop: ["never to be seen", stop] });
  assertEquals(texts.join(""), before);
  const stopped = await engine.generate(prompt, { ...drawn, maxTokens: 60, stop }).result();
  assertEquals([stopped.finishReason, stopped.text], ["stop", before]);
  assert(stopped.tokens.length < 60);
  assertEquals(engine.stats().sequences, 1); // a generation's own sequence is gone at its end
  assertEquals(stopped.usage.promptTokens, engine.tokenizer.encode(prompt).length);
});

test("a generation is read once, and nothing runs before", { timeout }, async () => {
  await using engine = await load(dir);
  using sequence = await engine.prefill(ids.slice(0, 50));
  const generation = sequence.generate({ ...drawn, maxTokens: 3 });
  assertEquals(sequence.length, 50);
  await sequence.append(ids.slice(50, 60));
  const { usage, stats } = await generation.result();
  assertEquals([usage.promptTokens, sequence.length], [60, 63]);
  assert((stats.ttftMs as number) > 0 && (stats.tpotMs as number) > 0);
  assertEquals((await generation.result()).usage, usage);
  const error = await assertRejects(async () => await Array.fromAsync(generation), FreeKVError);
  assertEquals(error.code, "BUSY");
  assertAlmostEquals(engine.stats().ttftMs as number, sequence.stats().ttftMs as number);
});
