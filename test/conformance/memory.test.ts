/// <reference lib="esnext.disposable" preserve="true" />
// Memory that JavaScript and C share without a copy.

import { test } from "node:test";
import { assert, assertEquals, assertNotEquals } from "@std/assert";
import { thrown } from "./shared.ts";
import { open } from "./target.ts";

const timeout = 30_000;

test("what JavaScript writes C reads, and what C writes JavaScript sees", { timeout }, () => {
  using device = open();
  using stream = device.stream();
  using there = device.alloc(4096);
  using from = device.pinned(4096);
  using to = device.pinned(4096);
  const [floats, bytes] = [from.view(Float64Array), to.view(Uint8Array)];
  assertEquals([floats.length, bytes.length], [512, 4096]);
  for (let i = 0; i < floats.length; i++) floats[i] = i + 1 / 3;
  const whole = to.view(BigUint64Array);
  stream.copy(there, from);
  stream.copy(to, there);
  stream.synchronize();
  assertEquals([...to.view(Float64Array)], [...floats]);
  assertNotEquals(whole[511], 0n);
  stream.memset(to.address + 1, 0xab, 2);
  stream.synchronize();
  assertEquals([...bytes.subarray(0, 4)], [0x55, 0xab, 0xab, 0x55]); // of 1/3 as a float64
  assertEquals(new DataView(to.buffer).getUint16(1), 0xabab);
});

test("windows of the same bytes are the same bytes", { timeout }, () => {
  using device = open();
  using host = device.pinned(8192);
  const [left, right] = [new Uint8Array(host.window(0, 5000)), new Uint8Array(host.window(4096, 4096))];
  left[4999] = 9;
  assertEquals(right[4999 - 4096], 9);
  assertEquals(host.window(4096, 4096), right.buffer);
  assertEquals(host.view(Uint8Array, 4999, 1)[0], 9);
});

test("a pool above 4 GiB is seen through windows", { timeout }, () => {
  const gib = 2 ** 30;
  using device = open();
  using stream = device.stream();
  using there = device.alloc(16);
  using host = device.pinned(5 * gib); // zero pages until they are touched
  thrown("BAD_ARGUMENT", () => host.buffer);
  thrown("BAD_ARGUMENT", () => host.window(0, 4 * gib + 1));
  thrown("BAD_ARGUMENT", () => host.window(4 * gib, gib + 1));
  const largest = new Uint8Array(host.window(gib, 4 * gib));
  assertEquals(largest.length, 2 ** 32);
  stream.write(there, new Uint8Array(16).fill(7));
  stream.copy(host.address + 5 * gib - 16, there, 16);
  stream.synchronize();
  assertEquals([largest[2 ** 32 - 17], largest[2 ** 32 - 16], largest[2 ** 32 - 1]], [0, 7, 7]);
  const last = host.view(Float32Array, 5 * gib - 8192);
  assertEquals(last.length, 2048);
  last[0] = 2.5;
  const across = new DataView(host.window(5 * gib - 8192 - 3, 4096));
  assertEquals(across.getFloat32(3, true), 2.5);
});

test("views are empty once their memory is given back", { timeout }, () => {
  using device = open();
  const host = device.pinned(4096);
  const [view, window, buffer] = [host.view(Int32Array), host.window(64, 128), host.buffer];
  view[0] = 1;
  host[Symbol.dispose]();
  assertEquals([view.length, window.byteLength, buffer.byteLength], [0, 0, 0]);
  assertEquals(view[0], undefined);
  for (const use of [() => host.address, () => host.buffer, () => host.view(Uint8Array)])
    thrown("DISPOSED", use);
  host[Symbol.dispose]();

  const another = open();
  const late = another.pinned(4096).view(Uint8Array);
  assertEquals(late.length, 4096);
  another[Symbol.dispose]();
  assertEquals(late.length, 0);
});

test("a view that was transferred keeps nothing from being given back", { timeout }, () => {
  // Node copies what is transferred; elsewhere the view is empty from then on.
  const transfer = (buffer: ArrayBuffer): ArrayBuffer => {
    try {
      return structuredClone(buffer, { transfer: [buffer] });
    } catch {
      return buffer;
    }
  };
  using device = open();
  const host = device.pinned(4096);
  transfer(host.buffer);
  assertEquals(host.buffer.byteLength, 4096);
  const view = host.view(Uint8Array);
  transfer(host.window(64, 64));
  host[Symbol.dispose]();
  assertEquals([view.length, device.memory().pinnedBytes], [0, 0]);
  thrown("DISPOSED", () => host.address);

  const another = open();
  const [one, other] = [another.pinned(4096), another.pinned(4096)];
  const late = other.view(Uint8Array);
  transfer(one.buffer);
  another[Symbol.dispose]();
  assertEquals(late.length, 0);
  for (const use of [() => other.address, () => another.info()]) thrown("DISPOSED", use);
});

test("views outlive the collection of others", { timeout }, async () => {
  using device = open();
  using host = device.pinned(2 ** 20);
  const kept = host.view(Uint8Array);
  kept.fill(5);
  for (let i = 0; i < 200; i++) {
    using other = device.pinned(2 ** 20);
    other.view(Uint8Array)[i] = 1;
    if (i % 50 === 0) await new Promise((resolve) => setTimeout(resolve, 1));
  }
  assert(kept.every((byte) => byte === 5));
  assertEquals(device.memory().pinnedBytes, 2 ** 20);
});
