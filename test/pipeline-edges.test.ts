// At the edges of what an engine holds: a full context, more runs than sequences, lanes that change owners.

import { test } from "node:test";
import { assert, assertEquals, assertMatch, assertRejects, assertThrows } from "@std/assert";
import { type ErrorCode, FreeKVError } from "../lib/errors.ts";
import { checkpoint, load, score, timeout, tokens } from "./pipeline.ts";

const dir = checkpoint();
const ids = tokens(900);

async function refused(code: ErrorCode, text: RegExp, work: () => unknown): Promise<void> {
  const error = await assertRejects(async () => await work(), FreeKVError);
  assertEquals(error.code, code, error.message);
  assertMatch(error.message, text);
}

test("a prompt that fills the context answers, and leaves the engine whole", { timeout }, async () => {
  for (const policy of ["freekv", "retrieve", "full", "streaming", "quest"] as const) {
    await using engine = await load(dir, { maxContext: 320, policy });
    using full = await engine.prefill(tokens(320));
    const { tokens: drawn, finishReason } = await full.generate({ maxTokens: 5 }).result();
    assertEquals([drawn, finishReason], [[], "context"]);
    assertEquals((await engine.generate(tokens(320), { maxTokens: 3 }).result()).tokens, []);
    assertEquals((await engine.generate(tokens(310), { maxTokens: 3 }).result()).tokens.length, 3);
  }
});

test("more generations than sequences take turns", { timeout }, async () => {
  await using engine = await load(dir, { maxSequences: 2 });
  const all = await Promise.all(
    Array.from({ length: 7 }, (_, i) => engine.generate(tokens(40 + i), { maxTokens: 4 }).result()),
  );
  for (const [i, { tokens: drawn }] of all.entries()) {
    await using alone = await load(dir);
    assertEquals(drawn, (await alone.generate(tokens(40 + i), { maxTokens: 4 }).result()).tokens);
  }
  using one = await engine.prefill(tokens(40));
  using two = await engine.prefill(tokens(41));
  await assertRejects(() => engine.generate(tokens(42)).text(), FreeKVError, "all 2 sequences are alive");
  assertEquals([one.length, two.length], [40, 41]);
});

test("what cannot be a row is refused before anything runs, and hurts nobody else", { timeout }, async () => {
  await using engine = await load(dir);
  assertThrows(
    () => engine.generate(tokens(40), { topK: 1e12, temperature: 1 }),
    FreeKVError,
    "topK must be at most",
  );
  for (const prompt of [undefined, null, { messages: [] }, [1n], [1.5], [Number.NaN]])
    await assertRejects(() => engine.prefill(prompt as never), FreeKVError);
  assertThrows(() => engine.generate(tokens(40), { topK: -1 }), FreeKVError);
  assertEquals((await engine.generate(tokens(40), { maxTokens: 2 }).result()).tokens.length, 2);
});

test("a sequence disposed while it is appended to leaves the next owner of its lane alone", {
  timeout,
}, async () => {
  for (const policy of ["full", "streaming", "freekv"] as const) {
    await using engine = await load(dir, { maxSequences: 2, policy: "freekv" });
    using base = await engine.prefill(ids.slice(0, 300));
    using alone = base.fork({ policy });
    const expected = await score(alone, ids.slice(300, 320));
    alone[Symbol.dispose]();
    const doomed = await engine.prefill(ids.slice(0, 100));
    let forked: Promise<void> | undefined;
    const onProgress = (): void => {
      doomed[Symbol.dispose]();
      forked ??= refused("BUSY", /alive/, () => base.fork({ policy })); // its lane is given back when the append has ended
    };
    await assertRejects(() => doomed.append(tokens(1500), { onProgress }), FreeKVError, "disposed");
    await forked;
    assert(forked !== undefined);
    using next = base.fork({ policy });
    assertEquals(await score(next, ids.slice(300, 320)), expected);
  }
});
