/// <reference lib="esnext.disposable" preserve="true" />
// The engine in a Bun Worker, as test/examples/worker.ts does it.

import { test } from "node:test";
import { assert, assertEquals, assertGreaterOrEqual, assertMatch, assertRejects } from "@std/assert";
import { FreeKVError } from "../lib/errors.ts";
import { EngineWorker } from "./examples/worker.ts";
import { checkpoint, load, small, timeout, tokens } from "./pipeline.ts";
import { onTarget } from "./target.ts";

const prompt = tokens(200);
const drawn = { maxTokens: 40, ignoreEos: true, temperature: 1, seed: 4 } as const;
const open = (dir: string): EngineWorker => new EngineWorker(dir, onTarget(small));

async function collect(generation: AsyncIterable<{ id: number }>): Promise<number[]> {
  const ids: number[] = [];
  for await (const { id } of generation) ids.push(id);
  return ids;
}

test("tokens stream from the worker, those of an engine on this thread, while timers run here", {
  timeout,
}, async () => {
  const dir = checkpoint();
  await using here = await load(dir);
  const expected = await collect(here.generate(prompt, drawn));
  await using engine = open(dir);
  let ticks = 0;
  const timer = setInterval(() => ticks++, 1);
  const [one, other] = await Promise.all([
    collect(engine.generate(prompt, drawn)),
    collect(engine.generate(prompt, drawn)),
  ]);
  clearInterval(timer);
  assertEquals([one, other], [expected, expected]);
  assertGreaterOrEqual(new Set(one).size, 5);
  assertGreaterOrEqual(ticks, 5);
});

test("an abort and a reader that leaves stop the generation, and the worker goes on", {
  timeout,
}, async () => {
  await using engine = open(checkpoint());
  const controller = new AbortController();
  const reason = new Error("enough");
  let seen = 0;
  const aborted = await assertRejects(async () => {
    for await (const _ of engine.generate(prompt, {
      maxTokens: 4000,
      ignoreEos: true,
      signal: controller.signal,
    }))
      if (++seen === 3) controller.abort(reason);
  });
  assertEquals([aborted, seen], [reason, 3]);
  for await (const _ of engine.generate(prompt, { maxTokens: 4000, ignoreEos: true })) break;
  assertEquals((await collect(engine.generate(prompt, drawn))).length, 40);
  const refused = await assertRejects(() => collect(engine.generate([-1])), FreeKVError);
  assertEquals(refused.code, "BAD_ARGUMENT");
});

test("a worker that fails is reported to whoever waits for it, and to later callers", {
  timeout,
}, async () => {
  await using missing = open("no-such-folder");
  const error = (await assertRejects(() => collect(missing.generate(prompt)))) as Error;
  assertMatch(error.message, /no-such-folder/);

  await using crashing = open(checkpoint());
  const crash = (await assertRejects(async () => {
    for await (const _ of crashing.generate(prompt, { maxTokens: 4000, ignoreEos: true }))
      crashing.worker.postMessage(null); // an exception that nothing in the worker catches
  })) as Error;
  assertMatch(crash.message, /null/);
  const later = await assertRejects(() => collect(crashing.generate(prompt)));
  assertEquals(later, crash);

  await using ended = open(checkpoint());
  const end = (await assertRejects(async () => {
    for await (const _ of ended.generate(prompt, { maxTokens: 4000, ignoreEos: true }))
      await ended.worker.terminate();
  })) as Error;
  assert(/ended with code/.test(end.message), end.message);
});
