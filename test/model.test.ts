// The whole model, through the engine, against what others computed: transformers' values (test/fixtures/golden) and the
// float64 reference, on the prefill path and on the decode path.

import { test } from "node:test";
import { assertEquals, assertGreater, assertLess } from "@std/assert";
import type { Engine } from "../lib/engine.ts";
import type { Sequence } from "../lib/sequence.ts";
import type { EngineOptions, Token } from "../lib/types.ts";
import { type Golden, goldens } from "./golden.ts";
import { checkpoint, k, load, score, timeout, tokens } from "./pipeline.ts";
import { referenceLogprobs } from "./reference/model.ts";
import { visibleUnder } from "./reference/policies.ts";

const tolerance = 1e-3;
const paths: Record<string, EngineOptions> = {
  captured: { orchestration: "captured" },
  host: { orchestration: "host" },
  staged: { recall: "staged", layout: "nhd" },
};

/** The most probable tokens after a sequence's last one. */
async function top(sequence: Sequence): Promise<NonNullable<Token["top"]>> {
  using draft = sequence.fork();
  for await (const token of draft.generate({ maxTokens: 1, logprobs: 20 }))
    return token.top as NonNullable<Token["top"]>;
  throw new Error("nothing was generated");
}

/** Whether the twenty most probable tokens are those of `row`, in order, each within the tolerance. */
function assertTop(found: NonNullable<Token["top"]>, row: ArrayLike<number>): void {
  assertEquals(found.length, 20);
  const best = Array.from(row).sort((a, b) => b - a);
  for (const [i, { id, logprob }] of found.entries()) {
    assertLess(Math.abs(logprob - (row[id] as number)), tolerance);
    assertLess(Math.abs(logprob - (best[i] as number)), tolerance);
  }
  assertEquals(new Set(found.map(({ id }) => id)).size, 20);
}

const rowOf = (golden: Golden, i: number): Float32Array =>
  golden.logprobs.subarray(i * golden.vocab, (i + 1) * golden.vocab);

async function withEngine(
  golden: Golden,
  options: EngineOptions,
  use: (engine: Engine) => Promise<void>,
): Promise<void> {
  await using engine = await load(golden.dir, { ...options, policy: "full", kvDtype: "f32" });
  await use(engine);
}

for (const golden of goldens()) {
  test(`${golden.name}: after every prefix, prefill gives transformers' log-probabilities`, {
    timeout,
  }, async () => {
    await withEngine(golden, {}, async (engine) => {
      for (let i = 0; i < golden.tokens.length; i++) {
        using sequence = await engine.prefill(golden.tokens.slice(0, i + 1));
        assertTop(await top(sequence), rowOf(golden, i));
      }
    });
  });

  for (const [path, options] of Object.entries(paths)) {
    test(`${golden.name}: so does decoding token by token, ${path}`, { timeout }, async () => {
      await withEngine(golden, options, async (engine) => {
        using sequence = await engine.prefill(golden.tokens.slice(0, 1));
        const choices = new Set<number>();
        for (let i = 1; i < golden.tokens.length; i++) {
          await score(sequence, golden.tokens.slice(i, i + 1));
          const found = await top(sequence);
          assertTop(found, rowOf(golden, i));
          choices.add(found[0]?.id as number);
        }
        assertGreater(choices.size, 5);

        using scored = await engine.prefill(golden.tokens.slice(0, 1));
        const { logprobs, argmax } = await score(scored, golden.tokens.slice(1));
        for (const [i, logprob] of logprobs.entries()) {
          const row = rowOf(golden, i + 1);
          assertLess(Math.abs(logprob - (row[golden.tokens[i + 2] as number] as number)), tolerance);
          assertLess(Math.max(...row) - (row[argmax[i] as number] as number), tolerance);
        }
        assertEquals(logprobs.length, golden.tokens.length - 2);
      });
    });
  }
}

for (const arch of ["llama", "qwen3"] as const) {
  test(`${arch}: full, and retrieve with budget for all, are within 1e-3 of float64 at every position`, {
    timeout,
  }, async () => {
    const dir = checkpoint({ arch, layers: 2 });
    const ids = tokens(420);
    const vocab = 96;
    const reference = referenceLogprobs(dir, ids);
    for (const options of [{ orchestration: "captured" }, { recall: "staged" }] as const) {
      await using engine = await load(dir, { ...options, budget: 448 });
      for (const policy of ["full", "retrieve", "freekv"] as const) {
        for (const at of [1, 300]) {
          using sequence = await engine.prefill(ids.slice(0, at), { policy });
          const { logprobs } = await score(sequence, ids.slice(at));
          const gaps = logprobs.map((x, i) =>
            Math.abs(x - (reference[(at + i) * vocab + (ids[at + i + 1] as number)] as number)),
          );
          assertEquals(gaps.length, ids.length - at - 1);
          assertLess(Math.max(...gaps), tolerance, `${policy} after ${at}`);
        }
      }
    }
  });
}

const selections = {
  streaming: [{ policy: "streaming" }, { windowPages: 6, k: 0, tau: 1 }],
  retrieve: [{ policy: "retrieve" }, { windowPages: 2, k, tau: 2 }],
  threshold: [
    { policy: "freekv", tau: 0.3 },
    { windowPages: 2, k, tau: 0.3 },
  ],
  uncorrected: [
    { policy: "freekv", correction: "off" },
    { windowPages: 2, k, tau: -2 },
  ],
} as const;

for (const [name, [policy, selection]] of Object.entries(selections)) {
  test(`${name} on a small budget is within 1e-3 of a float64 model that attends the same pages`, {
    timeout,
  }, async () => {
    const dir = checkpoint({ layers: 2, seed: 5 });
    const ids = tokens(330);
    const prompt = 270;
    let smallestGap = 1;
    const flags = [0, 0];
    const visible = visibleUnder({
      ...{ ...selection, prompt, pageSize: 16, sinkPages: 2 },
      onGap: (gap) => {
        smallestGap = Math.min(smallestGap, gap);
      },
      onHead: (flagged) => {
        flags[Number(flagged)] = (flags[Number(flagged)] as number) + 1;
      },
    });
    const reference = referenceLogprobs(dir, ids, visible);
    const full = referenceLogprobs(dir, ids);
    // A selection that hangs on a rounding error would prove nothing.
    assertGreater(smallestGap, 1e-5);
    if (name === "threshold") assertGreater(Math.min(...flags), 20);
    let fromFull = 0;
    await using engine = await load(dir, { ...policy });
    using sequence = await engine.prefill(ids.slice(0, prompt));
    for await (const { position, next, logprob } of sequence.score(ids.slice(prompt))) {
      const expected = reference[position * 96 + next] as number;
      assertLess(Math.abs(logprob - expected), tolerance, `at ${position}`);
      fromFull = Math.max(fromFull, Math.abs(expected - (full[position * 96 + next] as number)));
    }
    assertGreater(fromFull, 0.1);
    assertEquals(sequence.length, ids.length);
  });
}
