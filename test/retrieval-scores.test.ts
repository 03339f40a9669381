// Page scores, and the order that a selection takes from them.

import { test } from "node:test";
import { assert, assertEquals, assertGreater, assertLess } from "@std/assert";
import { fromFloat32, toFloat32 } from "../lib/float.ts";
import { type Digest, pageScores, ranking } from "./reference/retrieval.ts";
import { Random } from "./retrieval/random.ts";
import { Rig, type RigOptions } from "./retrieval/rig.ts";

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
  {
    lanes: [{ ...plan, sinkPages: 0 }],
    group: 4,
    headDim: 128,
    candidates: 1025,
    dtype: "bf16",
    pooling: "raw",
  },
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
      const expected = pageScores(
        queries,
        digests.map((page) => page[head] as Digest),
        scale,
        pooling,
      );
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
  using rig = new Rig({
    lanes: [{ ...plan, k, slots: k }],
    layers: 1,
    kvHeads: 1,
    maxPages: scores.length + 8,
  });
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
  using rig = new Rig({
    lanes: [{ ...plan, k: 4, slots: 4 }],
    layers: 1,
    kvHeads: 1,
    group: 2,
    maxPages: 20,
  });
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
