// The stages of a retrieval one by one: control, check, estimate, select, scatter; and what each call refuses.

import { test } from "node:test";
import { assert, assertEquals, assertGreater, assertInstanceOf, assertLess, assertThrows } from "@std/assert";
import { fromFloat32, toFloat32 } from "../lib/float.ts";
import { FreeKVError, pack } from "../lib/device.ts";
import { type Digest, meanCosine, pageScores, ranking } from "./reference/retrieval.ts";
import { Random } from "./retrieval/random.ts";
import { Rig, type RigOptions, type RigRow } from "./retrieval/rig.ts";

const exact = { lane: 0, correction: "exact", speculation: "none", prefetch: 0 } as const;
const plan = { sinkPages: 1, windowPages: 1, k: 1, slots: 1 };

/** Digests of a lane's candidates, written to its blocks: [page][head]. `low` and `high` come as the device reads them. */
function writeDigests(rig: Rig, pages: number, make: (page: number, head: number) => Digest): Digest[][] {
  const { dtype, headDim, kvHeads } = rig;
  return Array.from({ length: pages }, (_, i) =>
    Array.from({ length: kvHeads }, (_, head) => {
      const { low, high } = make(i, head);
      const bytes = fromFloat32(Float32Array.of(...Array.from(low), ...Array.from(high)), dtype);
      const block = rig.blockOf(0, (rig.lanes[0]?.sinkPages ?? 0) + i);
      rig.stream.copy(rig.digests.address + (block * kvHeads + head) * bytes.byteLength, bytes);
      const stored = toFloat32(bytes, dtype);
      return { low: stored.subarray(0, headDim), high: stored.subarray(headDim) };
    }),
  );
}

function randomDigest(random: Random, d: number): Digest {
  const pairs = Array.from({ length: d }, () => [random.normal(), random.normal()] as const);
  return { low: pairs.map(([a, b]) => Math.min(a, b)), high: pairs.map(([a, b]) => Math.max(a, b)) };
}

/** Row 0 at the position whose step has `candidates` of them, served with qkv by the exact correction. */
function scored(rig: Rig, candidates: number, q: Float32Array): void {
  const { sinkPages, windowPages } = rig.lanes[0] ?? plan;
  rig.mapBlocks();
  rig.load([{ ...exact, position: (sinkPages + windowPages + candidates) * rig.pageSize + 1 }]);
  const qkv = new Float32Array(rig.qkvWidth);
  qkv.set(q);
  rig.stream.copy(rig.qkv, qkv);
  rig.check(0, 1);
  rig.estimate("now", 0, 1);
}

const shapes: (RigOptions & { candidates: number })[] = [
  { lanes: [plan], group: 1, headDim: 8, candidates: 2 },
  { lanes: [plan], group: 4, headDim: 64, candidates: 37, dtype: "bf16" },
  { lanes: [plan], group: 5, headDim: 96, candidates: 300, dtype: "f16" },
  { lanes: [plan], group: 7, headDim: 128, candidates: 600, pooling: "raw" },
  { lanes: [plan], group: 8, headDim: 256, candidates: 257, dtype: "bf16", scoreScale: 0.01 },
  { lanes: [{ ...plan, sinkPages: 0 }], group: 4, headDim: 128, candidates: 1025, dtype: "bf16", pooling: "raw" },
  { lanes: [plan], group: 4, headDim: 24, candidates: 256 },
];
for (const { candidates, ...options } of shapes) {
  const { group, headDim, dtype = "f32", pooling = "softmax" } = options;
  const name = `page scores match float64: G ${group}, d ${headDim}, ${dtype}, ${pooling}, ${candidates} pages`;
  test(name, { timeout: 30_000 }, () => {
    using rig = new Rig({ ...options, layers: 1, maxPages: candidates + 8 });
    const random = new Random(candidates);
    const digests = writeDigests(rig, candidates, () => randomDigest(random, rig.headDim));
    const q = random.normals(rig.kvHeads * rig.group * rig.headDim);
    scored(rig, candidates, q);
    const all = rig.floats(rig.now.scores, rig.kvHeads * rig.maxPages);
    const scale = options.scoreScale ?? 1 / Math.sqrt(rig.headDim);
    for (let head = 0; head < rig.kvHeads; head++) {
      const queries = Array.from({ length: rig.group }, (_, h) => {
        return q.subarray((head * rig.group + h) * rig.headDim, (head * rig.group + h + 1) * rig.headDim);
      });
      const expected = pageScores(queries, digests.map((page) => page[head] as Digest), scale, pooling);
      for (const [page, score] of expected.entries()) {
        const error = Math.abs((all[head * rig.maxPages + page] as number) - score);
        assertLess(error, 2e-5 * Math.abs(score) + 1e-9, `head ${head} page ${page}: ${score}`);
      }
      assertGreater(new Set(expected).size, candidates / 2, "the scores say something");
      assert(Number.isNaN(all[head * rig.maxPages + candidates]), "nothing beyond the candidates is written");
    }
  });
}

test("the pages' scores have the same bits on one thread and on many", { timeout: 30_000 }, () => {
  const bits = [1, 2, 5].map((threads) => {
    using rig = new Rig({ lanes: [plan], layers: 1, maxPages: 1500, headDim: 64, threads });
    const random = new Random(5);
    writeDigests(rig, 1400, () => randomDigest(random, 64));
    scored(rig, 1400, random.normals(rig.kvHeads * rig.group * rig.headDim));
    return rig.bytes(rig.now.scores, 4 * rig.kvHeads * rig.maxPages);
  });
  assertEquals(bits[1], bits[0]);
  assertEquals(bits[2], bits[0]);
});

/** What a head selects of given scores; k and prefetch as the lane and row say. */
function selected(scores: number[], k: number): number[] {
  using rig = new Rig({ lanes: [{ ...plan, k, slots: k }], layers: 1, kvHeads: 1, maxPages: scores.length + 8 });
  rig.mapBlocks();
  rig.load([{ ...exact, position: (scores.length + 2) * rig.pageSize + 3 }]);
  rig.check(0, 1);
  rig.stream.copy(rig.now.scores, Float32Array.from(scores));
  rig.select("now", 0, 1);
  const { nSelected, selectedPage } = rig.state(0);
  return [...selectedPage.subarray(0, nSelected[0])].map((page) => page - plan.sinkPages);
}

test("ties go to the lower page, NaN ranks last, infinities where they belong", () => {
  assertEquals(selected([1, 3, 3, 2, 3, 3], 3), [1, 2, 4]);
  assertEquals(selected([0, -0, 0, -0, 1], 3), [0, 1, 4]);
  assertEquals(selected([NaN, -1, NaN, -Infinity, NaN], 3), [0, 1, 3]);
  assertEquals(selected([NaN, NaN, NaN, NaN], 2), [0, 1]);
  assertEquals(selected([1, Infinity, -Infinity, NaN, 1e38, -1e38], 2), [1, 4]);
  assertEquals(selected([NaN, NaN, 1, 2, NaN, 3], 2), [3, 5]);
});

test("the selection is the head of the ranking for any scores", { timeout: 30_000 }, () => {
  const random = new Random(6);
  for (const [n, k] of [
    [2, 1],
    [40, 39],
    [700, 16],
    [3000, 100],
  ] as const) {
    const makers = [
      () => random.normal(),
      () => random.below(5), // ties everywhere
      (i: number) => i, // ever better
      (i: number) => -i,
      (i: number) => (i % 7 === 0 ? NaN : random.below(3)),
    ];
    for (const make of makers) {
      const scores = Array.from({ length: n }, (_, i) => Math.fround(make(i)));
      const best = ranking(scores).slice(0, k);
      assertEquals(
        selected(scores, k),
        best.sort((a, b) => a - b),
      );
    }
  }
});

test("one bad page ranks last and costs the others nothing", () => {
  using rig = new Rig({ lanes: [{ ...plan, k: 4, slots: 4 }], layers: 1, kvHeads: 1, group: 2, maxPages: 20 });
  const random = new Random(7);
  const broken = (page: number): Digest => {
    const digest = randomDigest(random, rig.headDim);
    if (page !== 3) return digest;
    return { low: Array.from(digest.low, () => NaN), high: Array.from(digest.high, () => NaN) };
  };
  const digests = writeDigests(rig, 10, broken).map((page) => page[0] as Digest);
  const q = random.normals(rig.group * rig.headDim);
  scored(rig, 10, q);
  const scores = rig.floats(rig.now.scores, 10);
  const queries = [q.subarray(0, rig.headDim), q.subarray(rig.headDim)];
  const expected = pageScores(queries, digests, 1 / Math.sqrt(rig.headDim), "softmax");
  assert(Number.isNaN(scores[3]));
  for (const page of [0, 1, 2, 4, 5, 6, 7, 8, 9]) {
    assertLess(Math.abs((scores[page] as number) - (expected[page] as number)), 1e-6);
  }
  rig.select("now", 0, 1);
  const best = ranking(expected).slice(0, 4);
  const pages = best.map((page) => page + plan.sinkPages).sort((a, b) => a - b);
  assertEquals([...rig.state(0).selectedPage], pages);
});

test("check flags a head unless the mean cosine reaches τ of its layer", () => {
  for (const [group, headDim] of [
    [1, 64],
    [4, 128],
    [5, 96],
    [7, 8],
    [8, 256],
  ] as const) {
    const tau = [0.3, 0.9];
    const checked = { correction: "threshold", speculation: "next", prefetch: 0, position: 500 } as const;
    using rig = new Rig({ lanes: [{ ...plan, tau }], maxRows: 1, kvHeads: 16, group, headDim });
    const random = new Random(headDim);
    const width = group * headDim;
    rig.load([{ ...checked, lane: 0 }]);
    let flagged = 0;
    for (let layer = 0; layer < 2; layer++) {
      const before = random.normals(16 * width);
      const q = before.map((x, i) => x + Math.floor(i / width) * 0.15 * random.normal());
      rig.stream.copy((rig.tables[0] as { qPrev: number }).qPrev + 4 * layer * before.length, before);
      const qkv = new Float32Array(rig.qkvWidth);
      qkv.set(q);
      rig.stream.copy(rig.qkv, qkv);
      rig.check(layer, 1);
      const flags = rig.bytes(rig.flags.address + layer * 16, 16);
      for (let head = 0; head < 16; head++) {
        const at = head * width;
        const mean = meanCosine(q.subarray(at, at + width), before.subarray(at, at + width), headDim);
        assertGreater(Math.abs(mean - (tau[layer] as number)), 1e-6, "the case is no close call");
        assertEquals(flags[head], mean >= (tau[layer] as number) ? 0 : 1, `layer ${layer} head ${head}: ${mean}`);
        flagged += flags[head] as number;
      }
    }
    assertGreater(flagged, 2);
    assertLess(flagged, 30);
    const { heads, flagged: counted } = rig.counters(0);
    assertEquals({ heads, counted }, { heads: 32, counted: flagged });
  }
});

test("NaN and zero vectors are flagged; off, empty rows and lanes that select nothing are not", () => {
  const lanes = [plan, plan, { ...plan, k: 0, slots: 0 }, { ...plan, slots: 0, resident: true, attendAll: true }];
  using rig = new Rig({ lanes, layers: 1, maxRows: 6, kvHeads: 1, group: 2 });
  const row = { correction: "threshold", speculation: "next", prefetch: 0, position: 9 } as const;
  const rows: (RigRow | undefined)[] = [
    { ...row, lane: 0 },
    { ...row, lane: 1 },
    { ...row, lane: 2, correction: "exact" },
    { ...row, lane: 3, correction: "exact" },
    undefined,
    { ...row, lane: 0, correction: "off" },
  ];
  const before = new Float32Array(2 * rig.headDim).fill(1);
  for (const tables of rig.tables) rig.stream.copy(tables.qPrev, before);
  const run = (q: (row: number, i: number) => number): number[] => {
    rig.load(rows);
    rig.stream.copy(
      rig.qkv,
      Float32Array.from({ length: 6 * rig.qkvWidth }, (_, i) => q(Math.floor(i / rig.qkvWidth), i % rig.qkvWidth)),
    );
    rig.stream.memset(rig.flags, 7);
    rig.check(0, 6);
    return [...rig.bytes(rig.flags.address, 6)];
  };
  assertEquals(
    run(() => 1),
    [0, 0, 0, 0, 0, 0],
  );
  assertEquals(
    run((row, i) => (row === 0 && i === 3 ? NaN : row === 1 && i < rig.headDim ? 0 : 1)),
    [1, 1, 0, 0, 0, 0],
  );
  assertEquals([0, 1, 2, 3, 4].map((i) => rig.counters(i).flagged), [1, 1, 0, 0, 0]);
  assertEquals(
    run(() => Infinity),
    [1, 1, 0, 0, 0, 0],
  );
});

test("control takes rows from the ring's entry of the step and resolves tokens, positions and blocks", () => {
  using rig = new Rig({ lanes: [plan, plan, plan], maxRows: 4 });
  rig.stream.write(rig.sampled, Int32Array.of(70, 71, 72));
  const row = { ...exact, position: 40 };
  for (let step = 0; step < 7; step++) {
    rig.load([{ ...row, token: -1, lane: 2, position: 31 + step, block: 90 + step }, undefined, { ...row, token: 5, lane: 0 }]);
    const page = Math.floor((31 + step) / rig.pageSize);
    assertEquals([...rig.ints(rig.tokens.address, 3)], [72, -1, 5]);
    assertEquals([...rig.ints(rig.positions.address, 3)], [31 + step, -1, 40]);
    const table = rig.ints(rig.blockTable.address, 3 * rig.maxPages);
    assertEquals(table[2 * rig.maxPages + page], 90 + step);
    assertEquals(table[2], -1, "block −1 leaves the table alone");
  }
});

test("a counter starts each step at zero", () => {
  using rig = new Rig({ lanes: [plan], layers: 1 });
  for (let i = 0; i < 2; i++) {
    rig.load([{ ...exact, speculation: "next", position: 100 }]);
    rig.check(0, 1);
    assertEquals(rig.counters(0).heads, rig.kvHeads);
  }
});

for (const deviceLayout of ["nhd", "hnd"] as const) {
  test(`scatter puts staged head pages into slots, device ${deviceLayout}`, () => {
    const lanes = [{ ...plan, slots: 6 }, { ...plan, slots: 3 }];
    using rig = new Rig({ lanes, kvHeads: 3, dtype: "bf16", deviceLayout });
    const entries = [
      { lane: 0, head: 2, slot: 5 },
      { lane: 1, head: 0, slot: 1 },
      { lane: 0, head: 0, slot: 0 },
      { lane: 0, head: 1, slot: 5 },
    ];
    const staged = new Random(8).bytes(entries.length * rig.headPageBytes);
    const staging = rig.device.alloc(staged.byteLength);
    rig.stream.copy(staging, staged);
    const list = rig.device.alloc(16 * entries.length);
    rig.stream.write(list, Int32Array.from(entries.flatMap(({ lane, head, slot }) => [lane, head, slot, 0])));
    const { device, cache, stream } = rig;
    device.lib.fkv_recall_scatter(cache, staging.address, list.address, entries.length, 1, stream.handle);
    for (const [i, { lane, head, slot }] of entries.entries()) {
      const expected = staged.slice(i * rig.headPageBytes, (i + 1) * rig.headPageBytes);
      assertEquals(rig.frames(lane, 1)(1 + 1 + 1 + slot, head), expected);
    }
    const untouched = rig.frames(1, 1)(1 + 1 + 1 + 2, 0);
    assertEquals(new Set(untouched), new Set([0xff]));
  });
}

test("a retrieval that cannot be is refused at the call, and what only the device knows fails the device", () => {
  using rig = new Rig({ lanes: [plan] });
  const { device, cache, now, stream, qkv } = rig;
  const refused = (call: () => void, text: string): void => {
    const error = assertThrows(call, FreeKVError, text);
    assertEquals(error.code, "BAD_ARGUMENT");
  };
  const { lib } = device;
  refused(() => lib.fkv_estimate(cache, now.packed, qkv.address, 0, 3, 1, stream.handle), "stage 3");
  refused(() => lib.fkv_select(cache, now.packed, 2, 0, 1, stream.handle), "layer 2");
  refused(() => lib.fkv_select(cache, now.packed, 0, 0, 2, stream.handle), "2 rows");
  refused(() => lib.fkv_estimate(cache, now.packed, null, 0, 0, 1, stream.handle), "qkv is null");
  refused(() => lib.fkv_control_load(cache, rig.ring.address, rig.step.address, 0, 1, stream.handle), "ring_entries");
  const empty = pack.fkv_workspace({ scores: null, n_misses: now.nMisses, misses: now.misses });
  refused(() => lib.fkv_recall_gather(cache, empty, 0, 1, stream.handle), "scores");

  // Page 2 is selected, and its block was never set.
  rig.load([{ ...exact, position: 5 * rig.pageSize }]);
  rig.check(0, 1);
  rig.estimate("now", 0, 1);
  const failed = assertThrows(() => {
    rig.select("now", 0, 1);
    rig.gather("now", 0, 1);
    rig.stream.synchronize();
  });
  assertInstanceOf(failed, FreeKVError);
  assertEquals(failed.code, "DEVICE_FAILED");
});
