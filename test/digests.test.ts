/// <reference lib="esnext.disposable" preserve="true" />
// Digests of pages on the twin, and the step that finishes a page.

import { test } from "node:test";
import { assert, assertEquals, assertGreater, assertLess } from "@std/assert";
import type { Dtype } from "../lib/checkpoint.ts";
import { toFloat32 } from "../lib/float.ts";
import {
  blockBytes,
  digestFrames,
  digests,
  framesOf,
  hostPool,
  keysOf,
  untouched,
} from "./attention/pools.ts";
import { type LaneSpec, Rig, type RigOptions, type Story } from "./attention/rig.ts";
import { meanDeviation, minMax } from "./reference/attention.ts";
import { Random } from "./retrieval/random.ts";

const digestShapes: RigOptions[] = [
  { headDim: 64, dtype: "bf16" },
  { headDim: 24, dtype: "f16", layout: "nhd", pageSize: 32 },
  { headDim: 8, dtype: "f32", kvHeads: 3, layers: 2 },
];

test("Quest digests are each channel's minimum and maximum, exactly; a NaN makes its channel NaN and no other", {
  timeout: 30_000,
}, () => {
  for (const shape of digestShapes) {
    using rig = new Rig(shape);
    const story = rig.story(new Random(7), 2 * rig.pageSize);
    const check = (what: string): void => {
      const { frames } = framesOf(rig, story, rig.layout);
      const actual = digests(rig, frames, 0, 1);
      const expected = Array.from({ length: rig.kvHeads }, (_, head) => minMax(keysOf(rig, story, 1, head)));
      assertEquals(
        [...actual],
        expected.flatMap(({ low, high }) => [...low, ...high]),
        what,
      );
    };
    check("finite");
    for (const [row, channel] of [
      [0, 1],
      [3, 2],
      [rig.pageSize - 1, 5],
    ] as const) {
      rig.rowOf(story, 0, rig.pageSize + row, 1)[channel] = Number.NaN;
    }
    rig.rowOf(story, 0, rig.pageSize + 2, 0)[0] = Number.NEGATIVE_INFINITY;
    check("with NaN in rows first, middle and last");
  }
});

test("ArkVale digests are the mean −/+ the mean absolute deviation, rounded to the dtype", {
  timeout: 30_000,
}, () => {
  const half: Record<Dtype, number> = { f32: 2 ** -24, bf16: 2 ** -9, f16: 2 ** -12 }; // of a rounding, relative
  for (const shape of digestShapes) {
    using rig = new Rig(shape);
    const story = rig.story(new Random(8), 2 * rig.pageSize);
    const { frames } = framesOf(rig, story, rig.layout);
    const actual = digests(rig, frames, 1, 1);
    const expected = Array.from({ length: rig.kvHeads }, (_, head) =>
      meanDeviation(keysOf(rig, story, 1, head)),
    ).flatMap(({ low, high }) => [...low, ...high]);
    for (const [i, value] of expected.entries()) {
      assertLess(
        Math.abs(actual[i]! - value),
        Math.abs(value) * half[rig.dtype] * 2 + 1e-6,
        `${i}: ${actual[i]} for ${value}`,
      );
    }
    assertGreater(actual[rig.headDim]! - actual[0]!, 0.5);
  }
});

test("a completed page is digested and written to its host block; no other row writes anything", {
  timeout: 30_000,
}, () => {
  for (const layout of ["hnd", "nhd"] as const) {
    using rig = new Rig({ dtype: "bf16", headDim: 24, layers: 2, layout, maxRows: 6 });
    const random = new Random(9);
    const spec: LaneSpec = { sinkPages: 1, windowPages: 2, nSlots: 1 };
    const stories = [
      rig.story(random, 16),
      rig.story(random, 7 * 16),
      rig.story(random, 7 * 16 + 3),
      rig.story(random, 5 * 16),
    ];
    const lanes = stories.map((story) => rig.lane(spec, story));
    const resident = rig.lane({ ...spec, resident: true }, stories[1]!);
    const pool = hostPool(rig, 8, "hnd");
    const digestPool = rig.alloc(8 * rig.layers * rig.kvHeads * 2 * rig.headDim * rig.elementBytes);
    const cache = rig.cache({ host: pool.frames, digests: digestFrames(rig, digestPool) });
    rig.setRows([
      { lane: lanes[0]!, position: 15, block: 6 }, // the sink page
      { lane: lanes[1]!, position: 111, block: 1 }, // window page 6
      { lane: lanes[2]!, position: 114, block: 2 }, // not complete
      { lane: lanes[3]!, position: 79, block: -1 }, // no block
      undefined,
      { lane: resident, position: 111, block: 4 },
    ]);
    rig.device.call("fkv_page_finish", cache, 0, 1, 6, rig.stream.handle);
    const digestBytes = rig.download(digestPool);
    const written = new Map([
      [6, [stories[0]!, 0]],
      [1, [stories[1]!, 6]],
      [4, [stories[1]!, 6]],
    ] as [number, [Story, number]][]);
    for (let block = 0; block < 8; block++) {
      const [story, page] = written.get(block) ?? [];
      const bytes = blockBytes(rig, pool, block);
      assert(
        bytes.subarray(0, rig.frameBytes).every((byte) => byte === 0),
        "layer 0 is left alone",
      );
      const digest = digestBytes.subarray(
        (block * digestBytes.length) / 8 + digestBytes.length / 16,
        ((block + 1) * digestBytes.length) / 8,
      );
      if (story === undefined) {
        assert(
          bytes.every((byte) => byte === 0) && digest.every((byte) => byte === untouched),
          `block ${block} is left alone`,
        );
        continue;
      }
      assertEquals(bytes.slice(rig.frameBytes), rig.framePage(story, page!, "hnd"), `block ${block}`);
      const expected = Array.from({ length: rig.kvHeads }, (_, head) =>
        minMax(keysOf(rig, story, page!, head)),
      );
      assertEquals(
        [...toFloat32(digest, rig.dtype)],
        expected.flatMap(({ low, high }) => [...low, ...high]),
        `digest ${block}`,
      );
    }
  }
});
