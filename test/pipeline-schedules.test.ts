// The order in which streams happen to run changes no token: 50 orders, drawn from a seed, of a batch in which every policy
// takes part.

import { test } from "node:test";
import { assertEquals, assertGreater, assertNotEquals } from "@std/assert";
import type { EngineOptions, PolicyOptions } from "../lib/types.ts";
import { checkpoint, generate, k, load, score, timeout, tokens, type Trace } from "./pipeline.ts";

const dir = checkpoint();
const ids = tokens(440);
const seeds = 50;

const policies: PolicyOptions[] = [
  { policy: "full" },
  { policy: "streaming" },
  { policy: "quest" },
  { policy: "retrieve" },
  { policy: "freekv", tau: 0 },
  { policy: "freekv", correction: "off", prefetch: 3 },
  { policy: "freekv", correction: "exact" },
];

/** Forks of one prompt, all of them decoding at once, each about another place: some score, some generate. */
async function batch(options: EngineOptions): Promise<Trace[]> {
  await using engine = await load(dir, { slots: k + 2, ...options });
  using parent = await engine.prefill(ids.slice(0, 396)); // the fourth token completes a page
  return await Promise.all(
    policies.map(async (policy, i) => {
      using sequence = parent.fork(policy);
      const scored = await score(sequence, ids.slice(396, 398 + (i % 3)));
      const generated = await generate(sequence, { maxTokens: 12 - i, temperature: 1, seed: 5 });
      return { logprobs: [...scored.logprobs, ...generated.logprobs], argmax: [...scored.argmax, ...generated.argmax] };
    }),
  );
}

for (const options of [
  { orchestration: "captured" },
  { orchestration: "host" },
  { recall: "staged" },
  { recall: "fragmented" },
] as const) {
  const name = Object.values(options)[0];
  test(`${name}: ${seeds} schedules of a batch of every policy give the same tokens`, { timeout }, async () => {
    const expected = await batch(options);
    assertEquals(new Set(expected.map((trace) => JSON.stringify(trace))).size, policies.length);
    for (let scheduleSeed = 1; scheduleSeed <= seeds; scheduleSeed++)
      assertEquals(await batch({ ...options, twin: { scheduleSeed } }), expected, `seed ${scheduleSeed}`);
  });
}
