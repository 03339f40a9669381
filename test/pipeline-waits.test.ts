// Every wait between streams is needed: without it some order of the streams gives other numbers, or a refusal.

import { test } from "node:test";
import { AssertionError, assert, assertEquals, equal } from "@std/assert";
import type { Engine } from "../lib/engine.ts";
import { FreeKVError } from "../lib/errors.ts";
import type { EngineOptions, Progress } from "../lib/types.ts";
import { type WaitName, waitNames } from "../lib/waits.ts";
import { checkpoint, k, load, loadWithout, score, type Trace, timeout, tokens } from "./pipeline.ts";
import { twinOnly } from "./target.ts";

const dir = checkpoint();
const ids = tokens(600);
const prompt = tokens(1100); // three chunks
const seeds = 50;

/** Engine options under which each wait matters, and what shows it (decode, unless told otherwise). */
const cases: Record<WaitName, { options: EngineOptions; work?: (engine: Engine) => Promise<Trace[]> }[]> = {
  "attend-after-speculation": [{ options: { recall: "staged" } }, { options: { recall: "fragmented" } }],
  "first-after-selection": [{ options: { recall: "staged" } }, { options: { recall: "fragmented" } }],
  "attend-after-correction": [{ options: { recall: "staged" } }, { options: { recall: "fragmented" } }],
  "speculate-after-attend": [
    { options: { orchestration: "captured" } },
    { options: { orchestration: "host" } },
    { options: { recall: "staged" } },
  ],
  "step-after-branch": [{ options: { orchestration: "captured" } }, { options: { orchestration: "host" } }],
  "fill-after-drain": [1, 2].map((stagingBuffers) => ({
    options: { recall: "staged", stagingBuffers } as const,
  })),
  "convert-after-fill": [{ options: { recall: "staged" } }],
  "store-after-append": [{ options: {} }, { options: { prefillKv: "host" } }],
  "load-after-store": [
    { options: { prefillKv: "host" }, work: prefillTwice },
    { options: {}, work: interrupt },
  ],
  "fill-after-store": [{ options: {} }],
};

/** Decodes under two policies. */
async function decode(engine: Engine): Promise<Trace[]> {
  const traces: Trace[] = [];
  for (const policy of ["freekv", "streaming"] as const) {
    using sequence = await engine.prefill(ids.slice(0, 450), { policy, tau: 0 });
    traces.push(await score(sequence, ids.slice(450, 470)));
  }
  return traces;
}

/** A prompt of two chunks, and a second prompt behind it. */
async function prefillTwice(engine: Engine): Promise<Trace[]> {
  using sequence = await engine.prefill(ids.slice(0, 530), { policy: "full" });
  const first = await score(sequence, ids.slice(530, 535));
  await sequence.append(ids.slice(535, 580));
  return [first, await score(sequence, ids.slice(580))];
}

/** Another sequence uses the workspace between two chunks of a prompt. */
async function interrupt(engine: Engine): Promise<Trace[]> {
  using other = await engine.prefill(ids.slice(100, 200), { policy: "full" });
  let interruptions = 0;
  const onProgress = ({ done, total }: Progress): void => {
    if (done < total) other.truncate(99 - interruptions++);
  };
  using sequence = await engine.prefill(prompt, { policy: "full", onProgress });
  assertEquals(interruptions, 2);
  return [await score(sequence, ids.slice(0, 20)), await score(other, ids.slice(0, 20))];
}

/** The traces, or what went wrong: a refusal, or a number that is none. */
async function outcome(
  engine: Engine,
  work: (engine: Engine) => Promise<Trace[]>,
): Promise<Trace[] | string> {
  try {
    return await work(engine);
  } catch (error) {
    if (error instanceof FreeKVError) return error.code;
    if (error instanceof AssertionError) return error.message;
    throw error;
  } finally {
    await engine[Symbol.asyncDispose]();
  }
}

test("every wait has a case", () => {
  assertEquals(Object.keys(cases).sort(), [...waitNames].sort());
});

for (const name of waitNames) {
  for (const { options, work = decode } of cases[name]) {
    test(`${name} is needed with ${JSON.stringify(options)}`, { timeout, skip: twinOnly }, async () => {
      const all = { slots: k, ...options };
      const expected = await outcome(await load(dir, all), work);
      assert(typeof expected === "object", `with all waits: ${expected}`);
      let shown = false;
      for (let scheduleSeed = 1; scheduleSeed <= seeds && !shown; scheduleSeed++) {
        const twin = { scheduleSeed };
        assertEquals(await outcome(await load(dir, { ...all, twin }), work), expected);
        shown = !equal(await outcome(await loadWithout(dir, name, { ...all, twin }), work), expected);
      }
      assert(shown, `nothing shows that ${name} is needed, under ${seeds} seeds`);
    });
  }
}
