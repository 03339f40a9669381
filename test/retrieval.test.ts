// The stages around a selection one by one: control, check, scatter; and what each call refuses.

import { test } from "node:test";
import { assertEquals, assertGreater, assertInstanceOf, assertLess, assertThrows } from "@std/assert";
import { FreeKVError, pack } from "../lib/device.ts";
import { meanCosine } from "./reference/retrieval.ts";
import { Random } from "./retrieval/random.ts";
import { Rig } from "./retrieval/rig.ts";
import type { RigRow } from "./retrieval/rows.ts";
import { twinOnly } from "./target.ts";

const exact = { lane: 0, correction: "exact", speculation: "none", prefetch: 0 } as const;
const plan = { sinkPages: 1, windowPages: 1, k: 1, slots: 1 };

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
        assertEquals(
          flags[head],
          mean >= (tau[layer] as number) ? 0 : 1,
          `layer ${layer} head ${head}: ${mean}`,
        );
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
  const lanes = [
    plan,
    plan,
    { ...plan, k: 0, slots: 0 },
    { ...plan, slots: 0, resident: true, attendAll: true },
  ];
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
      Float32Array.from({ length: 6 * rig.qkvWidth }, (_, i) =>
        q(Math.floor(i / rig.qkvWidth), i % rig.qkvWidth),
      ),
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
  assertEquals(
    [0, 1, 2, 3, 4].map((i) => rig.counters(i).flagged),
    [1, 1, 0, 0, 0],
  );
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
    rig.load([
      { ...row, token: -1, lane: 2, position: 31 + step, block: 90 + step },
      undefined,
      { ...row, token: 5, lane: 0 },
    ]);
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
    const lanes = [
      { ...plan, slots: 6 },
      { ...plan, slots: 3 },
    ];
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

test("gather waits for the host link, but not for a page that leaves the window", {
  timeout: 30_000,
  skip: twinOnly,
}, () => {
  const lanes = [{ ...plan, k: 3, slots: 3 }];
  const pageMs = 40;
  const linkBytesPerSecond = (2 * 16 * 16 * 4) / (pageMs / 1000);
  using rig = new Rig({ lanes, layers: 1, kvHeads: 1, linkBytesPerSecond });
  rig.mapBlocks();
  const gatherMs = (length: number): number => {
    rig.load([{ ...exact, position: length - 1 }]);
    rig.check(0, 1);
    rig.select("now", 0, 1);
    rig.stream.synchronize();
    const start = performance.now();
    rig.gather("now", 0, 1);
    rig.stream.synchronize();
    return performance.now() - start;
  };
  assertGreater(gatherMs(4 * 16 + 1), 2 * pageMs - 5); // pages 1 and 2, from the host
  assertLess(gatherMs(4 * 16 + 2), pageMs / 2); // both are in their slots
  assertLess(gatherMs(5 * 16), pageMs / 2); // page 3 joins
  assertEquals(rig.misses("now", 1)[0]?.[0], [{ page: 3, slot: 2, block: 3, frame: 1 + (3 % 2) }]);
});

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
  refused(
    () => lib.fkv_control_load(cache, rig.ring.address, rig.step.address, 0, 1, stream.handle),
    "ring_entries",
  );
  const empty = pack.fkv_workspace({ scores: null, raw: now.raw, n_misses: now.nMisses, misses: now.misses });
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
