/// <reference lib="esnext.disposable" preserve="true" />
// Many steps leave nothing behind: 10,000 of them on a GPU, as many as take seconds on the twin. Every round makes, decodes,
// changes and ends the same sequences, four in a batch, and has to say the same and to leave the memory where it was.

import { test } from "node:test";
import { assert, assertEquals, assertGreater } from "@std/assert";
import { Engine, loadCore } from "../lib/engine.ts";
import type { Sequence } from "../lib/sequence.ts";
import { checkpoint, generate, small, tokens } from "./pipeline.ts";
import { onTarget, onTwin } from "./target.ts";

const dir = checkpoint();
const ids = tokens(900, 5);
const stepsARound = 60 + 40;
const rounds = (onTwin ? 300 : 10_000) / stepsARound;

/** The four begin at different places of a page, so that in every few steps one of them begins another. */
const starts = [300, 431, 512, 277];

/** The tokens of each, at each stage. */
async function round(engine: Engine): Promise<number[][]> {
  const said: number[][] = [];
  const decode = async (sequences: readonly Sequence[], maxTokens: number): Promise<void> => {
    const traces = await Promise.all(
      sequences.map((each, i) => generate(each, { maxTokens, seed: i, temperature: i % 2 })),
    );
    for (const { argmax } of traces) said.push(argmax);
  };
  const sequences = await Promise.all(
    starts.map((start, i) =>
      engine.prefill(ids.slice(0, start), {
        correction: i === 0 ? "exact" : "threshold",
        tau: 0.9,
        prefetch: i,
      }),
    ),
  );
  await decode(sequences, 60);
  const [first, second, third, fourth] = sequences as [Sequence, Sequence, Sequence, Sequence];
  first.truncate(first.length - 37);
  await second.append(ids.slice(600, 640));
  const fork = third.fork({ correction: "off" });
  third[Symbol.dispose]();
  fourth.truncate(200);
  const { recalledPages, correctedShare } = engine.stats();
  assertGreater(recalledPages, 100);
  assertGreater(correctedShare as number, 0.2);
  await decode([first, second, fork, fourth], 40);
  for (const each of [first, second, fork, fourth]) each[Symbol.dispose]();
  return said;
}

for (const orchestration of ["captured", "host"] as const)
  test(`${orchestration}: ${rounds * stepsARound} steps at batch 4 leave memory and tokens as they were`, {
    timeout: 400_000,
  }, async () => {
    const loaded = await loadCore(
      dir,
      onTarget({ ...small, orchestration, slots: 12, hostBytes: 8 * 2 ** 20 }),
    );
    await using engine = new Engine(loaded);
    const { device, pool } = loaded.core;
    const expected = await round(engine); // whatever is made once is there now
    while (pool.bytes < 7 * 2 ** 20) await new Promise((resolve) => setTimeout(resolve, 1));
    const memory = (): number[] => {
      device.synchronize();
      const { allocatedBytes, pinnedBytes } = device.memory();
      return [allocatedBytes, pinnedBytes, pool.used, engine.stats().sequences];
    };
    const before = memory();
    for (let i = 1; i < rounds; i++) assertEquals(await round(engine), expected, `round ${i}`);
    assertEquals(memory(), before);
    assertEquals(before.slice(2), [0, 0]);
    assert(expected.every((trace) => new Set(trace).size > 3));
  });
