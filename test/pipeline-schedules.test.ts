// The order in which streams happen to run changes no token: 50 orders, drawn from a seed, of a batch in which every policy
// takes part.

import { test } from "node:test";
import { assertEquals } from "@std/assert";
import type { EngineOptions, PolicyOptions } from "../lib/types.ts";
import { checkpoint, generate, k, load, score, scoreFrom, type Trace, timeout, tokens } from "./pipeline.ts";
import { seeds } from "./target.ts";

const dir = checkpoint();
const ids = tokens(440);

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
      return {
        logprobs: [...scored.logprobs, ...generated.logprobs],
        argmax: [...scored.argmax, ...generated.argmax],
      };
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
  test(`${name}: 50 schedules of a batch of every policy give the same tokens`, {
    timeout,
  }, async () => {
    const expected = await batch(options);
    assertEquals(new Set(expected.map((trace) => JSON.stringify(trace))).size, policies.length);
    for (const scheduleSeed of seeds(50))
      assertEquals(await batch({ ...options, twin: { scheduleSeed } }), expected, `seed ${scheduleSeed}`);
  });
}

for (const options of [{ orchestration: "captured" }, { recall: "staged", prefillKv: "host" }] as const) {
  const name = Object.values(options).join(", ");
  test(`${name}: prompts, forks and cuts beside decoding, under 20 schedules`, { timeout }, async () => {
    const prompt = tokens(1060, 9); // three chunks
    const disturbed = async (twin: EngineOptions["twin"]): Promise<Trace[]> => {
      await using engine = await load(dir, { ...options, tau: 0, twin });
      using parent = await engine.prefill(ids.slice(0, 380), { policy: "full" });
      using cut = parent.fork({ policy: "retrieve" });
      using busy = parent.fork({ policy: "freekv" });
      let chunks = 0;
      const onProgress = ({ done, total }: { done: number; total: number }): void => {
        if (done < total) cut.truncate(300 - 17 * chunks++);
      };
      const [long, decoded, generated] = await Promise.all([
        engine.prefill(prompt, { onProgress, policy: "quest" }),
        score(busy, ids.slice(380, 430)),
        generate(parent, { maxTokens: 30, temperature: 1, seed: 3 }),
      ]);
      using sequence = long;
      assertEquals([chunks, cut.length], [2, 283]);
      const after = await Promise.all([score(sequence, ids.slice(0, 12)), score(cut, ids.slice(0, 30))]);
      return [decoded, generated, ...after];
    };
    await using engine = await load(dir, { tau: 0 });
    const expected = await disturbed(undefined);
    assertEquals(expected[0], await scoreFrom(engine, ids.slice(0, 430), 380));
    assertEquals(
      expected[2],
      await scoreFrom(engine, [...prompt, ...ids.slice(0, 12)], 1060, { policy: "quest" }),
    );
    const cut = [...ids.slice(0, 283), ...ids.slice(0, 30)];
    assertEquals(expected[3], await scoreFrom(engine, cut, 283, { policy: "retrieve" }));
    for (const scheduleSeed of seeds(20))
      assertEquals(await disturbed({ scheduleSeed }), expected, `seed ${scheduleSeed}`);
  });
}
