// Sequences beside, after and out of each other: none of it shows in what any of them says.

import { test } from "node:test";
import { assert, assertEquals, assertGreater, assertNotEquals } from "@std/assert";
import type { Engine } from "../lib/engine.ts";
import type { EngineOptions, PolicyOptions } from "../lib/types.ts";
import { checkpoint, generate, k, load, score, scoreFrom, type Trace, timeout, tokens } from "./pipeline.ts";

const dir = checkpoint();
const ids = tokens(1200);
const other = tokens(1200, 2);

const engines: Record<string, EngineOptions> = {
  captured: { orchestration: "captured" },
  host: { orchestration: "host" },
  staged: { recall: "staged", slots: k + 2 },
  fragmented: { recall: "fragmented" },
};
const policies: PolicyOptions[] = [
  { policy: "freekv", tau: 0 },
  { policy: "full" },
  { policy: "freekv", correction: "off", budget: 96 },
  { policy: "retrieve", budget: 160 },
  { policy: "streaming", budget: 80 },
  { policy: "quest", sink: 0 },
];

for (const [name, options] of Object.entries(engines)) {
  test(`${name}: a ragged batch equals each sequence alone`, { timeout }, async () => {
    const jobs = policies.map((policy, i) => ({
      policy,
      prompt: ids.slice(40 * i, 40 * i + 90 + 83 * i),
      n: 12 + 7 * i,
    }));
    const run = async (engine: Engine, { policy, prompt, n }: (typeof jobs)[0]): Promise<Trace> => {
      using sequence = await engine.prefill(prompt, policy);
      return await generate(sequence, { maxTokens: n, temperature: 1, seed: n });
    };
    await using engine = await load(dir, options);
    const together = await Promise.all(jobs.map((job) => run(engine, job)));
    for (const [i, job] of jobs.entries()) assertEquals(await run(engine, job), together[i], `job ${i}`);
    const again = await Promise.all(jobs.toReversed().map((job) => run(engine, job)));
    assertEquals(again.toReversed(), together);
    assertEquals(
      together.map(({ argmax }) => argmax.length),
      jobs.map(({ n }) => n),
    );
  });

  test(`${name}: a used engine says what a fresh one says, on a slot that had other owners`, {
    timeout,
  }, async () => {
    const policy = { tau: 0.1 };
    await using fresh = await load(dir, { ...options, maxSequences: 1 });
    const expected = await scoreFrom(fresh, ids.slice(0, 460), 420, policy);
    await using used = await load(dir, { ...options, maxSequences: 1 });
    for (const before of policies) {
      await scoreFrom(used, other.slice(0, 600), 560, before);
      assertEquals(await scoreFrom(used, ids.slice(0, 460), 420, policy), expected);
    }
    // The same lane and, of the same policy, the same memory; one ends in the middle, with a step under way.
    using ended = await used.prefill(other.slice(0, 420), policy);
    for await (const { position } of ended.score(other.slice(420, 500))) if (position === 437) break;
    ended[Symbol.dispose]();
    assertEquals(await scoreFrom(used, ids.slice(0, 460), 420, policy), expected);
  });

  test(`${name}: a row that ends leaves the others as they were, and so does its lane's next owner`, {
    timeout,
  }, async () => {
    await using engine = await load(dir, { ...options, maxSequences: 3, tau: 0 });
    const long = async (): Promise<Trace> => await scoreFrom(engine, ids.slice(0, 500), 410);
    const expected = await long();
    const short = async (seed: number): Promise<void> => {
      for (let n = 1; n < 12; n += 3) await scoreFrom(engine, tokens(300 + n, seed), 300);
    };
    const [found] = await Promise.all([long(), short(3), short(4)]);
    assertEquals(found, expected);
  });

  test(`${name}: fork and append equal one prefill of the whole, whatever the pieces`, {
    timeout,
  }, async () => {
    await using engine = await load(dir, { ...options, tau: 0 });
    const expected = await scoreFrom(engine, ids.slice(0, 640), 600);
    for (const cuts of [[1, 599], [16, 17, 580], [511, 512, 513], [300, 599], [560]]) {
      using sequence = await engine.prefill(ids.slice(0, cuts[0]));
      for (const [i, cut] of cuts.entries()) await sequence.append(ids.slice(cut, cuts[i + 1] ?? 600));
      assertEquals(sequence.length, 600);
      assertEquals(await score(sequence, ids.slice(600, 640)), expected, `cut at ${cuts}`);
    }
    for (const cut of [300, 304, 599]) {
      using parent = await engine.prefill(ids.slice(0, cut), { policy: "streaming" });
      using child = parent.fork({ policy: "freekv" });
      using sibling = parent.fork({ policy: "full" });
      await Promise.all([child.append(ids.slice(cut, 600)), score(sibling, other.slice(0, 60))]);
      assertEquals(await score(child, ids.slice(600, 640)), expected, `forked at ${cut}`);
    }
  });

  test(`${name}: forks of a decoded sequence go on as it does`, { timeout }, async () => {
    await using engine = await load(dir, { ...options, tau: 0 });
    using parent = await engine.prefill(ids.slice(0, 430));
    await score(parent, ids.slice(430, 437));
    using early = parent.fork();
    await score(parent, ids.slice(437, 448)); // ends with a complete page
    using late = parent.fork();
    using changed = parent.fork({ policy: "full" });
    const expected = await score(parent, ids.slice(448, 500));
    assertEquals(await score(late, ids.slice(448, 500)), expected);
    assertNotEquals(await score(changed, ids.slice(448, 500)), expected);
    await score(early, ids.slice(437, 448));
    parent[Symbol.dispose]();
    assertEquals(await score(early, ids.slice(448, 500)), expected);
  });

  test(`${name}: truncate equals a prefill of what is kept`, { timeout }, async () => {
    await using engine = await load(dir, { ...options, tau: 0 });
    for (const [prompt, kept] of [
      [450, 449],
      [450, 433],
      [450, 432],
      [450, 200],
      [470, 17],
      [470, 16],
      [448, 1],
    ] as const) {
      using sequence = await engine.prefill(ids.slice(0, prompt));
      using fork = sequence.fork();
      await score(sequence, ids.slice(prompt, prompt + 20));
      sequence.truncate(kept);
      assertEquals(sequence.length, kept);
      const expected = await scoreFrom(engine, [...ids.slice(0, kept), ...other.slice(0, 40)], kept);
      assertEquals(await score(sequence, other.slice(0, 40)), expected, `${prompt} to ${kept}`);
      // Shared pages are still the fork's.
      assertEquals(
        await score(fork, ids.slice(prompt, prompt + 30)),
        await scoreFrom(engine, ids.slice(0, prompt + 30), prompt),
      );
    }
  });
}

test("a lane that holds every page grows as often as it takes", { timeout }, async () => {
  await using engine = await load(dir);
  for (const policy of ["full", "quest"] as const) {
    // A lane has room for a quarter more than its first tokens and 8 pages: here for 144 tokens, later for more.
    using grown = await engine.prefill(ids.slice(0, 5), { policy });
    const { logprobs } = await score(grown, ids.slice(5, 650));
    // The same in pieces of under 6 pages, each on a lane that is made for it.
    let piece = await engine.prefill(ids.slice(0, 5), { policy });
    let compared = 0;
    for (let at = 5; at < 650; at += 92) {
      for await (const { logprob, position } of piece.score(ids.slice(at, Math.min(650, at + 92)))) {
        assertEquals(logprob, logprobs[position - 5], `${policy} at ${position}`);
        compared++;
      }
      const next = piece.fork();
      piece[Symbol.dispose]();
      piece = next;
    }
    piece[Symbol.dispose]();
    assertGreater(compared, 630);
  }
});

test("one captured graph serves two lengths, and a batch of another size its own", { timeout }, async () => {
  await using engine = await load(dir, { orchestration: "captured", tau: 0 });
  await using host = await load(dir, { orchestration: "host", tau: 0 });
  for (const at of [30, 640, 120, 1100])
    assertEquals(
      await scoreFrom(engine, ids.slice(0, at + 40), at),
      await scoreFrom(host, ids.slice(0, at + 40), at),
    );
});

test("a sequence may change between the chunks of another one's prompt", { timeout }, async () => {
  for (const options of [{}, { prefillKv: "host" }, { recall: "staged" }] as EngineOptions[]) {
    await using engine = await load(dir, options);
    const expected = await scoreFrom(engine, ids.slice(0, 1150), 1100);
    const beside = await scoreFrom(engine, [...other.slice(0, 150), ...ids.slice(0, 20)], 150);
    using changed = await engine.prefill(other.slice(0, 200));
    const lengths: number[] = [];
    const onProgress = ({ done, total }: { done: number; total: number }): void => {
      if (done === total) return;
      changed.truncate(changed.length - 25);
      lengths.push(changed.length);
    };
    using sequence = await engine.prefill(ids.slice(0, 1100), { onProgress });
    assertEquals(lengths, [175, 150]);
    assertEquals(await score(sequence, ids.slice(1100, 1150)), expected);
    assertEquals(await score(changed, ids.slice(0, 20)), beside);
  }
});

test("decoding goes on between the chunks of a prompt, and neither disturbs the other", {
  timeout,
}, async () => {
  for (const options of Object.values(engines)) {
    await using engine = await load(dir, { ...options, tau: 0 });
    const alone = await scoreFrom(engine, ids.slice(0, 480), 400);
    const prompt = await scoreFrom(engine, other.slice(0, 1150), 1100);
    using decoding = await engine.prefill(ids.slice(0, 400));
    const [found, also] = await Promise.all([
      score(decoding, ids.slice(400, 480)),
      scoreFrom(engine, other.slice(0, 1150), 1100),
    ]);
    assertEquals(found, alone);
    assertEquals(also, prompt);
  }
});

test("a long prompt that is abandoned leaves pages to others, who are not disturbed", {
  timeout,
}, async () => {
  await using engine = await load(dir, {
    prefillKv: "host",
    maxSequences: 2,
    hostBytes: 100 * 3 * 2 * 2 * 16 * 16 * 4,
  });
  const expected = await scoreFrom(engine, ids.slice(0, 480), 400);
  for (let i = 0; i < 5; i++) {
    const controller = new AbortController();
    const onProgress = (): void => controller.abort(new Error("enough"));
    let reason: unknown;
    await engine
      .prefill(other, { signal: controller.signal, onProgress })
      .catch((error: unknown) => (reason = error));
    assert(reason instanceof Error && reason.message === "enough", String(reason));
    assertEquals(engine.stats().hostPages, 0);
    assertEquals(await scoreFrom(engine, ids.slice(0, 480), 400), expected);
  }
});
