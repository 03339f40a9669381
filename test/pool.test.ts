/// <reference lib="esnext.disposable" preserve="true" />
// The pool of host blocks, and the memory under it, which is pinned while others go on.

import { test } from "node:test";
import {
  assert,
  assertEquals,
  assertGreaterOrEqual,
  assertLess,
  assertLessOrEqual,
  assertMatch,
  assertRejects,
} from "@std/assert";
import { type Device, FreeKVError, type PinnedReserve } from "../lib/device.ts";
import { geometryOf } from "../lib/geometry.ts";
import { HostPool } from "../lib/pages.ts";
import { open, refused, timeout } from "./runtime.ts";
import { onTwin, twinOnly } from "./target.ts";

const kib = 1024;
const mib = 1024 * kib;

/** Resolves when that much is pinned. */
async function grown(reserve: PinnedReserve, bytes: number): Promise<void> {
  while (reserve.progress().bytes < bytes) {
    assertEquals(reserve.progress().failure, undefined);
    await new Promise((resolve) => setTimeout(resolve, 1));
  }
}

test("a reserve is pinned from its start on, in pieces, as far as was asked", { timeout }, async () => {
  using device = open();
  const start = device.memory().pinnedBytes;
  const reserve = device.reserve(10 * mib, mib);
  assertEquals(reserve.address % (2 * mib), 0);
  assertEquals([reserve.progress().bytes, device.memory().pinnedBytes - start], [0, 0]);
  reserve.grow(3 * mib + 5);
  await grown(reserve, 4 * mib);
  reserve.grow(mib); // less than before: nothing
  assertEquals([reserve.progress().bytes, device.memory().pinnedBytes - start], [4 * mib, 4 * mib]);

  using stream = device.stream();
  using there = device.alloc(2 * mib);
  using seen = device.pinned(2 * mib);
  const copied = (address: number, bytes: number): Uint8Array => {
    stream.copy(there, address, bytes);
    stream.copy(seen, there, bytes);
    stream.synchronize();
    return seen.view(Uint8Array, 0, bytes);
  };
  assert(copied(reserve.address + 3 * mib, mib).every((x) => x === 0));
  stream.memset(there, 7, mib);
  stream.copy(reserve.address + mib, there, mib);
  assert(copied(reserve.address + mib, mib).every((x) => x === 7));
  assertMatch(
    refused("BAD_ARGUMENT", () => copied(reserve.address + mib - 16, 32)),
    /past the end of a pinned allocation/,
  );
  assertMatch(
    refused("BAD_ARGUMENT", () => copied(reserve.address + 4 * mib, 16)),
    /not all of it is pinned yet/,
  );

  reserve.grow(10 * mib);
  await grown(reserve, 10 * mib);
  assert(copied(reserve.address + mib, mib).every((x) => x === 7));
  assert(copied(reserve.address + 9 * mib, mib).every((x) => x === 0));
  assertMatch(
    refused("BAD_ARGUMENT", () => reserve.grow(10 * mib + 1)),
    /of a reservation of/,
  );
  const { address } = reserve;
  reserve[Symbol.dispose]();
  assertEquals(device.memory().pinnedBytes - start, 2 * mib);
  assertMatch(
    refused("BAD_ARGUMENT", () => device.call("fkv_host_grow", address, 1, device.handle)),
    /not what fkv_host_reserve gave out/,
  );
  assertMatch(
    refused("BAD_ARGUMENT", () => device.reserve(mib, 1000)),
    /multiple of 4096/,
  );
});

test("a reserve that is given back while it grows ends its thread", { timeout }, () => {
  for (let round = 0; round < 20; round++) {
    using device = open();
    const reserve = device.reserve(256 * mib, 2 * mib);
    reserve.grow(256 * mib);
    if (round % 2 === 0) reserve[Symbol.dispose](); // else the device ends it
    if (round % 2 === 0) assertEquals(device.memory().pinnedBytes, 0);
  }
});

test("growth beside work on the device, and beside a capture", { timeout }, async () => {
  using device = open();
  using stream = device.stream();
  using there = device.alloc(64);
  using seen = device.pinned(64);
  using reserve = device.reserve(64 * mib, 4 * mib);
  reserve.grow(64 * mib);
  using graph = stream.capture(() => {
    stream.memset(there, 3);
    stream.copy(seen, there);
  });
  while (reserve.progress().bytes < 64 * mib) {
    seen.view(Uint8Array).fill(0);
    stream.launch(graph);
    stream.synchronize();
    assert(seen.view(Uint8Array).every((x) => x === 3));
    await new Promise((resolve) => setImmediate(resolve));
  }
});

test("what cannot be pinned is told, and what is pinned stays", { timeout, skip: twinOnly }, async () => {
  using device = open();
  const { totalBytes } = device.memory();
  const piece = 2 ** 30;
  using reserve = device.reserve(Math.ceil(totalBytes / piece + 2) * piece, piece);
  reserve.grow(reserve.bytes);
  while (!reserve.progress().failure) await new Promise((resolve) => setTimeout(resolve, 1));
  const { bytes, failure } = reserve.progress();
  assertEquals([failure?.code, bytes], ["OUT_OF_MEMORY", Math.floor(totalBytes / piece) * piece]);
  assertMatch(failure?.message ?? "", /pinned memory/);
});

/** Blocks of `pages` 3-layer pages; 24 KiB, and 18 KiB of which no power of two is a multiple. */
const geometry = (headDim: number) =>
  geometryOf({
    ...{ layers: 3, heads: 4, kvHeads: 2, headDim, pageSize: 16, dtype: "f32", maxContext: 4096 },
    ...{ layout: "hnd", hostLayout: "hnd" },
  });

async function wholeCopies(device: Device, pool: HostPool, blockBytes: number): Promise<void> {
  using stream = device.stream();
  const blocks = pool.reserve(1200, stream);
  await pool.whenReady(blocks);
  using there = device.alloc(blockBytes);
  for (const block of blocks) stream.copy(pool.address(block), there, blockBytes); // refused across the end of a piece
  stream.synchronize();
  pool.release(blocks);
}

test("blocks lie within one piece, whatever their size", { timeout }, async () => {
  using device = open();
  for (const headDim of [32, 24]) {
    const g = geometry(headDim);
    using pool = new HostPool(device, g, 1500 * g.blockBytes);
    await wholeCopies(device, pool, g.blockBytes);
    assertEquals(pool.used, 0);
  }
  assertEquals([device.memory().pinnedBytes, device.memory().allocatedBytes], [0, 0]);
});

test("a pool is pinned ahead of those who take blocks, and no further than its limit", {
  timeout,
}, async () => {
  using device = open();
  using stream = device.stream();
  const g = geometry(32);
  using pool = new HostPool(device, g, 3000 * mib);
  const context = g.maxPages * g.blockBytes;
  while (pool.bytes < context) await new Promise((resolve) => setTimeout(resolve, 1));
  assertLessOrEqual(pool.bytes, context + 16 * mib);
  const all = pool.reserve(3 * g.maxPages, stream);
  await pool.whenReady(all);
  while (pool.bytes < 3 * context + 64 * mib) await new Promise((resolve) => setTimeout(resolve, 1));
  assertLessOrEqual(pool.bytes, 3 * context + 144 * mib);
  const again = pool.reserve(1, stream);
  assertEquals(pool.ready(again), true);
  pool.release(all);
  pool.release(again);
  assertEquals(pool.used, 0);
  // What was used before is used again, and so is pinned.
  const third = pool.reserve(3 * g.maxPages, stream);
  assertEquals(pool.ready(third), true);

  using little = new HostPool(device, g, 10 * g.blockBytes + 5);
  const ten = little.reserve(10, stream);
  little.awaitReady(ten);
  assertEquals([little.bytes, little.used, new Set(ten).size], [10 * g.blockBytes, 10, 10]);
  const error = await assertRejects(async () => little.reserve(1, stream), FreeKVError);
  assertMatch(error.message, /exhausted at 10 of 10 pages/);
});

test("a decode step's block does not wait for the growth that a prompt asked for", { timeout }, async () => {
  using device = open();
  using stream = device.stream();
  const g = geometry(32);
  const limit = 4000;
  using pool = new HostPool(device, g, limit * g.blockBytes);
  const first = pool.reserve(10, stream);
  await pool.whenReady(first);
  const prompt = pool.reserve(3000, stream);
  const steps = Array.from({ length: 60 }, () => pool.reserve(1, stream)[0] as number);
  // Blocks are pinned in the order of their ids.
  assertLess(Math.max(...steps), Math.min(...prompt));
  assertEquals(pool.ready(steps), true);
  // Where nothing else is left, a prompt takes all of it.
  assertEquals(pool.reserve(limit - pool.used, stream).length, limit - 3070);
});

test("where the system pins no more, a pool is as large as it is", { timeout, skip: twinOnly }, async () => {
  using device = open();
  using stream = device.stream();
  const g = geometryOf({
    ...{ layers: 32, heads: 32, kvHeads: 32, headDim: 256, pageSize: 64, dtype: "f32", maxContext: 4096 },
    ...{ layout: "hnd", hostLayout: "hnd" },
  }); // blocks of 128 MiB
  const most = Math.floor(device.memory().totalBytes / g.blockBytes);
  const pool = new HostPool(device, { ...g, digestBytes: 256 }, (most + 50) * g.blockBytes);
  const blocks = pool.reserve(most + 20, stream);
  const error = await assertRejects(() => pool.whenReady(blocks), FreeKVError);
  assertEquals(error.code, "OUT_OF_MEMORY");
  assertMatch(error.message, /pins no more host memory than \d[\d,]* pages: .*; lower --host-bytes/);
  pool.release(blocks);
  assertEquals(pool.used, 0);
  const fitting = Math.floor(pool.bytes / g.blockBytes);
  assertGreaterOrEqual(fitting, most - 1);
  const again = pool.reserve(fitting, stream);
  assertEquals(pool.ready(again), true);
  await assertRejects(async () => pool.reserve(1, stream), FreeKVError);
  pool[Symbol.dispose]();
  assertEquals(device.memory().pinnedBytes, 0);
});

// ---- the compute stream ----

test("a device has one compute stream, until the last who asked for it gives it back", { timeout }, () => {
  using device = open();
  using there = device.alloc(64);
  const first = device.computeStream();
  using second = device.computeStream();
  using other = device.stream();
  assertEquals([first.handle === second.handle, first.handle === other.handle], [true, false]);
  first.memset(there, 1);
  first[Symbol.dispose]();
  using seen = device.pinned(64);
  second.copy(seen, there);
  second.synchronize();
  assert(seen.view(Uint8Array).every((x) => x === 1));
});

test("two openings of a device: one captures its compute stream while the other uses its own", {
  timeout,
}, () => {
  using a = open();
  using b = open();
  const [ca, cb] = [a.computeStream(), b.computeStream()];
  using there = a.alloc(64);
  using here = b.alloc(64);
  using seenA = a.pinned(64);
  using seenB = b.pinned(64);
  using graph = ca.capture(() => {
    ca.memset(there, 5);
    cb.memset(here, 6);
    cb.copy(seenB, here);
    cb.synchronize();
    ca.copy(seenA, there);
  });
  assertEquals([seenA.view(Uint8Array)[0], seenB.view(Uint8Array)[63]], [0, 6]);
  cb.memset(here, 8);
  ca.launch(graph);
  ca.synchronize();
  assertEquals(seenA.view(Uint8Array)[63], 5);
  ca[Symbol.dispose]();
  cb.copy(seenB, here);
  cb.synchronize();
  assertEquals(seenB.view(Uint8Array)[0], 8);
  cb[Symbol.dispose]();
});

test("all openings of a GPU share its compute stream", {
  timeout,
  skip: onTwin ? "openings of the twin share nothing" : false,
}, () => {
  using a = open();
  using b = open();
  using ca = a.computeStream();
  using cb = b.computeStream();
  const bytes = 512 * mib;
  using there = a.alloc(bytes);
  using ended = a.event();
  for (let i = 0; i < 50; i++) ca.memset(there, i); // 10 ms and more
  ca.record(ended);
  assertEquals(ended.query(), false);
  cb.synchronize();
  assertEquals(ended.query(), true);
});
