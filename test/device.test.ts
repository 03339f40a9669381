/// <reference lib="esnext.disposable" preserve="true" />
// The device objects: memory, order, lifetimes, and what errors say.

import { test } from "node:test";
import {
  assert,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertMatch,
  assertThrows,
} from "@std/assert";
import { type Device, type DeviceOptions, Event, FreeKVError, type Stream } from "../lib/device.ts";
import { type ErrorCode, exitCode, httpStatus } from "../lib/errors.ts";
import { onTwin, openTarget, seeds, twinOnly } from "./target.ts";

const open = (options: DeviceOptions = {}): Device => openTarget({ debug: true, ...options });

/** What `fn` throws, which must be a FreeKVError of this code. */
function thrown(code: ErrorCode, fn: () => unknown): FreeKVError {
  const error = assertThrows(fn, FreeKVError);
  assertEquals(error.code, code, error.message);
  return error;
}

test("bytes go to the device and back through pinned memory", () => {
  using device = open();
  using stream = device.stream();
  using there = device.alloc(4096);
  using host = device.pinned(4096);
  assertEquals([there.address % 256, host.address % 4096], [0, 0]);
  const view = host.view(Float32Array);
  assertEquals(view.length, 1024);
  assert(
    view.every((x) => x === 0),
    "pinned memory is zeroed",
  );
  for (let i = 0; i < view.length; i++) view[i] = i + 0.5;
  stream.copy(there, host);
  stream.synchronize();
  view.fill(-1);
  stream.write(there.address + 8, new Float32Array([7, 8]));
  stream.memset(there.address + 16, 0, 4);
  stream.copy(host, there);
  stream.synchronize();
  assertEquals([...view.subarray(0, 6)], [0.5, 1.5, 7, 8, 0, 5.5]);
  assertEquals(view[1023], 1023.5);
});

test("a 2-D copy keeps its pitches", () => {
  using device = open();
  using stream = device.stream();
  using there = device.alloc(64);
  using host = device.pinned(128);
  host.view(Uint8Array).set(Array.from({ length: 64 }, (_, i) => i));
  stream.memset(there, 255);
  stream.copy2d(there, 16, host, 8, 4, 3); // three rows of four bytes: from every 8th byte to every 16th
  stream.copy(host.address + 64, there, 64);
  stream.synchronize();
  const rows = [0, 1, 2].map((row) => [...host.view(Uint8Array, 64 + row * 16, 5)]);
  assertEquals(rows, [
    [0, 1, 2, 3, 255],
    [8, 9, 10, 11, 255],
    [16, 17, 18, 19, 255],
  ]);
});

test("JavaScript memory is taken at the call", () => {
  using device = open();
  using stream = device.stream();
  using there = device.alloc(16);
  using host = device.pinned(16);
  const bytes = new Uint8Array(16).fill(5);
  stream.copy(there, bytes);
  bytes.fill(9);
  stream.copy(host, there);
  stream.synchronize();
  assertEquals([...host.view(Uint8Array)], new Array(16).fill(5));
});

test("an event orders two streams, in every schedule", () => {
  for (const scheduleSeed of seeds(20)) {
    using device = open({ scheduleSeed });
    using first = device.stream();
    using second = device.stream();
    using event = device.event();
    using there = device.alloc(4);
    using host = device.pinned(4);
    first.memset(there, 1);
    first.record(event);
    second.wait(event);
    second.copy(host, there);
    second.synchronize();
    assertEquals(host.view(Uint8Array)[0], 1, `seed ${scheduleSeed}`);
  }
});

test("events tell when work is done, and how long it took", () => {
  using device = open({ linkBytesPerSecond: 100e6 });
  using stream = device.stream();
  using start = device.event();
  using end = device.event();
  using there = device.alloc(1 << 20);
  using host = device.pinned(1 << 20);
  stream.record(start);
  stream.copy(there, host);
  stream.record(end);
  end.synchronize();
  assert(start.query() && end.query() && end.wait(0));
  assertGreater(Event.elapsedMs(start, end), onTwin ? 5 : 0.01); // 1 MiB over a link of 100 MB/s is 10.5 ms
});

test("waiting for an event leaves the event loop its turns", {
  timeout: 10_000,
  skip: twinOnly,
}, async () => {
  using device = open({ linkBytesPerSecond: 50e6 });
  using stream = device.stream();
  using event = device.event();
  using there = device.alloc(2 << 20);
  using host = device.pinned(2 << 20);
  let ticks = 0;
  const timer = setInterval(() => ticks++, 1);
  stream.copy(there, host); // 40 ms
  stream.record(event);
  assert(!event.query(), "the copy is still on its way");
  await event.done();
  clearInterval(timer);
  assert(event.query());
  assertGreaterOrEqual(ticks, 5);
});

test("a graph replays what was captured, on what its memory holds then", () => {
  using device = open();
  using stream = device.stream();
  using there = device.alloc(4);
  using host = device.pinned(8);
  const view = host.view(Uint8Array);
  using graph = stream.capture(() => {
    stream.copy(there, host.address, 4);
    stream.copy(host.address + 4, there, 4);
  });
  stream.synchronize();
  for (const value of [3, 4]) {
    view.fill(value, 0, 4);
    assertEquals(view[4], value === 3 ? 0 : 3, "capture itself runs nothing");
    stream.launch(graph);
    stream.synchronize();
    assertEquals(view[4], value);
  }
});

test("a capture that throws leaves the stream usable", () => {
  using device = open();
  using stream = device.stream();
  using host = device.pinned(4);
  const boom = new Error("boom");
  const capture = (): unknown =>
    stream.capture(() => {
      stream.memset(host, 1);
      throw boom;
    });
  assertEquals(assertThrows(capture), boom);
  thrown("BAD_ARGUMENT", () => stream.capture(async () => {}));
  stream.memset(host, 2);
  stream.synchronize();
  assertEquals(host.view(Uint8Array)[0], 2);
});

test("what CUDA refuses during capture is refused, and says what to do", () => {
  using device = open();
  using stream = device.stream();
  const error = thrown("BAD_ARGUMENT", () => stream.capture(() => stream.synchronize()));
  assertEquals([error.call, error.detail.status], ["fkv_stream_synchronize_sync", "CAPTURE"]);
  assertMatch(error.message, /outside the capture/);
  stream.synchronize();
});

test("an event that was never recorded is an error, not a no-op", () => {
  using device = open();
  using stream = device.stream();
  using event = device.event();
  const uses: [string, () => unknown][] = [
    ["fkv_stream_wait_event", () => stream.wait(event)],
    ["fkv_event_query", () => event.query()],
    ["fkv_event_wait_sync", () => event.wait(1)],
    ["fkv_event_elapsed_ms", () => Event.elapsedMs(event, event)],
  ];
  for (const [call, use] of uses) {
    const error = thrown("BAD_ARGUMENT", use);
    assertEquals([error.call, error.detail.status], [call, "NOT_RECORDED"]);
    assertMatch(error.message, /call stream\.record\(event\) first/);
    assertGreater(String(error.detail.text).length, 0);
  }
});

test("dispose is idempotent, and a disposed object used again is a typed error", () => {
  using device = open();
  const [stream, other, event] = [device.stream(), device.stream(), device.event()];
  const [there, host] = [device.alloc(16), device.pinned(16)];
  const graph = stream.capture(() => stream.memset(there, 0));
  const view = host.view(Uint8Array);
  const uses: [Disposable, () => unknown][] = [
    [graph, () => stream.launch(graph)],
    [event, () => event.query()],
    [there, () => other.memset(there, 0, 1)],
    [host, () => host.buffer],
    [stream, () => stream.synchronize()],
  ];
  for (const [object, use] of uses) {
    object[Symbol.dispose]();
    object[Symbol.dispose]();
    thrown("DISPOSED", use);
  }
  assertEquals(view.length, 0); // detached: it no longer reads freed memory
  other.synchronize();
});

test("a device's children are invalid with it", () => {
  const device = open();
  const [stream, event, there, host] = [device.stream(), device.event(), device.alloc(16), device.pinned(16)];
  const view = host.view(Uint8Array);
  stream.copy(there, host);
  stream.record(event);
  device[Symbol.dispose]();
  device[Symbol.dispose]();
  const uses = [
    () => stream.synchronize(),
    () => event.query(),
    () => there.address,
    () => host.buffer,
    () => device.lib,
    () => device.stream(),
    () => device.alloc(1),
    () => device.call("fkv_device_synchronize_sync", 4096),
  ];
  for (const use of uses) thrown("DISPOSED", use);
  assertEquals(view.length, 0);
  for (const child of [stream, event, there, host]) child[Symbol.dispose]();
});

test("a child that fails keeps neither the others nor the device open", () => {
  const device = open();
  const boom = new Error("boom");
  const child = {
    invalidate() {
      throw boom;
    },
  };
  device.context.adopt(child as unknown as Stream);
  const host = device.pinned(16); // after it
  const view = host.view(Uint8Array);
  assertEquals(
    assertThrows(() => device[Symbol.dispose]()),
    boom,
  );
  assertEquals(view.length, 0);
  assertThrows(() => host.address, FreeKVError);
  assertThrows(() => device.info(), FreeKVError);
  device[Symbol.dispose]();
});

test("a child outlives the last reference to its device", () => {
  const make = (): Stream => open().stream();
  const stream = make();
  (globalThis as { Bun?: { gc(force: boolean): void } }).Bun?.gc(true);
  stream.synchronize();
  stream[Symbol.dispose]();
  thrown("DISPOSED", () => stream.handle);
});

test("the device counts its memory, and gives it back", () => {
  using device = open({ threads: 1 });
  const before = device.memory();
  {
    using _there = device.alloc(1 << 20);
    using _host = device.pinned(1 << 16);
    const { allocatedBytes, pinnedBytes } = device.memory();
    assertEquals(
      [allocatedBytes - before.allocatedBytes, pinnedBytes - before.pinnedBytes],
      [1 << 20, 1 << 16],
    );
  }
  assertEquals(device.memory().allocatedBytes, before.allocatedBytes);
  const { model, computeCapability, multiprocessors, totalBytes } = device.info();
  if (onTwin) assertEquals([computeCapability, multiprocessors], [null, 1]);
  else assertMatch(String(computeCapability), /^([89]|1\d)\.\d$/);
  assertGreater(model.length, 0);
  assertGreater(totalBytes, 1 << 20);
});

test("too much memory is OUT_OF_MEMORY", () => {
  using device = open();
  const error = thrown("OUT_OF_MEMORY", () => device.alloc(2 ** 52));
  assertEquals([error.call, exitCode(error), httpStatus(error)], ["fkv_device_alloc", 3, 503]);
});

test("a pinned buffer's views stay inside it", () => {
  using device = open();
  using host = device.pinned(64);
  assertEquals(host.view(Int32Array, 8).length, 14);
  assertEquals(host.window(16, 48).byteLength, 48);
  assertEquals(host.buffer, host.buffer);
  const uses = [
    () => host.view(Int32Array, 2),
    () => host.view(Int32Array, 0, 17),
    () => host.view(Int32Array, 68),
    () => host.window(60, 5),
    () => host.window(-1, 4),
    () => device.pinned(0),
    () => device.alloc(1.5),
  ];
  for (const use of uses) thrown("BAD_ARGUMENT", use);
});

test("a copy larger than either side is refused", () => {
  using device = open();
  using stream = device.stream();
  using small = device.alloc(16);
  using large = device.alloc(32);
  const uses = [
    () => stream.copy(small, large),
    () => stream.copy(large, small, 17),
    () => stream.copy(small.address, large.address),
    () => stream.copy2d(small, 8, large, 8, 8, 3),
    () => stream.memset(small, 0, 17),
    () => stream.write(small, new Uint8Array(17)),
  ];
  for (const use of uses) thrown("BAD_ARGUMENT", use);
  stream.copy(small, large, 16);
  stream.synchronize();
});
