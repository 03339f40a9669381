// The fused retrieval against the separate operations, and under capture.

import { test } from "node:test";
import { assert, assertEquals, assertGreater, assertThrows } from "@std/assert";
import { FreeKVError, pack } from "../lib/device.ts";
import type { RigRow } from "./retrieval/rows.ts";
import { Steps } from "./retrieval/steps.ts";

const plan = { sinkPages: 1, windowPages: 2, k: 4, slots: 8, tau: [0.1, 0.3] };
const lanes = [
  plan,
  { ...plan, slots: 4 },
  { ...plan, slots: 12, windowPages: 1 },
  { ...plan, slots: 0, resident: true },
  { ...plan, k: 0, slots: 0, resident: true, attendAll: true },
];
const shape = { lanes, maxRows: 6, maxPages: 32, dtype: "bf16", group: 2, headDim: 32, seed: 9 } as const;

function rowsAt(step: number): (RigRow | undefined)[] {
  const row = { correction: "threshold", speculation: "next", prefetch: 0 } as const;
  const rows: (RigRow | undefined)[] = [
    { ...row, lane: 0, position: 200 + step, prefetch: step % 3 },
    undefined,
    { ...row, lane: 1, position: 61 + step, correction: "exact" },
    { ...row, lane: 2, position: 130 + step, speculation: "lazy" },
    { ...row, lane: 3, position: 90 + step, correction: "exact", speculation: "none" },
    { ...row, lane: 4, position: 15 + step, correction: "off", speculation: "none" },
  ];
  return rows.map(
    (each) => each && { ...each, block: each.lane + lanes.length * Math.floor(each.position / 16) },
  );
}

function assertSame(a: Record<string, Uint8Array>, b: Record<string, Uint8Array>, what: string): void {
  assertEquals(Object.keys(a), Object.keys(b));
  for (const [name, bytes] of Object.entries(a)) {
    assert(Buffer.compare(bytes, b[name] as Uint8Array) === 0, `${what}: ${name} differs`);
  }
}

test("the fused retrieval leaves the bits of the separate operations, over 200 steps", {
  timeout: 60_000,
}, () => {
  using fused = new Steps({ ...shape, fused: true });
  using separate = new Steps({ ...shape, fused: false });
  const seen = new Set<string>();
  for (const steps of [fused, separate]) steps.first(rowsAt(0));
  assertSame(fused.snapshot(6), separate.snapshot(6), "first");
  for (let step = 0; step < 200; step++) {
    for (const steps of [fused, separate]) steps.step(rowsAt(step));
    const snapshot = fused.snapshot(6);
    assertSame(snapshot, separate.snapshot(6), `step ${step}`);
    seen.add(String(snapshot["selectedPage 0"]));
    const { flagged, heads } = fused.rig.counters(0);
    assertEquals(heads, 4);
    seen.add(`${flagged} flagged`);
  }
  assertGreater(seen.size, 150, "selections and flags change");
  const nanoseconds = (steps: Steps): number =>
    Number(new BigUint64Array(steps.rig.read(steps.stall.address, 8))[0]);
  assertGreater(nanoseconds(fused), 1000);
  assertEquals(nanoseconds(separate), 0);
});

// What a kernel does in other ways than usual: long lists, many slots, pages beyond what a block keeps or lists at once.
const wide = [
  { what: "2600 pages, prefetch", pages: 2600, k: 20, slots: 40, group: 4, prefetch: 9 },
  {
    what: "600 pages, raw scores pooled",
    pages: 600,
    k: 10,
    slots: 20,
    group: 6,
    prefetch: 0,
    pooling: "raw",
  },
  { what: "150 of 400 pages", pages: 400, k: 150, slots: 200, group: 1, prefetch: 3 },
  { what: "300 slots", pages: 400, k: 30, slots: 300, group: 5, prefetch: 40 },
  { what: "all of 150 pages", pages: 150, k: 148, slots: 148, group: 3, prefetch: 2 },
  {
    what: "pages that never leave the device",
    pages: 300,
    k: 12,
    slots: 0,
    group: 8,
    resident: true,
    prefetch: 1,
  },
] as const;
for (const { what, pages, prefetch, group, ...more } of wide) {
  test(`the fused retrieval leaves the bits of the separate operations: ${what}`, { timeout: 60_000 }, () => {
    const lane = { sinkPages: 1, windowPages: 1, k: more.k, slots: more.slots, tau: [0.02, 0.05] };
    const resident = "resident" in more;
    const pooling = "pooling" in more ? more.pooling : ("softmax" as const);
    const options = { ...shape, lanes: [{ ...lane, resident }], maxRows: 1, maxPages: pages, group, pooling };
    using fused = new Steps({ ...options, fused: true });
    using separate = new Steps({ ...options, fused: false });
    const rowAt = (step: number): RigRow => {
      const position = 16 * (pages - 1) + 12 + step;
      const block = Math.floor(position / 16);
      return { lane: 0, position, block, correction: "threshold", speculation: "next", prefetch };
    };
    for (const steps of [fused, separate]) steps.first([rowAt(0)]);
    const selections = new Set<string>();
    for (let step = 0; step < 4; step++) {
      for (const steps of [fused, separate]) steps.step([rowAt(step)]);
      const snapshot = fused.snapshot(1);
      assertSame(snapshot, separate.snapshot(1), `step ${step}`);
      selections.add(String(snapshot["selectedPage 0"]));
    }
    assertGreater(fused.rig.counters(0).selected, 0);
    assertGreater(selections.size, what.startsWith("all") ? 0 : 2, "selections change");
  });
}

test("one captured step serves every length", { timeout: 60_000 }, () => {
  using replayed = new Steps({ ...shape, fused: true });
  using issued = new Steps({ ...shape, fused: true });
  const { rig } = replayed;
  const rows = rowsAt(0);
  using graph = rig.stream.capture(() => {
    rig.loadRing(rows.length);
    for (let layer = 0; layer < rig.layers; layer++) replayed.layer(layer, rows.length, rows);
  });
  for (let step = 0; step < 120; step++) {
    for (const steps of [replayed, issued]) steps.feed(rows.length);
    for (const [i, row] of rowsAt(step).entries())
      rig.writeRow((step % rig.ringEntries) * rig.maxRows + i, row);
    rig.stream.write(rig.step, Uint32Array.of(step));
    rig.stream.launch(graph);
    issued.rig.load(rowsAt(step));
    for (let layer = 0; layer < rig.layers; layer++) issued.layer(layer, rows.length, rows);
    if (step % 10 === 9) assertSame(replayed.snapshot(6), issued.snapshot(6), `step ${step}`);
    rig.stream.synchronize();
  }
  const reached = new Int32Array(replayed.snapshot(6)["selectedPage 0"]?.buffer as ArrayBuffer);
  assertGreater(
    Math.max(...reached),
    Math.floor(200 / 16) - 2,
    "pages were selected that the capture did not know",
  );
});

test("a retrieval that serves no head counts no stall", () => {
  using steps = new Steps({ ...shape, fused: true });
  const row = { correction: "off", speculation: "next", prefetch: 0, lane: 0, position: 205 } as const;
  steps.step([row]);
  assertEquals(steps.rig.counters(0).missesNow, 0);
  assertGreater(steps.rig.counters(0).selected, 0);
  assertEquals([...steps.rig.bytes(steps.stall.address, 8)], Array(8).fill(0));
});

test("prepare and finish go with their stages only", () => {
  using steps = new Steps({ ...shape, fused: true });
  const { cache, device, now, qkv, stream } = steps.rig;
  const params = {
    layer: 0,
    stage: 0,
    n_rows: 1,
    prepare: 0,
    finish: 0,
    digest_kind: 0,
    workspace: { scores: now.scores, raw: now.raw, n_misses: now.nMisses, misses: now.misses },
    qkv,
    stall: null,
    rope: null,
  };
  const refused = (change: Partial<typeof params>, code: string, text: string): void => {
    const call = (): void =>
      device.lib.fkv_retrieve(cache, pack.fkv_retrieve_params({ ...params, ...change }), stream.handle);
    assertEquals(assertThrows(call, FreeKVError, text).code, code);
  };
  refused({ prepare: 1, stage: 1 }, "BAD_ARGUMENT", "prepare goes with stage NOW");
  refused({ finish: 1 }, "BAD_ARGUMENT", "finish goes with stage NEXT");
  refused({ finish: 1, stage: 1, digest_kind: 2 }, "BAD_ARGUMENT", "digest_kind 2");
  refused({ prepare: 1 }, "BAD_ARGUMENT", "rope must be the retrieval's");
});
