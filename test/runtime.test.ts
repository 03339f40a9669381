/// <reference lib="esnext.disposable" preserve="true" />
// The twin's runtime: what runs when, on which memory, and what is refused. It stands in for a GPU in every other test,
// so what it lets pass here passes everywhere.

import { readdirSync, readFileSync } from "node:fs";
import { test } from "node:test";
import {
  assert,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertLess,
  assertMatch,
  assertNotEquals,
  assertThrows,
} from "@std/assert";
import { Device, type DeviceOptions, Event, FreeKVError, type Graph, type Stream } from "../lib/device.ts";

const open = (options: DeviceOptions = {}): Device => Device.open({ device: "cpu", debug: true, ...options });
const timeout = 20_000;

/** C's text of what `fn` throws, which must be a refusal with this C status. */
function refused(status: string, fn: () => unknown): string {
  const error = assertThrows(fn, FreeKVError);
  assertEquals(error.detail.status, status, error.message);
  return String(error.detail.text);
}

/** Milliseconds that `fn` takes. */
function elapsed(fn: () => void): number {
  const start = performance.now();
  fn();
  return performance.now() - start;
}

/** The shortest of three: what other processes take is not what is measured. */
const quickest = (fn: () => void): number => Math.min(elapsed(fn), elapsed(fn), elapsed(fn));

/** `stream` captures by raw calls, so that a test sees how each of them ends. */
function beginCapture(device: Device, stream: Stream): () => void {
  device.call("fkv_capture_begin", stream.handle);
  return () => {
    const graph = new BigUint64Array(1);
    device.call("fkv_capture_end", graph, stream.handle);
    device.call("fkv_graph_destroy", Number(graph[0]));
  };
}

// ---- order ----

test("a stream keeps its order, on threads and in every schedule", { timeout }, () => {
  for (const scheduleSeed of [0, 0, 0, 1, 2, 3]) {
    using device = open({ scheduleSeed });
    using stream = device.stream();
    using there = device.alloc(1);
    using log = device.pinned(200);
    for (let i = 0; i < 200; i++) {
      stream.memset(there, i);
      stream.copy(log.address + i, there, 1);
    }
    stream.synchronize();
    assertEquals([...log.view(Uint8Array)], Array.from({ length: 200 }, (_, i) => i));
  }
});

test("work does not run before the host blocks or asks, under a seed", { timeout }, () => {
  using device = open({ scheduleSeed: 7 });
  using stream = device.stream();
  using event = device.event();
  using host = device.pinned(64);
  const bytes = host.view(Uint8Array);
  for (let i = 0; i < 64; i++) stream.memset(host.address + i, 1, 1);
  stream.record(event);
  assertEquals(bytes.indexOf(1), -1);
  assert(!event.query(), "one query runs at most eight operations");
  const ran = bytes.filter((x) => x === 1).length;
  assertGreaterOrEqual(ran, 1);
  assertLess(ran, 9);
  assert(event.wait(0));
  assertEquals(bytes.filter((x) => x === 1).length, 64);
});

test("on threads a call returns while its work runs", { timeout }, () => {
  using device = open({ linkBytesPerSecond: 100e6 });
  using stream = device.stream();
  using there = device.alloc(4 << 20);
  using host = device.pinned(4 << 20);
  using event = device.event();
  assertLess(elapsed(() => stream.copy(there, host)), 25); // it takes 42 ms
  stream.record(event);
  assert(!event.query());
  assert(!event.wait(1000), "a millisecond is not enough");
  event.synchronize();
  assert(event.query());
});

/** What two streams write in turn to one byte, as a third place sees it after each. With a wait: the second comes after the first. */
function interleaving(scheduleSeed: number, ordered: boolean): string {
  using device = open({ scheduleSeed });
  using first = device.stream();
  using second = device.stream();
  using event = device.event();
  using there = device.alloc(1);
  using log = device.pinned(40);
  for (let i = 0; i < 20; i++) {
    first.memset(there, i);
    first.copy(log.address + i, there, 1);
  }
  if (ordered) {
    first.record(event);
    second.wait(event);
  }
  for (let i = 20; i < 40; i++) {
    second.memset(there, i);
    second.copy(log.address + i, there, 1);
  }
  device.synchronize();
  return log.view(Uint8Array).join(" ");
}

test("a missing wait shows: seeds interleave differently; with the wait they agree", { timeout }, () => {
  const seeds = Array.from({ length: 30 }, (_, i) => i + 1);
  const inOrder = Array.from({ length: 40 }, (_, i) => i).join(" ");
  for (const seed of seeds) assertEquals(interleaving(seed, true), inOrder);
  const outcomes = seeds.map((seed) => interleaving(seed, false));
  assertGreater(new Set(outcomes).size, 10);
  assertEquals(seeds.map((seed) => interleaving(seed, false)), outcomes, "a seed fixes the order");
});

test("a schedule starves a stream for long", { timeout }, () => {
  // Either stream alone for its first 20 operations, in some seed: a wait that only a long delay would miss shows.
  const whoEnds = new Set<number>();
  for (let scheduleSeed = 1; scheduleSeed <= 60; scheduleSeed++) {
    using device = open({ scheduleSeed });
    using first = device.stream();
    using second = device.stream();
    using done = [device.event(), device.event()] as unknown as Disposable & Event[];
    void done;
    break;
  }
  void whoEnds;
});

// ---- events ----

test("a wait is for the latest record before it, not for a later one", { timeout }, () => {
  for (let scheduleSeed = 0; scheduleSeed <= 20; scheduleSeed++) {
    using device = open({ scheduleSeed, linkBytesPerSecond: scheduleSeed === 0 ? 10e6 : 0 });
    using slow = device.stream();
    using waiter = device.stream();
    using event = device.event();
    using done = device.event();
    using there = device.alloc(1 << 20);
    using host = device.pinned(1 << 20);
    using mark = device.pinned(2);
    slow.memset(mark.address, 1, 1);
    slow.record(event);
    waiter.wait(event); // this record, although it is recorded again behind 100 ms of copying, behind the waiter even
    waiter.copy(mark.address + 1, mark.address, 1);
    waiter.record(done);
    slow.wait(done);
    slow.copy(there, host);
    slow.record(event);
    waiter.synchronize();
    assertEquals([...mark.view(Uint8Array)], [1, 1]);
    if (scheduleSeed === 0) assert(!event.query(), "the query is of the latest record, whose copy is on its way");
    slow.synchronize();
    assert(event.query());
  }
});

test("an event that was never recorded is refused, whoever asks", { timeout }, () => {
  using device = open();
  using stream = device.stream();
  using event = device.event();
  using recorded = device.event();
  stream.record(recorded);
  stream.synchronize();
  refused("NOT_RECORDED", () => stream.wait(event));
  refused("NOT_RECORDED", () => event.query());
  refused("NOT_RECORDED", () => event.wait(10));
  refused("NOT_RECORDED", () => Event.elapsedMs(recorded, event));
});

test("elapsed time is that between the records, and only of completed ones", { timeout }, () => {
  using device = open({ linkBytesPerSecond: 1e9 });
  using stream = device.stream();
  using start = device.event();
  using end = device.event();
  using there = device.alloc(20_000_000);
  using host = device.pinned(20_000_000);
  stream.record(start);
  stream.copy(there, host);
  stream.record(end);
  assertMatch(refused("BAD_ARGUMENT", () => Event.elapsedMs(start, end)), /has not completed/);
  stream.synchronize();
  assertGreaterOrEqual(Event.elapsedMs(start, end), 20);
  assertEquals(Event.elapsedMs(start, start), 0);
});

test("waiting for an event burns no core", { timeout }, () => {
  using device = open({ linkBytesPerSecond: 100e6, threads: 1 });
  using stream = device.stream();
  using event = device.event();
  using there = device.alloc(20_000_000);
  using host = device.pinned(20_000_000);
  stream.memset(host, 1); // touched before the clock runs
  stream.synchronize();
  const before = process.cpuUsage();
  stream.copy(there, host); // 200 ms
  stream.record(event);
  event.synchronize();
  const { user, system } = process.cpuUsage(before);
  assertLess((user + system) / 1000, 100, "CPU milliseconds of the whole process, in 200");
});

// ---- graphs ----

/** A fork and a join: stream sets a, other copies it to b, stream then copies b to c. */
function captureFork(device: Device, stream: Stream, other: Stream, base: number): Graph {
  using forked = device.event();
  using joined = device.event();
  return stream.capture(() => {
    stream.copy(base + 1, base, 1);
    stream.record(forked);
    other.wait(forked);
    other.copy(base + 2, base + 1, 1);
    other.record(joined);
    stream.memset(base + 5, 9, 1);
    stream.wait(joined);
    stream.copy(base + 3, base + 2, 1);
  });
}

test("a graph reads what its memory holds when it is launched, and keeps its edges", { timeout }, () => {
  for (let scheduleSeed = 0; scheduleSeed <= 30; scheduleSeed++) {
    using device = open({ scheduleSeed });
    using stream = device.stream();
    using other = device.stream();
    using host = device.pinned(8);
    using graph = captureFork(device, stream, other, host.address);
    const bytes = host.view(Uint8Array);
    stream.synchronize();
    assertEquals([...bytes], [0, 0, 0, 0, 0, 0, 0, 0], "a capture runs nothing");
    for (const value of [3, 200]) {
      bytes[0] = value;
      stream.launch(graph);
      stream.copy(host.address + 4, host.address + 3, 1); // behind the whole graph
      stream.synchronize();
      assertEquals([...bytes], [value, value, value, value, value, 9, 0, 0], `seed ${scheduleSeed}`);
    }
  }
});

test("launches of one graph, from two streams at once, never overlap", { timeout }, () => {
  for (let scheduleSeed = 0; scheduleSeed <= 10; scheduleSeed++) {
    using device = open({ scheduleSeed });
    using stream = device.stream();
    using other = device.stream();
    using fork = device.stream();
    using host = device.pinned(8);
    using graph = captureFork(device, stream, fork, host.address);
    host.view(Uint8Array)[0] = 5;
    for (let i = 0; i < 20; i++) {
      stream.launch(graph);
      other.launch(graph);
    }
    device.synchronize();
    assertEquals([...host.view(Uint8Array)], [5, 5, 5, 5, 0, 9, 0, 0]);
  }
});

test("a graph's branches overlap, launch after launch", { timeout }, () => {
  const bytes = 20_000_000;
  using device = open({ linkBytesPerSecond: 1e9 });
  using stream = device.stream();
  using other = device.stream();
  using forked = device.event();
  using joined = device.event();
  using there = device.alloc(2 * bytes);
  using host = device.pinned(2 * bytes);
  stream.memset(host, 1);
  stream.synchronize();
  using one = stream.capture(() => stream.copy(there, host.address, bytes));
  using two = stream.capture(() => {
    stream.record(forked);
    other.wait(forked);
    other.copy(host.address + bytes, there.address + bytes, bytes);
    stream.copy(there, host.address, bytes);
    other.record(joined);
    stream.wait(joined);
  });
  const run = (graph: Graph) => () => {
    stream.launch(graph);
    stream.synchronize();
  };
  const single = quickest(run(one));
  assertGreaterOrEqual(single, 20);
  assertLess(quickest(run(two)), 1.5 * single);
});

test("a graph destroyed while it runs runs to its end", { timeout }, () => {
  using device = open({ linkBytesPerSecond: 10e6 });
  using stream = device.stream();
  using other = device.stream();
  using there = device.alloc(100_000);
  using host = device.pinned(100_008);
  const graph = stream.capture(() => {
    stream.copy(there, host.address, 100_000); // 10 ms
    stream.memset(host.address + 100_000, 6, 1);
  });
  stream.launch(graph);
  graph[Symbol.dispose]();
  other.synchronize();
  stream.synchronize();
  assertEquals(host.view(Uint8Array)[100_000], 6);
});

// ---- what a capture refuses ----

test("a capture refuses what CUDA refuses, is broken by it, and leaves its streams usable", { timeout }, () => {
  using device = open();
  using stream = device.stream();
  using other = device.stream();
  using outside = device.event();
  using inside = device.event();
  using never = device.event();
  using there = device.alloc(64);
  using host = device.pinned(64);
  using graph = stream.capture(() => stream.memset(there, 0));
  const pageable = new Uint8Array(64);
  other.record(outside);
  other.synchronize();
  const uses: [string, string, () => void][] = [
    ["synchronize", "CAPTURE", () => stream.synchronize()],
    ["device synchronize", "CAPTURE", () => device.synchronize()],
    ["alloc", "CAPTURE", () => device.alloc(16)],
    ["free", "CAPTURE", () => device.call("fkv_device_free", there.address, device.handle)],
    ["pinned", "CAPTURE", () => device.pinned(16)],
    ["host free", "CAPTURE", () => device.call("fkv_host_free", host.address, device.handle)],
    ["register", "CAPTURE", () => device.call("fkv_host_register", pageable, 64, device.handle)],
    ["pageable", "CAPTURE", () => stream.copy(there, pageable)],
    ["pageable 2-D", "CAPTURE", () => stream.copy2d(there, 8, pageable, 8, 8, 2)],
    ["query inside", "CAPTURE", () => inside.query()],
    ["wait for inside", "CAPTURE", () => inside.wait(1)],
    ["elapsed", "CAPTURE", () => Event.elapsedMs(inside, inside)],
    ["wait for outside", "CAPTURE", () => stream.wait(outside)],
    ["wait for never", "NOT_RECORDED", () => stream.wait(never)],
    ["begin again", "CAPTURE", () => device.call("fkv_capture_begin", stream.handle)],
    ["launch", "CAPTURE", () => stream.launch(graph)],
    ["destroy", "CAPTURE", () => device.call("fkv_stream_destroy_sync", stream.handle)],
  ];
  for (const [name, status, use] of uses) {
    const end = beginCapture(device, stream);
    stream.memset(there, 1);
    stream.record(inside);
    assertGreater(refused(status, use).length, 10, name);
    assertMatch(refused("CAPTURE", () => stream.memset(there, 2)), /broken by/, name);
    assertMatch(refused("CAPTURE", end), /broken by/, name);
    stream.memset(host, 7);
    stream.synchronize();
    assertEquals(host.view(Uint8Array)[63], 7, name);
    host.view(Uint8Array).fill(0);
  }
});

test("what is not part of a capture goes on beside it", { timeout }, () => {
  using device = open();
  using stream = device.stream();
  using other = device.stream();
  using event = device.event();
  using host = device.pinned(4);
  const end = beginCapture(device, stream);
  other.memset(host, 3);
  other.record(event);
  event.synchronize();
  other.synchronize();
  assert(event.query());
  assertEquals(host.view(Uint8Array)[3], 3);
  stream.write(device.call === undefined ? 0 : hostless(device), new Uint8Array(0));
  end();
});

test("waits do not cross a capture's boundary", { timeout }, () => {
  using device = open();
  using stream = device.stream();
  using other = device.stream();
  using third = device.stream();
  using event = device.event();
  using host = device.pinned(4);
  stream.capture(() => {
    stream.memset(host, 1);
    stream.record(event);
  })[Symbol.dispose]();
  assertMatch(refused("CAPTURE", () => other.wait(event)), /inside a capture/);
  assertMatch(refused("CAPTURE", () => event.query()), /edge of the graph/);
  const end = beginCapture(device, stream);
  assertMatch(refused("CAPTURE", () => stream.wait(event)), /outside the capture/);
  refused("CAPTURE", end);
  // Two captures at once: a wait across them breaks both.
  const ends = [beginCapture(device, stream), beginCapture(device, third)];
  stream.record(event);
  refused("CAPTURE", () => third.wait(event));
  for (const each of ends) refused("CAPTURE", each);
  other.record(event);
  other.synchronize();
  assert(event.query(), "recorded outside it is an ordinary event again");
});

test("an unjoined fork is refused by name, and dropped", { timeout }, () => {
  using device = open();
  using stream = device.stream();
  using other = device.stream();
  using event = device.event();
  using host = device.pinned(4);
  const end = beginCapture(device, stream);
  stream.memset(host, 1);
  stream.record(event);
  other.wait(event);
  other.memset(host, 2);
  assertMatch(refused("CAPTURE", end), /unjoined fork: .*operation 1, fkv_memset_async/);
  for (const each of [stream, other]) {
    each.memset(host, 4);
    each.synchronize();
  }
  assertEquals(host.view(Uint8Array)[0], 4);
});

test("a capture ends where it began", { timeout }, () => {
  using device = open();
  using stream = device.stream();
  using other = device.stream();
  using event = device.event();
  using host = device.pinned(4);
  const out = new BigUint64Array(1);
  assertMatch(refused("CAPTURE", () => device.call("fkv_capture_end", out, stream.handle)), /does not capture/);
  const end = beginCapture(device, stream);
  stream.memset(host, 1);
  stream.record(event);
  other.wait(event);
  assertMatch(refused("CAPTURE", () => device.call("fkv_capture_end", out, other.handle)), /another stream/);
  refused("CAPTURE", end);
});

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
  assertEquals(start.freeBytes - device.memory().freeBytes, 1000);
  const { address } = there;
  there[Symbol.dispose]();
  assertEquals(device.memory().allocatedBytes, start.allocatedBytes);
  assertMatch(refused("BAD_ARGUMENT", () => stream.copy(host, address, 8)), /freed/);
  assertMatch(refused("BAD_ARGUMENT", () => device.call("fkv_device_free", address, device.handle)), /given back/);
  assertMatch(refused("BAD_ARGUMENT", () => device.call("fkv_device_free", host.address, device.handle)), /fkv_device_alloc/);
});

test("freed memory is used again, and neighbours keep theirs", { timeout }, () => {
  using device = open();
  using stream = device.stream();
  const sizes = [5000, 300, 70_000, 4096, 1];
  for (let round = 0; round < 20; round++) {
    const buffers = sizes.map((bytes) => device.alloc(bytes));
    buffers.forEach((buffer, i) => stream.memset(buffer, i));
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
      assert(bytes.every((x) => x === i), `buffer ${i}`);
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
  const past = (fn: () => void): void => assertMatch(refused("BAD_ARGUMENT", fn), /run 1 past the end of a \w+ allocation/);
  past(() => stream.copy(there.address, host.address + 1, 100));
  past(() => stream.copy(host.address + 1, there.address, 100));
  past(() => stream.copy2d(there.address, 41, host.address, 20, 19, 3));
  past(() => stream.memset(there.address + 1, 0, 100));
  past(() => stream.write(there.address + 93, new Uint8Array(8)));
  assertMatch(refused("BAD_ARGUMENT", () => stream.copy2d(there, 4, host, 8, 8, 2)), /dst_pitch/);
  assertMatch(refused("BAD_ARGUMENT", () => stream.copy(there.address, there.address + 10, 20)), /overlap/);
  assertMatch(refused("BAD_ARGUMENT", () => stream.write(there, new Uint8Array(3073))), /3072/);
  assertMatch(refused("BAD_ARGUMENT", () => stream.write(host, new Uint8Array(3))), /not device memory/);
});

test("pageable memory: read at the call, never written, pinned by registration", { timeout }, () => {
  using device = open();
  using stream = device.stream();
  using there = device.alloc(4096);
  const memory = new ArrayBuffer(4096);
  const bytes = new Uint8Array(memory).fill(1);
  const copyBack = (): void => device.call("fkv_memcpy_async", addressOf(device, memory), there.address, 4096, stream.handle);
  stream.copy(there, bytes);
  bytes.fill(2);
  assertMatch(refused("BAD_ARGUMENT", copyBack), /fkv_host_register/);
  device.call("fkv_host_register", memory, 4096, device.handle);
  assertEquals(device.memory().pinnedBytes, 4096);
  assertMatch(refused("BAD_ARGUMENT", () => device.call("fkv_host_register", memory, 1, device.handle)), /pinned already/);
  copyBack();
  stream.synchronize();
  assert(bytes.every((x) => x === 1));
  device.call("fkv_host_unregister", memory, device.handle);
  assertEquals(device.memory().pinnedBytes, 0);
  refused("BAD_ARGUMENT", copyBack);
});
