// What each policy attends to, seen from outside: in the numbers and in the counts.

import { test } from "node:test";
import {
  assert,
  assertEquals,
  assertGreater,
  assertLess,
  assertNotEquals,
  assertStrictEquals,
} from "@std/assert";
import type { EngineOptions, PolicyOptions } from "../lib/types.ts";
import { checkpoint, distance, k, load, score, scoreFrom, timeout, tokens } from "./pipeline.ts";

const dir = checkpoint();
const ids = tokens(540);
const orchestrations = ["captured", "host"] as const;

for (const orchestration of orchestrations) {
  test(`${orchestration}: a budget of at least the context equals full, also while pages leave the window`, {
    timeout,
  }, async () => {
    await using engine = await load(dir, { orchestration });
    const budget = 37 * 16; // one page more than 540 tokens have
    const full = await scoreFrom(engine, ids, 440, { policy: "full" });
    for (const policy of ["retrieve", "quest", "streaming", "freekv"] as const) {
      for (const o of [{}, { correction: "off" }, { correction: "exact" }, { speculate: false }] as const) {
        if (policy !== "freekv" && Object.keys(o).length) continue;
        assertEquals(await scoreFrom(engine, ids, 440, { policy, budget, tau: 0, ...o }), full, policy);
      }
    }
    // Sink and window reach over all of a short context, which then has no candidates at all.
    const short = await scoreFrom(engine, ids.slice(0, 70), 20, { policy: "full" });
    for (const policy of ["retrieve", "freekv", "streaming", "quest"] as const)
      assertEquals(await scoreFrom(engine, ids.slice(0, 70), 20, { policy }), short);
  });

  test(`${orchestration}: a selection that grows from nothing while the sequence does`, {
    timeout,
  }, async () => {
    await using engine = await load(dir, { orchestration });
    const retrieve = await scoreFrom(engine, ids.slice(0, 300), 5, { policy: "retrieve" });
    assertEquals(await scoreFrom(engine, ids.slice(0, 300), 5, { policy: "quest" }), retrieve);
    assertEquals(await scoreFrom(engine, ids.slice(0, 300), 5, { correction: "exact" }), retrieve);
    assertEquals(await scoreFrom(engine, ids.slice(0, 300), 5, { tau: 1, prefetch: 2 }), retrieve);
    assertGreater(
      distance(await scoreFrom(engine, ids.slice(0, 300), 5, { correction: "off" }), retrieve),
      0.1,
    );
  });
}

test("neither speculation, prefetch nor slots change what is attended", { timeout }, async () => {
  const wanted = new Map<string, unknown>();
  for (const options of [
    {},
    { slots: k },
    { slots: 4 * k },
    { orchestration: "host" },
    { recall: "staged" },
    { recall: "fragmented", slots: k },
  ] as EngineOptions[]) {
    await using engine = await load(dir, options);
    for (const correction of ["threshold", "off", "exact"] as const) {
      for (const o of [{}, { speculate: false }, { prefetch: 2 }, { prefetch: 8 }] as PolicyOptions[]) {
        const found = await scoreFrom(engine, ids, 497, { correction, tau: [0.2, 0, -0.1], ...o });
        if (!wanted.has(correction)) wanted.set(correction, found);
        assertEquals(
          found,
          wanted.get(correction),
          `${JSON.stringify(options)} ${correction} ${JSON.stringify(o)}`,
        );
      }
    }
  }
  assertNotEquals(wanted.get("threshold"), wanted.get("off"));
  assertNotEquals(wanted.get("threshold"), wanted.get("exact"));
});

test("tau decides: 1 flags every head and equals exact, -1 flags none and equals off", {
  timeout,
}, async () => {
  await using engine = await load(dir);
  const stats = async (policy: PolicyOptions) => {
    using sequence = await engine.prefill(ids.slice(0, 500), policy);
    const trace = await score(sequence, ids.slice(500));
    return { trace, share: sequence.stats().correctedShare as number };
  };
  const exact = await stats({ correction: "exact" });
  const off = await stats({ correction: "off" });
  const all = await stats({ tau: 1 });
  const none = await stats({ tau: -1 });
  assertEquals(none.trace, off.trace);
  assertEquals([exact.share, off.share, none.share], [1, null, 0]);
  assertEquals(all.trace, exact.trace);
  assertGreater(all.share, 0.95);
  let before = 0;
  for (const tau of [-0.5, 0, 0.5]) {
    const { share } = await stats({ tau });
    assertGreater(share, before);
    before = share;
  }
  assertLess(before, 1);
});

test("the counts tell what moved: more slots recall less", { timeout }, async () => {
  const recalled: number[] = [];
  for (const slots of [k, 2 * k, 4 * k]) {
    await using engine = await load(dir, { slots });
    using sequence = await engine.prefill(ids.slice(0, 440), { policy: "retrieve" });
    await score(sequence, ids.slice(440));
    const { recalledPages, recalledBytes, hitRate } = sequence.stats();
    assertEquals(recalledBytes, recalledPages * 2 * 16 * 16 * 4);
    assert(hitRate !== null && hitRate > 0 && hitRate < 1);
    recalled.push(recalledPages);
  }
  const [least, some, most] = recalled.toReversed() as [number, number, number];
  assertGreater(least, 0);
  assertLess(least, some);
  assertLess(some, most);
});

test("prefetch recalls pages that turn into hits", { timeout }, async () => {
  await using engine = await load(dir, { slots: 4 * k });
  const rates: number[] = [];
  for (const prefetch of [0, 8]) {
    using sequence = await engine.prefill(ids.slice(0, 440), { correction: "off", prefetch });
    await score(sequence, ids.slice(440));
    rates.push(sequence.stats().hitRate as number);
  }
  assertGreater(rates[1] as number, rates[0] as number);
});

test("what a policy does not have is null in its stats", { timeout }, async () => {
  await using engine = await load(dir);
  const nulls: Record<string, string[]> = {};
  const bytes: Record<string, number> = {};
  for (const policy of ["full", "quest", "streaming", "retrieve", "freekv"] as const) {
    using sequence = await engine.prefill(ids.slice(0, 500), { policy });
    await score(sequence, ids.slice(500));
    const stats = sequence.stats();
    nulls[policy] = ["hitRate", "correctedShare", "stallMs"].filter(
      (key) => stats[key as "hitRate"] === null,
    );
    bytes[policy] = stats.deviceKvBytes;
    assertStrictEquals(stats.tpotMs, null); // nothing was generated
    const recalls = policy === "retrieve" || policy === "freekv";
    assertEquals(stats.recalledPages > 0, recalls, policy);
    assertEquals(stats.recalledBytes > 0, recalls, policy);
    assertEquals(stats.totalKvBytes, Math.ceil(540 / 16) * 3 * 2 * 2 * 16 * 16 * 4);
  }
  assertEquals(nulls, {
    full: ["hitRate", "correctedShare", "stallMs"],
    quest: ["hitRate", "correctedShare", "stallMs"],
    streaming: ["hitRate", "correctedShare", "stallMs"],
    retrieve: ["correctedShare"],
    freekv: [],
  });
  assertEquals(bytes.retrieve, bytes.freekv);
  assertLess(bytes.streaming as number, bytes.retrieve as number);
  assertLess(bytes.retrieve as number, bytes.full as number);
  assertLess(bytes.full as number, bytes.quest as number);
});
