/// <reference lib="esnext.disposable" preserve="true" />
// Engines beside each other on one device, and sequences of unlike size on one engine: each says what it says alone.

import { test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import type { Engine } from "../lib/engine.ts";
import type { EngineOptions } from "../lib/types.ts";
import { checkpoint, generate, load, type Trace, timeout, tokens } from "./pipeline.ts";

/** Of weights and widths that a GPU's dense chain takes. */
const chained = { dtype: "bf16", hidden: 64, intermediate: 128 } as const;
const folders = [checkpoint(chained), checkpoint({ ...chained, seed: 9 })];
const ids = [0, 1].map((i) => tokens(700, 3 + i));

/** Prompts while the others decode, then decodes, appends, and decodes on. */
async function work(engine: Engine, prompt: readonly number[], from: number): Promise<Trace[]> {
  using sequence = await engine.prefill(prompt.slice(0, from));
  const first = await generate(sequence, { maxTokens: 40 });
  await sequence.append(prompt.slice(from, from + 150));
  using fork = sequence.fork({ correction: "exact" });
  const both = await Promise.all([sequence, fork].map((each) => generate(each, { maxTokens: 30 })));
  return [first, ...both];
}

const everything = (engine: Engine, i: number): Promise<Trace[]> =>
  Promise.all([260, 311].map((from) => work(engine, ids[i] as number[], from))).then((all) => all.flat());

for (const [name, options] of [
  ["captured", [{ orchestration: "captured" }, { orchestration: "captured" }]],
  ["captured and host", [{ orchestration: "captured" }, { orchestration: "host", recall: "staged" }]],
] as [string, EngineOptions[]][])
  test(`two engines at once say what each says alone: ${name}`, { timeout }, async () => {
    const alone: Trace[][] = [];
    for (const [i, dir] of folders.entries()) {
      await using engine = await load(dir, options[i]);
      alone.push(await everything(engine, i));
    }
    assert(alone[0]?.[0]?.argmax.join() !== alone[1]?.[0]?.argmax.join(), "the models differ");
    await using a = await load(folders[0] as string, options[0]);
    await using b = await load(folders[1] as string, options[1]);
    for (let round = 0; round < 2; round++) assertEquals(await Promise.all([a, b].map(everything)), alone);
  });

test("an engine goes on where another one on its device has ended", { timeout }, async () => {
  await using lasting = await load(folders[0] as string);
  const expected = await everything(lasting, 0);
  const brief = await load(folders[1] as string);
  const [during] = await Promise.all([everything(lasting, 0), everything(brief, 1)]);
  const after = everything(lasting, 0);
  await brief[Symbol.asyncDispose]();
  assertEquals([during, await after], [expected, expected]);
});

for (const options of [
  { orchestration: "captured" },
  { orchestration: "host", recall: "fragmented" },
] as EngineOptions[])
  test(`a sequence that selects more than any before it changes nothing for the others: ${options.orchestration}`, {
    timeout,
  }, async () => {
    const prompt = ids[0] as number[];
    const wide = { budget: 512, tau: 1 } as const; // 28 pages of 44
    const decode = async (engine: Engine, policy: object): Promise<Trace> => {
      using sequence = await engine.prefill(prompt, policy);
      return await generate(sequence, { maxTokens: 40 });
    };
    const alone: Trace[] = [];
    for (const policy of [{}, wide]) {
      await using engine = await load(folders[0] as string, options);
      alone.push(await decode(engine, policy));
    }
    assert(alone[0]?.logprobs.join() !== alone[1]?.logprobs.join(), "the budgets differ in what they say");
    await using engine = await load(folders[0] as string, options);
    using narrow = await engine.prefill(prompt);
    const first = await generate(narrow, { maxTokens: 20 }); // its graph holds the lists as they are then
    const running = generate(narrow, { maxTokens: 20 });
    assertEquals(await decode(engine, wide), alone[1]);
    const second = await running;
    assertEquals([...first.argmax, ...second.argmax], alone[0]?.argmax);
    assertEquals([...first.logprobs, ...second.logprobs], alone[0]?.logprobs);
    assertEquals(await decode(engine, {}), alone[0]);
  });
