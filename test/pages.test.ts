/// <reference lib="esnext.disposable" preserve="true" />
// Whole pages on the twin: appended to, copied between layouts and pools, digested, finished.

import { test } from "node:test";
import { assert, assertEquals, assertGreater, assertLess, assertNotEquals, assertThrows } from "@std/assert";
import { type DeviceBuffer, Event, FreeKVError, pack, type PinnedBuffer, type Values } from "../lib/device.ts";
import { fromFloat32, toFloat32 } from "../lib/float.ts";
import { type Dtype, type LaneSpec, Rig, type RigOptions, type Story } from "./attention/rig.ts";
import { meanDeviation, minMax } from "./reference/attention.ts";
import { headPageOf, type PageLayout, stridesOf } from "./retrieval/images.ts";
import { Random } from "./retrieval/random.ts";

type Frames = Values<"fkv_frames">;
const untouched = 0xff; // what the twin fills device memory with

/** The host pool: blocks of all layers in chunks of four. */
interface Pool {
  frames: Frames;
  chunks: PinnedBuffer[];
}
function hostPool(rig: Rig, blocks: number, layout: PageLayout): Pool {
  const blockBytes = rig.layers * rig.frameBytes;
  const chunks = Array.from({ length: Math.ceil(blocks / 4) }, () => rig.pinned(4 * blockBytes));
  const bases = rig.upload(BigUint64Array.from(chunks, (chunk) => BigInt(chunk.address)));
  return { chunks, frames: { ...rig.frames(0, rig.frameBytes, layout), chunks: bases, frame: blockBytes, shift: 2 } };
}
const blockBytes = (rig: Rig, pool: Pool, block: number): Uint8Array =>
  (pool.chunks[block >> 2] as PinnedBuffer).view(Uint8Array, (block & 3) * rig.layers * rig.frameBytes, rig.layers * rig.frameBytes);

interface Copy {
  src: Frames;
  dst: Frames;
  from: number[];
  to: number[];
  srcLayer?: number;
  dstLayer?: number;
  layers?: number;
  tokens?: number;
}
function pagesParams(rig: Rig, copy: Omit<Copy, "dst"> & { dst?: Frames }): ArrayBuffer {
  return pack.fkv_pages_params({
    n: copy.from.length, src_layer0: copy.srcLayer ?? 0, dst_layer0: copy.dstLayer ?? 0, n_layers: copy.layers ?? rig.layers,
    n_tokens: copy.tokens ?? rig.pageSize, src: copy.src, dst: copy.dst ?? null, from: listed(rig, copy.from), to: listed(rig, copy.to),
  });
}
/** A list where a struct can point to it. */
function listed(rig: Rig, list: readonly number[]): PinnedBuffer {
  const pinned = rig.pinned(4 * list.length);
  pinned.view(Int32Array).set(list);
  return pinned;
}
function copyPages(rig: Rig, copy: Copy): void {
  rig.device.call("fkv_pages_copy", rig.cache(), pagesParams(rig, copy), rig.stream.handle);
}

/** Device frames of a story, every layer the same but for the first byte of V. */
function framesOf(rig: Rig, story: Story, layout: PageLayout): { buffer: DeviceBuffer; frames: Frames } {
  const pages = Math.ceil(story.tokens / rig.pageSize);
  const buffer = rig.alloc(rig.layers * pages * rig.frameBytes);
  for (let layer = 0; layer < rig.layers; layer++) {
    for (let page = 0; page < pages; page++) {
      const bytes = rig.framePage(story, page, layout);
      bytes[stridesOf(rig, layout).kv] = layer;
      rig.stream.copy(buffer.address + (layer * pages + page) * rig.frameBytes, bytes);
    }
  }
  return { buffer, frames: rig.frames(buffer, pages * rig.frameBytes, layout) };
}

/** One row's qkv from K and V of every head. */
function qkvOf(rig: Rig, k: Float32Array, v: Float32Array): Float32Array {
  const qkv = new Float32Array(rig.qkvWidth).fill(Number.NaN);
  qkv.set(k, rig.qHeads * rig.headDim);
  qkv.set(v, (rig.qHeads + rig.kvHeads) * rig.headDim);
  return qkv;
}

test("append writes each row's token into its lane's frame of that page, rounded to nearest even, and nothing else", { timeout: 30_000 }, () => {
  for (const dtype of ["f32", "bf16", "f16"] as const) {
    for (const layout of ["hnd", "nhd"] as const) {
      using rig = new Rig({ dtype, layout, headDim: 24, layers: 2, maxRows: 8 });
      const random = new Random(1);
      const empty: Story = rig.story(random, 0);
      const view = { sinkPages: 1, windowPages: 2, nSlots: 1 };
      const lanes = [0, 1, 2, 3].map(() => rig.lane(view, empty)).concat(rig.lane({ ...view, resident: true }, { ...empty, tokens: 1 }));
      const rows = [5, 16, 16 * 3 + 15, 16 * 7 + 2, 15].map((position, i) => ({ lane: lanes[i] as number, position }));
      const frameOfRow = [0, 1 + 1, 1 + 0, 1 + 1, 0]; // sink; window pages 1, 3, 7 in a ring of 3; resident
      const width = rig.kvHeads * rig.headDim;
      const edge = [1 + 2 ** -8, 1 + 3 * 2 ** -8, 1 + 2 ** -11, 1 + 3 * 2 ** -11, 65520, 2 ** -25, -0, 1e-41, Number.NaN, -Number.POSITIVE_INFINITY];
      const values = rows.map(() => [0, 1].map(() => Float32Array.from([...edge, ...random.normals(width - edge.length)])));
      const before = rig.lanes.map((lane) => rig.download(lane.frames));
      rig.setRows([...rows, undefined]);
      const qkv = rig.upload(Float32Array.from([...values.flatMap(([k, v]) => [...qkvOf(rig, k!, v!)]), ...new Float32Array(rig.qkvWidth)]));
      rig.device.call("fkv_append", rig.cache(), qkv.address, 1, rows.length + 1, rig.stream.handle);
      for (const [r, { lane, position }] of rows.entries()) {
        const frames = rig.download(rig.lanes[lane]!.frames);
        const at = (rig.lanes[lane]!.nFrames + frameOfRow[r]!) * rig.frameBytes;
        const rowBytes = rig.headDim * rig.elementBytes;
        for (let head = 0; head < rig.kvHeads; head++) {
          const page = headPageOf(rig, layout, frames.subarray(at, at + rig.frameBytes), head);
          for (let kv = 0; kv < 2; kv++) {
            const row = (kv * rig.pageSize + (position % rig.pageSize)) * rowBytes;
            const expected = fromFloat32(values[r]![kv]!.subarray(head * rig.headDim, (head + 1) * rig.headDim), dtype);
            assertEquals(page.subarray(row, row + rowBytes), expected, `${dtype} ${layout} row ${r} head ${head}`);
          }
        }
        const changed = frames.reduce((n, byte, i) => n + (byte !== before[lane]![i] ? 1 : 0), 0);
        assert(changed > 0 && changed <= 2 * rig.kvHeads * rowBytes, `${changed} bytes changed`);
      }
    }
  }
});

test("a chunk of a prompt is appended as its tokens one by one are", { timeout: 30_000 }, () => {
  using rig = new Rig({ dtype: "bf16", layout: "nhd", headDim: 40, layers: 2, group: 1 });
  const [start, n] = [13, 40];
  const qkv = new Random(2).normals(n * rig.qkvWidth);
  const lane = rig.lane({ sinkPages: 0, windowPages: 1, resident: true }, { ...rig.story(new Random(3), 0), tokens: 64 });
  const input = rig.upload(qkv);
  for (let i = 0; i < n; i++) {
    rig.setRows([{ lane, position: start + i }]);
    rig.device.call("fkv_append", rig.cache(), input.address + 4 * i * rig.qkvWidth, 1, 1, rig.stream.handle);
  }
  const pages = rig.lanes[lane]!.nFrames;
  const chunk = rig.upload(new Uint8Array(2 * pages * rig.frameBytes));
  const params = pack.fkv_prefill_params({
    layer: 1, start, n, qkv: input, out: null, frames: rig.frames(chunk, pages * rig.frameBytes),
  });
  rig.device.call("fkv_prefill_append", rig.cache(), params, rig.stream.handle);
  const [one, all] = [rig.download(rig.lanes[lane]!.frames), rig.download(chunk)];
  const rowBytes = rig.headDim * rig.elementBytes;
  let compared = 0;
  for (let page = 0; page < pages; page++) {
    const at = (pages + page) * rig.frameBytes;
    for (let head = 0; head < rig.kvHeads; head++) {
      const [a, b] = [one, all].map((bytes) => headPageOf(rig, "nhd", bytes.subarray(at, at + rig.frameBytes), head)) as Uint8Array[];
      for (let row = 0; row < 2 * rig.pageSize; row++) {
        const token = page * rig.pageSize + (row % rig.pageSize);
        const [x, y] = [a, b].map((bytes) => bytes!.subarray(row * rowBytes, (row + 1) * rowBytes)) as Uint8Array[];
        if (token < start || token >= start + n) assertEquals(y, new Uint8Array(rowBytes));
        else assertEquals(y, x);
        compared += token < start || token >= start + n ? 0 : 1;
      }
    }
  }
  assertEquals(compared, n * 2 * rig.kvHeads);
  assert(all.subarray(0, pages * rig.frameBytes).every((byte) => byte === 0), "the other layer is left alone");
});

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
      const [pages, blocks, places] = [[0, 1, 2, 3, 4, 5], [9, 0, 4, 3, 7, 5], [5, 4, 3, 2, 1, 0]];
      copyPages(rig, { src: start.frames, dst: pool.frames, from: pages, to: blocks });
      copyPages(rig, { src: pool.frames, dst: nhdFrames, from: blocks, to: places });
      copyPages(rig, { src: nhdFrames, dst: rig.frames(end, 6 * rig.frameBytes, "hnd"), from: places, to: pages });
      const expected = rig.download(start.buffer);
      assertEquals(rig.download(end), expected);
      assertNotEquals(rig.download(nhd), expected, "the middle is another layout and order");
      assert(blockBytes(rig, pool, 1).every((byte) => byte === 0), "a block that was not named is left alone");
      if (hostLayout === "hnd") {
        const layer1 = blockBytes(rig, pool, 9).subarray(rig.frameBytes);
        assertEquals(layer1, expected.subarray(6 * rig.frameBytes, 7 * rig.frameBytes), "block 9, layer 1 is page 0");
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

test("the list of pages is the caller's again when the call returns", () => {
  using rig = new Rig({ scheduleSeed: 3 }); // nothing runs before the host waits
  const story = rig.story(new Random(6), 2 * rig.pageSize);
  const { frames } = framesOf(rig, story, "hnd");
  const target = rig.alloc(rig.frameBytes);
  const [from, to] = [listed(rig, [1]), listed(rig, [0])];
  const params = pack.fkv_pages_params({
    n: 1, src_layer0: 0, dst_layer0: 0, n_layers: 1, n_tokens: rig.pageSize, src: frames, dst: rig.frames(target), from, to,
  });
  rig.device.call("fkv_pages_copy", rig.cache(), params, rig.stream.handle);
  from.view(Int32Array)[0] = 0;
  to.view(Int32Array)[0] = 1000;
  const expected = rig.framePage(story, 1);
  expected[stridesOf(rig, rig.layout).kv] = 0;
  assertEquals(rig.download(target), expected);
});

/** Digest of one page of each head, [head][low, high][d], by fkv_pages_digest. */
function digests(rig: Rig, src: Frames, kind: number, page: number): Float32Array {
  const { headDim, kvHeads, elementBytes, layers } = rig;
  const pool = rig.alloc(3 * layers * kvHeads * 2 * headDim * elementBytes);
  const cache = rig.cache({ digests: digestFrames(rig, pool) });
  const params = pagesParams(rig, { src, from: [page], to: [2], layers: 1 });
  rig.device.call("fkv_pages_digest", cache, params, kind, rig.stream.handle);
  const bytes = rig.download(pool);
  const blockBytes = bytes.length / 3;
  assert(bytes.subarray(0, 2 * blockBytes).every((byte) => byte === untouched), "other blocks' digests are left alone");
  return toFloat32(bytes.subarray(2 * blockBytes, 2 * blockBytes + blockBytes / layers), rig.dtype);
}
function digestFrames(rig: Rig, pool: DeviceBuffer): Frames {
  const kv = rig.headDim * rig.elementBytes;
  const layer = rig.kvHeads * 2 * kv;
  return { base: pool.address, chunks: null, layer, frame: rig.layers * layer, head: 2 * kv, kv, row: 0, shift: 0 };
}
const keysOf = (rig: Rig, story: Story, page: number, head: number): Float32Array[] =>
  Array.from({ length: rig.pageSize }, (_, row) => rig.rowOf(story, 0, page * rig.pageSize + row, head));

const digestShapes: RigOptions[] = [
  { headDim: 64, dtype: "bf16" },
  { headDim: 24, dtype: "f16", layout: "nhd", pageSize: 32 },
  { headDim: 8, dtype: "f32", kvHeads: 3, layers: 2 },
];

test("Quest digests are each channel's minimum and maximum, exactly; a NaN makes its channel NaN and no other", { timeout: 30_000 }, () => {
  for (const shape of digestShapes) {
    using rig = new Rig(shape);
    const story = rig.story(new Random(7), 2 * rig.pageSize);
    const check = (what: string): void => {
      const { frames } = framesOf(rig, story, rig.layout);
      const actual = digests(rig, frames, 0, 1);
      const expected = Array.from({ length: rig.kvHeads }, (_, head) => minMax(keysOf(rig, story, 1, head)));
      assertEquals([...actual], expected.flatMap(({ low, high }) => [...low, ...high]), what);
    };
    check("finite");
    for (const [row, channel] of [[0, 1], [3, 2], [rig.pageSize - 1, 5]] as const) {
      rig.rowOf(story, 0, rig.pageSize + row, 1)[channel] = Number.NaN;
    }
    rig.rowOf(story, 0, rig.pageSize + 2, 0)[0] = Number.NEGATIVE_INFINITY;
    check("with NaN in rows first, middle and last");
  }
});

test("ArkVale digests are the mean −/+ the mean absolute deviation, rounded to the dtype", { timeout: 30_000 }, () => {
  const half: Record<Dtype, number> = { f32: 2 ** -24, bf16: 2 ** -9, f16: 2 ** -12 }; // of a rounding, relative
  for (const shape of digestShapes) {
    using rig = new Rig(shape);
    const story = rig.story(new Random(8), 2 * rig.pageSize);
    const { frames } = framesOf(rig, story, rig.layout);
    const actual = digests(rig, frames, 1, 1);
    const expected = Array.from({ length: rig.kvHeads }, (_, head) => meanDeviation(keysOf(rig, story, 1, head)))
      .flatMap(({ low, high }) => [...low, ...high]);
    for (const [i, value] of expected.entries()) {
      assertLess(Math.abs(actual[i]! - value), Math.abs(value) * half[rig.dtype] * 2 + 1e-6, `${i}: ${actual[i]} for ${value}`);
    }
    assertGreater(actual[rig.headDim]! - actual[0]!, 0.5);
  }
});

test("a completed page is digested and written to its host block; no other row writes anything", { timeout: 30_000 }, () => {
  for (const layout of ["hnd", "nhd"] as const) {
    using rig = new Rig({ dtype: "bf16", headDim: 24, layers: 2, layout, maxRows: 6 });
    const random = new Random(9);
    const spec: LaneSpec = { sinkPages: 1, windowPages: 2, nSlots: 1 };
    const stories = [rig.story(random, 16), rig.story(random, 7 * 16), rig.story(random, 7 * 16 + 3), rig.story(random, 5 * 16)];
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
    const written = new Map([[6, [stories[0]!, 0]], [1, [stories[1]!, 6]], [4, [stories[1]!, 6]]] as [number, [Story, number]][]);
    for (let block = 0; block < 8; block++) {
      const [story, page] = written.get(block) ?? [];
      const bytes = blockBytes(rig, pool, block);
      assert(bytes.subarray(0, rig.frameBytes).every((byte) => byte === 0), "layer 0 is left alone");
      const digest = digestBytes.subarray((block * digestBytes.length) / 8 + digestBytes.length / 16, ((block + 1) * digestBytes.length) / 8);
      if (story === undefined) {
        assert(bytes.every((byte) => byte === 0) && digest.every((byte) => byte === untouched), `block ${block} is left alone`);
        continue;
      }
      assertEquals(bytes.slice(rig.frameBytes), rig.framePage(story, page!, "hnd"), `block ${block}`);
      const expected = Array.from({ length: rig.kvHeads }, (_, head) => minMax(keysOf(rig, story, page!, head)));
      assertEquals([...toFloat32(digest, rig.dtype)], expected.flatMap(({ low, high }) => [...low, ...high]), `digest ${block}`);
    }
  }
});

test("only copies to or from the host pool pay for the link", { timeout: 30_000 }, () => {
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
  refused(() => copyPages(rig, { ...copy, from: Array(257).fill(0), to: Array(257).fill(0) }), "257 pages; a call takes 0 to 256");
  refused(() => copyPages(rig, { ...copy, dst: { ...frames, base: 0 } }), "params.dst has neither base nor chunks");
  refused(() => copyPages(rig, { ...copy, src: { ...frames, row: 8 } }), "multiples of 16 bytes");
  refused(() => digests(rig, frames, 2, 0), "digest_kind 2 is neither 0");
  refused(() => rig.device.call("fkv_page_finish", rig.cache(), 0, 0, 1, rig.stream.handle), "cache.digests has neither");
  refused(() => rig.device.call("fkv_append", rig.cache(), 0, 0, 1, rig.stream.handle), "qkv");
});
