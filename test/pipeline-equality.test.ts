// How an engine is built changes when and where things happen, never a bit of what comes out.

import { test } from "node:test";
import { assertEquals, assertGreater, assertLess } from "@std/assert";
import type { Engine } from "../lib/engine.ts";
import type { EngineOptions, PolicyOptions } from "../lib/types.ts";
import {
  checkpoint,
  distance,
  generate,
  k,
  load,
  score,
  scoreFrom,
  type Trace,
  timeout,
  tokens,
} from "./pipeline.ts";

const dir = checkpoint();
const ids = tokens(500 + 45); // the decoded part completes pages and pushes others out of the window
const prompt = 500;

/** tau 0 flags some heads and not others. */
const policies: Record<string, PolicyOptions> = {
  full: { policy: "full" },
  streaming: { policy: "streaming" },
  quest: { policy: "quest" },
  retrieve: { policy: "retrieve" },
  threshold: { policy: "freekv", tau: 0 },
  uncorrected: { policy: "freekv", correction: "off" },
  exact: { policy: "freekv", correction: "exact" },
  prefetching: { policy: "freekv", tau: 0, prefetch: 4 },
};

type Traces = Record<string, { scored: Trace; generated: Trace }>;

/** Under each policy: teacher-forced, then greedy from there. */
async function traces(engine: Engine, names = Object.keys(policies)): Promise<Traces> {
  const found: Traces = {};
  using parent = await engine.prefill(ids.slice(0, prompt));
  for (const name of names) {
    using sequence = parent.fork(policies[name]);
    const scored = await score(sequence, ids.slice(prompt));
    found[name] = { scored, generated: await generate(sequence, { maxTokens: 20, temperature: 1, seed: 7 }) };
  }
  return found;
}

async function tracesOf(options: EngineOptions, folder = dir): Promise<Traces> {
  await using engine = await load(folder, options);
  return await traces(engine);
}

let expected: Traces | undefined;
const baseline = async (): Promise<Traces> => (expected ??= await tracesOf({ orchestration: "captured" }));

test("the policies really differ: no two give the same numbers but those that must", {
  timeout,
}, async () => {
  const found = await baseline();
  const same = [
    ["retrieve", "quest", "exact"],
    ["threshold", "prefetching"],
  ];
  for (const [a, one] of Object.entries(found)) {
    for (const [b, other] of Object.entries(found)) {
      if (a === b) continue;
      if (same.some((names) => names.includes(a) && names.includes(b)))
        assertEquals(one, other, `${a}, ${b}`);
      else assertGreater(distance(one.scored, other.scored), 0.1, `${a} and ${b}`);
    }
  }
  const chosen = new Set(found.full?.generated.argmax);
  assertGreater(chosen.size, 5, "a generation that repeats itself shows little");
});

const engines: Record<string, EngineOptions> = {
  "host orchestration": { orchestration: "host" },
  "staged recall": { recall: "staged" },
  "fragmented recall": { recall: "fragmented" },
  "NHD pages, captured": { layout: "nhd" },
  "NHD pages, host": { layout: "nhd", orchestration: "host" },
  "NHD pages, staged": { layout: "nhd", recall: "staged" },
  "NHD pages, fragmented": { layout: "nhd", recall: "fragmented" },
  "a dense chain in pieces": { chain: "split" },
  "a prefill that streams from the host": { prefillKv: "host" },
  "as many slots as selected pages": { slots: k },
  "as many slots as selected pages, staged": { slots: k, recall: "staged" },
  "three times as many slots": { slots: 3 * k },
  "four times as many slots, host": { slots: 4 * k, orchestration: "host" },
  "a slow link": { twin: { linkBytesPerSecond: 2e9 } },
  "one compute thread": { twin: { threads: 1 } },
  ...Object.fromEntries(
    [1, 3, 4].map(
      (n) => [`${n} staging buffers`, { recall: "staged", stagingBuffers: n, slots: k }] as const,
    ),
  ),
};

for (const [name, options] of Object.entries(engines)) {
  test(`${name}: the same bits under every policy`, { timeout }, async () => {
    assertEquals(await tracesOf(options), await baseline());
  });
}

for (const kvDtype of ["bf16", "f16"] as const) {
  test(`${kvDtype} pages: captured, host, staged and fragmented agree, and are near f32`, {
    timeout,
  }, async () => {
    const found = await tracesOf({ kvDtype });
    for (const options of [
      { orchestration: "host" },
      { recall: "staged", layout: "nhd" },
      { recall: "fragmented" },
    ] as const)
      assertEquals(await tracesOf({ kvDtype, ...options }), found);
    const { full } = await baseline();
    const gap = distance((found.full as Traces[string]).scored, (full as Traces[string]).scored);
    assertGreater(gap, 0);
    assertLess(gap, kvDtype === "bf16" ? 0.5 : 0.05);
  });
}

for (const dtype of ["bf16", "f16"] as const) {
  test(`${dtype} weights, of widths that a GPU chains: captured, host, staged and a launch a phase agree`, {
    timeout,
  }, async () => {
    const folder = checkpoint({ dtype, hidden: 64, intermediate: 128 });
    const found = await tracesOf({ orchestration: "captured" }, folder);
    for (const options of [
      { orchestration: "host" },
      { recall: "staged", layout: "nhd" },
      { chain: "split" },
    ] as const)
      assertEquals(await tracesOf(options, folder), found, JSON.stringify(options));
    assertGreater(new Set(found.full?.generated.argmax).size, 5);
  });
}

for (const options of [{ digest: "arkvale" }, { estimate: "paper-speed" }] as const) {
  test(`${JSON.stringify(options)} selects other pages, the same ones in both orchestrations`, {
    timeout,
  }, async () => {
    const found = await tracesOf({ ...options, orchestration: "captured" });
    assertEquals(await tracesOf({ ...options, recall: "staged" }), found);
    const before = await baseline();
    assertEquals(found.full, before.full);
    assertEquals(found.streaming, before.streaming);
    assertGreater(
      distance((found.retrieve as Traces[string]).scored, (before.retrieve as Traces[string]).scored),
      0.01,
    );
  });
}

for (const shape of [
  { arch: "llama", heads: 4, kvHeads: 1, headDim: 32, layers: 2, dtype: "bf16" },
  { arch: "qwen2", heads: 5, kvHeads: 5, headDim: 16, layers: 1 },
  { arch: "qwen3", heads: 6, kvHeads: 2, headDim: 24, layers: 4, tied: false },
] as const) {
  test(`${shape.arch}, ${shape.heads} heads on ${shape.kvHeads}: orchestrations and paths agree`, {
    timeout,
  }, async () => {
    const other = checkpoint(shape);
    for (const policy of ["retrieve", "freekv"] as const) {
      const runs: Trace[] = [];
      for (const options of [
        {},
        { orchestration: "host" },
        { recall: "staged" },
        { recall: "fragmented", layout: "nhd" },
      ] as const) {
        await using engine = await load(other, { ...options, tau: 0 });
        runs.push(await scoreFrom(engine, ids, prompt, { policy }));
      }
      for (const run of runs) assertEquals(run, runs[0]);
    }
  });
}

for (const pageSize of [32, 64] as const) {
  test(`pages of ${pageSize}: orchestrations and paths agree`, { timeout }, async () => {
    const sizes = { pageSize, sink: 0, window: pageSize, budget: 3 * pageSize, tau: 0 };
    const runs: Trace[] = [];
    for (const options of [
      {},
      { orchestration: "host" },
      { recall: "staged" },
      { recall: "fragmented" },
    ] as const) {
      await using engine = await load(dir, { ...options, ...sizes });
      runs.push(await scoreFrom(engine, ids, 400));
    }
    for (const run of runs) assertEquals(run, runs[0]);
  });
}
