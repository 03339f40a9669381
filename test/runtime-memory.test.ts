/// <reference lib="esnext.disposable" preserve="true" />
// The twin's memory and its simulated link: which memory is which, how far it goes, what a transfer takes.

import { test } from "node:test";
import { assert, assertEquals, assertGreaterOrEqual, assertLess, assertMatch } from "@std/assert";
import { open, quickest, refused, timeout } from "./runtime.ts";
import { onTwin, twinOnly } from "./target.ts";

// ---- memory ----

test("device memory starts as NaN, and its bytes are counted until they are freed", { timeout }, () => {
  using device = open();
  using stream = device.stream();
  using host = device.pinned(1000);
  const start = device.memory();
  const there = device.alloc(1000);
  assertEquals(there.address % 256, 0);
  stream.copy(host, there);
  stream.synchronize();
  assert(host.view(Uint8Array).every((x) => x === 0xff));
  assertEquals(device.memory().allocatedBytes - start.allocatedBytes, 1000);
  if (onTwin) assertEquals(start.freeBytes - device.memory().freeBytes, 1000);
  const { address } = there;
  there[Symbol.dispose]();
  assertEquals(device.memory().allocatedBytes, start.allocatedBytes);
  assertMatch(
    refused("BAD_ARGUMENT", () => stream.copy(host, address, 8)),
    /freed/,
  );
  assertMatch(
    refused("BAD_ARGUMENT", () => device.call("fkv_device_free", address, device.handle)),
    /given back/,
  );
  assertMatch(
    refused("BAD_ARGUMENT", () => device.call("fkv_device_free", host.address, device.handle)),
    /fkv_device_alloc/,
  );
});

test("freed memory is used again, and neighbours keep theirs", { timeout }, () => {
  using device = open();
  using stream = device.stream();
  const sizes = [5000, 300, 70_000, 4096, 1];
  for (let round = 0; round < 20; round++) {
    const buffers = sizes.map((bytes) => device.alloc(bytes));
    buffers.forEach((buffer, i) => {
      stream.memset(buffer, i);
    });
    for (const i of [3, 1]) buffers[i]?.[Symbol.dispose]();
    using again = device.alloc(300);
    using host = device.pinned(70_000);
    stream.memset(again, 99);
    for (const i of [0, 2, 4]) {
      const buffer = buffers[i];
      assert(buffer !== undefined);
      stream.copy(host, buffer);
      stream.synchronize();
      const bytes = host.view(Uint8Array, 0, buffer.bytes);
      assert(
        bytes.every((x) => x === i),
        `buffer ${i}`,
      );
      buffer[Symbol.dispose]();
    }
  }
  assertEquals(device.memory().allocatedBytes, 0);
});

test("freeing waits for the work that uses the memory", { timeout }, () => {
  for (const scheduleSeed of [0, 5]) {
    using device = open({ scheduleSeed, linkBytesPerSecond: 100e6 });
    using stream = device.stream();
    using host = device.pinned(1_000_000);
    const there = device.alloc(1_000_000);
    stream.memset(there, 4);
    stream.copy(host, there); // 10 ms
    there[Symbol.dispose]();
    assertEquals(host.view(Uint8Array)[999_999], 4);
  }
});

test("what runs past an allocation is refused with how far", { timeout }, () => {
  using device = open();
  using stream = device.stream();
  using there = device.alloc(100);
  using host = device.pinned(100);
  const past = (fn: () => void): void =>
    assertMatch(refused("BAD_ARGUMENT", fn), /run 1 past the end of a \w+ allocation/);
  past(() => stream.copy(there.address, host.address + 1, 100));
  past(() => stream.copy(host.address + 1, there.address, 100));
  past(() => stream.copy2d(there.address, 41, host.address, 20, 19, 3));
  past(() => stream.memset(there.address + 1, 0, 100));
  past(() => stream.write(there.address + 93, new Uint8Array(8)));
  assertMatch(
    refused("BAD_ARGUMENT", () => stream.copy2d(there, 4, host, 8, 8, 2)),
    /dst_pitch/,
  );
  assertMatch(
    refused("BAD_ARGUMENT", () => stream.copy(there.address, there.address + 10, 20)),
    /overlap/,
  );
  assertMatch(
    refused("BAD_ARGUMENT", () => stream.write(there.address, new Uint8Array(3073))),
    /3072/,
  );
  assertMatch(
    refused("BAD_ARGUMENT", () => stream.write(host, new Uint8Array(3))),
    /not device memory/,
  );
});

test("pageable memory: read at the call, never written, pinned by registration", {
  timeout,
  skip: twinOnly,
}, () => {
  using elsewhere = open(); // what another device pinned is ordinary memory to this one, with an address
  using memory = elsewhere.pinned(4096);
  using device = open();
  using stream = device.stream();
  using there = device.alloc(4096);
  const bytes = memory.view(Uint8Array).fill(1);
  const register = (n: number): void => device.call("fkv_host_register", memory.address, n, device.handle);
  stream.copy(there, memory.address, 4096);
  bytes.fill(2);
  assertMatch(
    refused("BAD_ARGUMENT", () => stream.copy(memory.address, there)),
    /fkv_host_register/,
  );
  register(4096);
  assertEquals(device.memory().pinnedBytes, 4096);
  assertMatch(
    refused("BAD_ARGUMENT", () => register(1)),
    /pinned already/,
  );
  stream.copy(memory.address, there);
  stream.synchronize();
  assert(bytes.every((x) => x === 1));
  device.call("fkv_host_unregister", memory.address, device.handle);
  assertEquals(device.memory().pinnedBytes, 0);
  refused("BAD_ARGUMENT", () => stream.copy(memory.address, there));
  refused("BAD_ARGUMENT", () => device.call("fkv_host_unregister", memory.address, device.handle));
});

// ---- the simulated link ----

test("the link takes bytes / rate, shares a way, and has two of them", { timeout, skip: twinOnly }, () => {
  const bytes = 25_000_000;
  using device = open({ linkBytesPerSecond: 1e9 });
  using first = device.stream();
  using second = device.stream();
  using there = device.alloc(2 * bytes);
  using host = device.pinned(2 * bytes);
  first.memset(host, 1); // touched, so that page faults are not timed
  first.synchronize();
  const [far, near] = [there.address + bytes, host.address + bytes];
  const timed = (issue: () => void): number =>
    quickest(() => {
      issue();
      device.synchronize();
    });
  const down = timed(() => first.copy(there, host.address, bytes));
  assertGreaterOrEqual(down, 25);
  assertLess(down, 40); // a busy machine wakes the copying thread late
  const up = timed(() => first.copy(host, there.address, bytes));
  assertGreaterOrEqual(up, 25);
  assertLess(up, 40);
  const both = timed(() => {
    first.copy(there, host.address, bytes);
    second.copy(near, far, bytes);
  });
  assertGreaterOrEqual(both, 25);
  assertLess(both, 45);
  const shared = timed(() => {
    first.copy(there, host.address, bytes);
    second.copy(far, near, bytes);
  });
  assertGreaterOrEqual(shared, 50);
  assertLess(shared, 75);
  const inside = timed(() => first.copy(there, far, bytes));
  assertLess(inside, 20);
  assertMatch(device.info().model, /simulated link of 1 GB\/s/);
});

test("the device's clock adds up what lies between start and stop", { timeout }, () => {
  using device = open({ linkBytesPerSecond: 1e9 });
  using stream = device.stream();
  using there = device.alloc(5_000_000);
  using host = device.pinned(5_000_000);
  using clock = device.pinned(16);
  const [mark, total] = [clock.address, clock.address + 8];
  using graph = stream.capture(() => {
    device.call("fkv_clock_start", mark, stream.handle);
    stream.copy(there, host);
    device.call("fkv_clock_stop", total, mark, stream.handle);
  });
  const totals = [1, 2].map(() => {
    stream.launch(graph);
    stream.synchronize();
    return Number(clock.view(BigUint64Array)[1]) / 1e6;
  });
  const least = onTwin ? 5 : 0.05; // milliseconds that 5 MB take
  assertGreaterOrEqual(totals[0] ?? 0, least);
  assertGreaterOrEqual((totals[1] ?? 0) - (totals[0] ?? 0), least);
  assertLess(totals[1] ?? 0, 1000);
  assertMatch(
    refused("BAD_ARGUMENT", () => device.call("fkv_clock_start", mark + 4, stream.handle)),
    /8-byte aligned/,
  );
});
