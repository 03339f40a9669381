// Selection and slots over many decode steps, against the plain model: every table, miss list, counter and byte of every step.

import { test } from "node:test";
import { assertEquals, assertGreater, assertNotEquals } from "@std/assert";
import { Random } from "./retrieval/random.ts";
import { Walk, type WalkOptions } from "./retrieval/walk.ts";

const plan = { sinkPages: 1, windowPages: 2, k: 4, slots: 8 };
const freekv = { correction: "threshold", speculation: "next", prefetch: 0, start: 161 } as const;

test("slots follow the plain model over 320 steps of mixed policies and empty rows", {
  timeout: 60_000,
}, () => {
  using walk = new Walk({
    seed: 1,
    absent: (step, lane) => step % 7 === lane || (step % 11 === 10 && lane < 3),
    lanes: [
      plan,
      { ...plan, slots: 4 },
      { ...plan, k: 3, slots: 9, sinkPages: 0, windowPages: 1 },
      { ...plan, slots: 0, resident: true },
      { ...plan, k: 0, slots: 0, resident: true, attendAll: true },
      { ...plan, k: 0, slots: 0 },
    ],
    rows: [
      { ...freekv, prefetch: 2 },
      { ...freekv, correction: "off", start: 40 },
      { ...freekv, speculation: "lazy", start: 95 },
      { ...freekv, correction: "exact", speculation: "none", start: 100 },
      { ...freekv, correction: "off", speculation: "none", start: 3 },
      { ...freekv, correction: "off", speculation: "none", start: 0 },
    ],
  });
  walk.first();
  for (let i = 0; i < 320; i++) walk.step();
  for (const [name, total] of Object.entries(walk.totals)) assertGreater(total, 50, name);
});

const layouts = [
  { deviceLayout: "nhd", hostLayout: "hnd" },
  { deviceLayout: "hnd", hostLayout: "hnd" },
  { deviceLayout: "nhd", hostLayout: "nhd" },
  { deviceLayout: "hnd", hostLayout: "nhd" },
] as const;
for (const layout of layouts) {
  const name = `gather brings host pages byte for byte, host ${layout.hostLayout} to device ${layout.deviceLayout}`;
  test(name, { timeout: 60_000 }, () => {
    using walk = new Walk({
      seed: 2,
      kvHeads: 3,
      pageSize: 32,
      lanes: [plan],
      rows: [{ ...freekv, start: 700 }],
      ...layout,
    });
    walk.first();
    for (let i = 0; i < 70; i++) walk.step();
    assertGreater(walk.totals.missesNow, 20);
    assertGreater(walk.totals.missesNext, 20);
    assertGreater(walk.totals.moved, 0);
  });
}

/** The pages attended in 120 steps, and how many were recalled before attention. */
function attended(options: Partial<WalkOptions>, shuffle?: number): { pages: number[][]; misses: number } {
  const rows = options.rows ?? [freekv];
  using walk = new Walk({ seed: 3, lanes: [plan], ...options, rows });
  if (shuffle !== undefined) walk.scatterSlots(new Random(shuffle));
  walk.first();
  for (let i = 0; i < 120; i++) walk.step();
  return { pages: walk.attended, misses: walk.totals.missesNow };
}

test("the selection never depends on slots, on where pages lie in them, or on prefetch", {
  timeout: 60_000,
}, () => {
  const base = attended({ lanes: [{ ...plan, slots: 4 }] });
  assertGreater(new Set(base.pages.map(String)).size, 100);
  const others = [
    attended({ lanes: [{ ...plan, slots: 8 }] }),
    attended({ lanes: [{ ...plan, slots: 12 }] }),
    attended({ lanes: [{ ...plan, slots: 8 }] }, 1),
    attended({ lanes: [{ ...plan, slots: 12 }] }, 2),
    attended({ lanes: [{ ...plan, slots: 12 }], rows: [{ ...freekv, prefetch: 6 }] }),
    attended({ lanes: [{ ...plan, slots: 8 }], threads: 1 }),
  ];
  for (const other of others) assertEquals(other.pages, base.pages);
  assertGreater(
    new Set(others.map(({ misses }) => misses)).size,
    3,
    "residency must differ where selections do not",
  );
});

test("exact correction, retrieve and lazy speculation with exact correction attend the same pages", () => {
  const exact = attended({ rows: [{ ...freekv, correction: "exact" }] });
  const retrieve = attended({ rows: [{ ...freekv, correction: "exact", speculation: "none" }] });
  const lazy = attended({ rows: [{ ...freekv, correction: "exact", speculation: "lazy" }] });
  assertEquals(exact.pages, retrieve.pages);
  assertEquals(lazy.pages, retrieve.pages);
  assertNotEquals(exact.pages, attended({}).pages);
});

test("speculation made lazily attends what speculation beside the step attends", () => {
  assertEquals(attended({ rows: [{ ...freekv, speculation: "lazy" }] }).pages, attended({}).pages);
});

test("a budget over all candidates selects every one of them and scores none", { timeout: 60_000 }, () => {
  using walk = new Walk({
    seed: 4,
    lanes: [{ ...plan, k: 16, slots: 16 }],
    rows: [{ ...freekv, prefetch: 3 }],
  });
  walk.first();
  for (let i = 0; i < 100; i++) walk.step();
  const { rig } = walk;
  const scores = rig.bytes(rig.now.scores, 4 * rig.kvHeads * rig.maxPages);
  assertEquals(new Set(scores), new Set([0xff]), "scores were written");
  assertEquals(walk.totals.prefetched, 0);
  const last = Math.floor((161 + 100) / 16) - 2 - 1;
  assertEquals(
    walk.attended.at(-1),
    Array.from({ length: last }, (_, i) => 1 + i),
  );
});
