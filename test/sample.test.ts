/// <reference lib="esnext.disposable" preserve="true" />
// Sampling on the twin: what is chosen, with which probability, and what a step tells the host.

import { test } from "node:test";
import {
  assert,
  assertAlmostEquals,
  assertEquals,
  assertGreater,
  assertLess,
  assertThrows,
} from "@std/assert";
import { FKV_MAX_TOP, FreeKVError } from "../lib/device.ts";
import { SampleRig } from "./dense/sample-rig.ts";
import { drawProbabilities, logSoftmax, ranked } from "./reference/dense.ts";
import { Random } from "./retrieval/random.ts";

const inf = Number.POSITIVE_INFINITY;

test("greedy takes the largest logit, ties to the lower id, never NaN", { timeout: 30_000 }, () => {
  const cases: [number[], number][] = [
    [[0, 3, 1, 3], 1],
    [[Number.NaN, -2, Number.NaN, -1], 3],
    [[Number.NaN, Number.NaN, Number.NaN, Number.NaN], 0],
    [[-inf, -inf, -5, -inf], 2],
    [[-inf, -inf, -inf, -inf], 0],
    [[1, inf, Number.NaN, inf], 1],
    [[-0, 0, -0, 0], 0],
    [[-1e38, -3e38, 1e-44, 0], 2],
  ];
  using rig = new SampleRig({ vocab: 4, maxRows: 8 });
  const results = rig.sample(cases.map(([logits], i) => ({ logits, sequence: i, nTop: 4 })));
  for (const [i, [logits, token]] of cases.entries()) {
    const result = results[i];
    assert(result !== undefined);
    assertEquals([result.token, result.argmax], [token, token], `case ${i}`);
    assertEquals(result.top_id.slice(0, 4), ranked(logits), `case ${i}`);
    const expected = logSoftmax(logits);
    for (const [rank, id] of ranked(logits).entries()) {
      const got = result.top_logprob[rank] as number;
      const wanted = expected[id] as number;
      if (Number.isFinite(wanted)) assertAlmostEquals(got, wanted, 1e-6 * Math.max(1, Math.abs(wanted)));
      else assertEquals(got, wanted, `case ${i}, rank ${rank}`);
    }
    const none = logits.every((logit) => !(logit > -inf));
    assertEquals(result.logprob, none ? Number.NaN : result.top_logprob[0], `case ${i}`);
    assertEquals(rig.sampled(i), token);
  }
});

test("log-probabilities and the most probable tokens match float64", { timeout: 30_000 }, () => {
  for (const vocab of [1, 5, 16, 17, 2048, 40_003]) {
    using rig = new SampleRig({ vocab, maxRows: 3 });
    const random = new Random(vocab);
    const rows = [1, 12, 1e-3].map((scale, i) => {
      const logits = random.normals(vocab).map((value) => Math.fround(value * scale));
      return { logits: Array.from(logits), sequence: i, nTop: FKV_MAX_TOP, target: random.below(vocab) };
    });
    const results = rig.sample(rows);
    for (const [i, row] of rows.entries()) {
      const result = results[i];
      assert(result !== undefined);
      const expected = logSoftmax(row.logits);
      assertAlmostEquals(result.logprob, expected[row.target] as number, 2e-5);
      const n = Math.min(vocab, FKV_MAX_TOP);
      assertEquals(result.n_top, n);
      assertEquals(result.top_id.slice(0, n), ranked(row.logits).slice(0, n));
      for (const [rank, id] of result.top_id.slice(0, n).entries()) {
        assertAlmostEquals(result.top_logprob[rank] as number, expected[id] as number, 2e-5);
      }
      assert(
        result.top_id.slice(n).every((id) => id === 0),
        "what is not reported is zero",
      );
    }
  }
});

const draws = [
  { name: "temperature alone", temperature: 1, topK: 0, topP: 1 },
  { name: "high temperature", temperature: 3, topK: 0, topP: 1 },
  { name: "top-k", temperature: 1, topK: 5, topP: 1 },
  { name: "top-p", temperature: 1, topK: 0, topP: 0.6 },
  { name: "temperature, top-k and top-p", temperature: 2, topK: 12, topP: 0.8 },
  { name: "one float below all of it", temperature: 1, topK: 0, topP: 0.99999994 },
];
for (const { name, temperature, topK, topP } of draws) {
  test(`draws follow the distribution: ${name}`, { timeout: 60_000 }, () => {
    const [vocab, perStep, steps] = [20, 50, 200];
    using rig = new SampleRig({ vocab, maxRows: perStep });
    const logits = Array.from(new Random(9).normals(vocab), (value) => Math.fround(value * 1.5));
    logits[3] = Number.NaN;
    logits[4] = -inf;
    const counts = new Array<number>(vocab).fill(0);
    for (let step = 0; step < steps; step++) {
      const rows = Array.from({ length: perStep }, (_, i) => ({
        logits,
        sequence: i,
        seed: step * perStep + i,
        position: 41,
        temperature,
        topK,
        topP,
      }));
      for (const result of rig.sample(rows)) {
        assert(result !== undefined);
        counts[result.token]! += 1;
        assertAlmostEquals(result.logprob, logSoftmax(logits)[result.token] as number, 1e-5);
      }
    }
    const clean = logits.map((value) => (Number.isNaN(value) ? -inf : value));
    const expected = drawProbabilities(clean, { temperature, topK, topP });
    let chiSquare = 0;
    let freedom = -1;
    for (const [id, probability] of expected.entries()) {
      const mean = probability * perStep * steps;
      if (probability === 0) {
        assertEquals(counts[id], 0, `token ${id} is outside the set`);
      } else {
        chiSquare += ((counts[id] as number) - mean) ** 2 / mean;
        freedom += 1;
      }
    }
    assertGreater(freedom, 2);
    // Mean f, variance 2f: five deviations above. The seeds are fixed, so this passes always or never.
    assertLess(chiSquare, freedom + 5 * Math.sqrt(2 * freedom), `χ² of ${freedom} degrees`);
  });
}

test("a draw depends on seed and position, not on the row or the step", { timeout: 30_000 }, () => {
  using rig = new SampleRig({ vocab: 500, maxRows: 6, ring: 3 });
  const logits = Array.from(new Random(2).normals(500));
  const row = (sequence: number, seed: number, position: number) => {
    return { logits, sequence, seed, position, temperature: 1, topP: 0.95 };
  };
  const token = (...rows: ReturnType<typeof row>[]) => rig.sample(rows).map((result) => result?.token);
  const [first] = token(row(0, 77, 5));
  assertEquals(token(row(4, 1, 5), row(2, 77, 5), row(1, 77, 5)).slice(1), [first, first]);
  const bySeed = token(...[0, 1, 2, 3, 4, 5].map((i) => row(i, i, 5)));
  const byPosition = token(...[0, 1, 2, 3, 4, 5].map((i) => row(i, 77, i)));
  assertGreater(new Set(bySeed).size, 3);
  assertGreater(new Set(byPosition).size, 3);
  assertEquals(byPosition[5], first);
  const big = token(row(0, 2 ** 52 + 1, 2 ** 31 - 1));
  assertEquals(token(row(3, 2 ** 52 + 1, 2 ** 31 - 1)), big, "the last position has a next one");
});

test("top-k 1, a tiny top-p and a tiny temperature are greedy", { timeout: 30_000 }, () => {
  using rig = new SampleRig({ vocab: 300, maxRows: 5 });
  const random = new Random(8);
  for (let round = 0; round < 20; round++) {
    const logits = Array.from(random.normals(300));
    const best = ranked(logits)[0];
    const base = { logits, seed: round, position: round, temperature: 1 };
    const results = rig.sample([
      { ...base, sequence: 0, topK: 1 },
      { ...base, sequence: 1, topP: 1e-9 },
      { ...base, sequence: 2, temperature: 1e-30 },
      { ...base, sequence: 3, topP: 0 },
      { ...base, sequence: 4, temperature: 0 },
    ]);
    assertEquals(
      results.map((result) => result?.token),
      [best, best, best, best, best],
    );
  }
  const tied = rig.sample([
    { logits: new Array(300).fill(1), sequence: 0, temperature: 1, topK: 1, seed: 3 },
  ]);
  assertEquals(tied[0]?.token, 0, "top-k keeps the lower of equal ids");
});

test("a draw among infinite logits takes one of them", { timeout: 30_000 }, () => {
  using rig = new SampleRig({ vocab: 8, maxRows: 1 });
  const logits = [0, inf, 1, inf, Number.NaN, -inf, 2, 3];
  const seen = new Set<number | undefined>();
  for (let seed = 0; seed < 40; seed++) {
    const [result] = rig.sample([{ logits, sequence: 0, temperature: 0.7, seed }]);
    seen.add(result?.token);
    assertAlmostEquals(result?.logprob ?? 0, -Math.log(2), 1e-6);
  }
  assertEquals(seen, new Set([1, 3]));
});

test("a step writes its ring entry, the lane's logits and token, and counts itself", {
  timeout: 30_000,
}, () => {
  using rig = new SampleRig({ vocab: 10, maxRows: 3, ring: 2 });
  const random = new Random(6);
  const logits = [0, 1, 2].map(() => Array.from(random.normals(10)));
  rig.setStall(123_456_789_012);
  rig.setCounters(2, {
    heads: 4,
    flagged: 1,
    selected: 12,
    hits: 9,
    misses_now: 2,
    misses_next: 5,
    moved: 1,
    prefetched: 7,
  });
  rig.fillResults(0xee);
  const results = rig.sample([
    { logits: logits[0] as number[], sequence: 1 },
    { logits: logits[1] as number[], sequence: -1 },
    { logits: logits[2] as number[], sequence: 0, target: 4 },
  ]);
  assertEquals(rig.step(), 1);
  assertEquals(results[2]?.stall_ns, 123_456_789_012);
  assertEquals(results[2]?.counters.prefetched, 7);
  assertEquals(results[2]?.counters.misses_now, 2);
  assertAlmostEquals(results[2]?.logprob ?? 0, logSoftmax(logits[2] as number[])[4] as number, 1e-6);
  assert(
    rig.resultBytes(0, 1).every((byte) => byte === 0xee),
    "an empty row writes no result",
  );
  assert(
    rig.resultBytes(1, 0).every((byte) => byte === 0xee),
    "the other entry is another step's",
  );
  assertEquals(rig.laneLogits(1), Float32Array.from(logits[0] as number[]));
  assertEquals(rig.laneLogits(0), Float32Array.from(logits[2] as number[]));
  assert(rig.laneLogits(2).every(Number.isNaN), "the lane of no row keeps its logits");
  assertEquals(rig.sampled(2), -1);

  const [again] = rig.sample([{ sequence: 0, temperature: 1, seed: 4 }]);
  assertEquals(rig.step(), 2);
  assertEquals(again?.argmax, results[2]?.argmax, "without logits, the lane's are sampled");
  const [entry0] = rig.sample([{ sequence: 1 }]);
  assertEquals(rig.step(), 3);
  assertEquals(entry0?.token, results[0]?.token);
  assert(
    rig.resultBytes(1, 0).some((byte) => byte !== 0xee),
    "step 1 wrote entry 1 and step 2 entry 0 again",
  );
});

test("one captured sample serves other rows, steps and temperatures", { timeout: 30_000 }, () => {
  using rig = new SampleRig({ vocab: 64, maxRows: 3, ring: 4 });
  const logits = Array.from(new Random(3).normals(64));
  const graph = rig.capture(1);
  for (const row of [
    { logits, sequence: 2 },
    { logits, sequence: 0, temperature: 2, seed: 9, position: 3 },
  ]) {
    const [plain] = rig.sample([row]);
    const [replayed] = rig.sample([row], graph);
    assertEquals(replayed, plain);
  }
  assertEquals(rig.step(), 4);
});

test("sampling refuses what it cannot run", { timeout: 30_000 }, () => {
  using rig = new SampleRig({ vocab: 4, maxRows: 2 });
  const refused: [Parameters<SampleRig["call"]>[0], string][] = [
    [{ params: { vocab: 0 } }, "vocab 0"],
    [{ params: { ring_entries: 0 } }, "ring_entries 0"],
    [{ rows: 3 }, "3 rows"],
    [{ params: { results: null } }, "results"],
    [{ params: { step: null } }, "step"],
    [{ params: { scratch: null } }, "scratch"],
    [{ cache: { sampled: null } }, "sampled"],
    [{ structBytes: 4 }, "struct_bytes"],
  ];
  for (const [changes, text] of refused) assertThrows(() => rig.call(changes), FreeKVError, text);
});
