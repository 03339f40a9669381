/// <reference lib="esnext.disposable" preserve="true" />
// Whole pages: copied between layouts and pools.

import { test } from "node:test";
import { assert, assertEquals, assertGreater, assertLess, assertNotEquals, assertThrows } from "@std/assert";
import { Event, FreeKVError, pack } from "../lib/device.ts";
import {
  blockBytes,
  type Copy,
  copyPages,
  digests,
  framesOf,
  hostPool,
  listed,
  untouched,
} from "./attention/pools.ts";
import { Rig } from "./attention/rig.ts";
import { headPageOf, stridesOf } from "./retrieval/images.ts";
import { Random } from "./retrieval/random.ts";
import { twinOnly } from "./target.ts";

test("pages go HND → host → NHD → HND without a byte changed", { timeout: 30_000 }, () => {
  for (const dtype of ["f32", "bf16"] as const) {
    for (const hostLayout of ["hnd", "nhd"] as const) {
      using rig = new Rig({ dtype, headDim: 24, kvHeads: 3, layers: 2 });
      const story = rig.story(new Random(4), 6 * rig.pageSize);
      const start = framesOf(rig, story, "hnd");
      const pool = hostPool(rig, 10, hostLayout);
      const nhd = rig.alloc(start.buffer.bytes);
      const end = rig.alloc(start.buffer.bytes);
      const nhdFrames = rig.frames(nhd, 6 * rig.frameBytes, "nhd");
      const [pages, blocks, places] = [
        [0, 1, 2, 3, 4, 5],
        [9, 0, 4, 3, 7, 5],
        [5, 4, 3, 2, 1, 0],
      ];
      copyPages(rig, { src: start.frames, dst: pool.frames, from: pages, to: blocks });
      copyPages(rig, { src: pool.frames, dst: nhdFrames, from: blocks, to: places });
      copyPages(rig, {
        src: nhdFrames,
        dst: rig.frames(end, 6 * rig.frameBytes, "hnd"),
        from: places,
        to: pages,
      });
      const expected = rig.download(start.buffer);
      assertEquals(rig.download(end), expected);
      assertNotEquals(rig.download(nhd), expected, "the middle is another layout and order");
      assert(
        blockBytes(rig, pool, 1).every((byte) => byte === 0),
        "a block that was not named is left alone",
      );
      if (hostLayout === "hnd") {
        const layer1 = blockBytes(rig, pool, 9).subarray(rig.frameBytes);
        assertEquals(
          layer1,
          expected.subarray(6 * rig.frameBytes, 7 * rig.frameBytes),
          "block 9, layer 1 is page 0",
        );
      }
    }
  }
});

test("a partial copy moves its first rows and its layers alone", () => {
  using rig = new Rig({ headDim: 8, layers: 3 });
  const story = rig.story(new Random(5), 2 * rig.pageSize);
  const { frames } = framesOf(rig, story, "hnd");
  const target = rig.alloc(3 * 2 * rig.frameBytes);
  const dst = rig.frames(target, 2 * rig.frameBytes, "nhd");
  copyPages(rig, { src: frames, dst, from: [0], to: [1], srcLayer: 0, dstLayer: 1, layers: 2, tokens: 5 });
  const bytes = rig.download(target);
  const rowBytes = rig.headDim * rig.elementBytes;
  for (let layer = 0; layer < 3; layer++) {
    for (let page = 0; page < 2; page++) {
      const at = (layer * 2 + page) * rig.frameBytes;
      for (let head = 0; head < rig.kvHeads; head++) {
        const actual = headPageOf(rig, "nhd", bytes.subarray(at, at + rig.frameBytes), head);
        const expected = new Uint8Array(actual.length).fill(untouched);
        if (layer >= 1 && page === 1) {
          const whole = rig.headPage(story, 0, head);
          if (head === 0) whole[rig.pageSize * rowBytes] = layer - 1;
          for (let kv = 0; kv < 2; kv++) {
            const from = kv * rig.pageSize * rowBytes;
            expected.set(whole.subarray(from, from + 5 * rowBytes), from);
          }
        }
        assertEquals(actual, expected, `layer ${layer}, page ${page}, head ${head}`);
      }
    }
  }
});

test("large pages cross to the host and back, whole and in part, many of them at once", {
  timeout: 60_000,
}, () => {
  for (const tokens of [64, 37, 1]) {
    using rig = new Rig({ dtype: "f16", headDim: 128, kvHeads: 4, pageSize: 64, layers: 2 });
    const pages = 20;
    const story = rig.story(new Random(11), pages * rig.pageSize);
    const start = framesOf(rig, story, "hnd");
    const pool = hostPool(rig, pages, "nhd");
    const end = rig.alloc(start.buffer.bytes);
    const dst = rig.frames(end, pages * rig.frameBytes, "hnd");
    const from = Array.from({ length: pages }, (_, i) => i);
    const to = from.map((i) => (7 * i + 3) % pages);
    copyPages(rig, { src: start.frames, dst: pool.frames, from, to, tokens });
    copyPages(rig, { src: pool.frames, dst, from: to, to: from, tokens });
    const expected = rig.download(start.buffer);
    const rowBytes = rig.headDim * rig.elementBytes;
    for (let at = 0; at < expected.length; at += rowBytes) {
      if ((at / rowBytes) % rig.pageSize >= tokens) expected.fill(untouched, at, at + rowBytes);
    }
    assertEquals(rig.download(end), expected, `${tokens} tokens`);
  }
});

test("the list of pages is the caller's again when the call returns", () => {
  using rig = new Rig({ scheduleSeed: 3 }); // nothing runs before the host waits
  const story = rig.story(new Random(6), 2 * rig.pageSize);
  const { frames } = framesOf(rig, story, "hnd");
  const target = rig.alloc(rig.frameBytes);
  const [from, to] = [listed(rig, [1]), listed(rig, [0])];
  const params = pack.fkv_pages_params({
    n: 1,
    src_layer0: 0,
    dst_layer0: 0,
    n_layers: 1,
    n_tokens: rig.pageSize,
    src: frames,
    dst: rig.frames(target),
    from,
    to,
  });
  rig.device.call("fkv_pages_copy", rig.cache(), params, rig.stream.handle);
  from.view(Int32Array)[0] = 0;
  to.view(Int32Array)[0] = 1000;
  const expected = rig.framePage(story, 1);
  expected[stridesOf(rig, rig.layout).kv] = 0;
  assertEquals(rig.download(target), expected);
});

test("only copies to or from the host pool pay for the link", { timeout: 30_000, skip: twinOnly }, () => {
  using rig = new Rig({ layers: 1, headDim: 64, linkBytesPerSecond: 500_000 });
  const story = rig.story(new Random(10), 2 * rig.pageSize);
  const { frames } = framesOf(rig, story, "hnd");
  const pool = hostPool(rig, 2, "hnd");
  const other = rig.frames(rig.alloc(2 * rig.frameBytes));
  const elapsed = (copy: Copy): number => {
    using start = rig.device.event();
    using end = rig.device.event();
    rig.stream.synchronize();
    rig.stream.record(start);
    copyPages(rig, copy);
    rig.stream.record(end);
    rig.stream.synchronize();
    return Event.elapsedMs(start, end);
  };
  const both = { from: [0, 1], to: [1, 0] };
  const ms = (2 * rig.frameBytes) / 500; // 65 ms
  assertGreater(elapsed({ ...both, src: frames, dst: pool.frames }), 0.9 * ms);
  assertGreater(elapsed({ ...both, src: pool.frames, dst: frames }), 0.9 * ms);
  const within = Math.min(...[0, 1, 2].map(() => elapsed({ ...both, src: frames, dst: other })));
  assertLess(within, 0.5 * ms);
});

test("pages that cannot be are refused at the call, in words", () => {
  using rig = new Rig({ layers: 2 });
  const frames = rig.frames(rig.alloc(2 * 2 * rig.frameBytes), 2 * rig.frameBytes);
  const copy = { src: frames, dst: frames, from: [0], to: [1] };
  const refused = (fn: () => unknown, text: string): unknown => assertThrows(fn, FreeKVError, text);
  refused(() => copyPages(rig, { ...copy, layers: 3 }), "3 layers from 0 to 0; the cache has 2");
  refused(() => copyPages(rig, { ...copy, dstLayer: 1 }), "2 layers from 0 to 1");
  refused(() => copyPages(rig, { ...copy, tokens: 17 }), "17 tokens of pages of 16");
  refused(() => copyPages(rig, { ...copy, from: [-1] }), "pair 0 is page -1 to page 1");
  refused(
    () => copyPages(rig, { ...copy, from: Array(257).fill(0), to: Array(257).fill(0) }),
    "257 pages; a call takes 0 to 256",
  );
  refused(
    () => copyPages(rig, { ...copy, dst: { ...frames, base: 0 } }),
    "params.dst has neither base nor chunks",
  );
  refused(() => copyPages(rig, { ...copy, src: { ...frames, row: 8 } }), "multiples of 16 bytes");
  refused(() => digests(rig, frames, 2, 0), "digest_kind 2 is neither 0");
  refused(
    () => rig.device.call("fkv_page_finish", rig.cache(), 0, 0, 1, rig.stream.handle),
    "cache.digests has neither",
  );
  refused(() => rig.device.call("fkv_append", rig.cache(), 0, 0, 1, rig.stream.handle), "qkv");
});
