/// <reference lib="esnext.disposable" preserve="true" />
// A device's runtime: what runs when, and what is refused. The twin stands in for a GPU in every other test,
// so a fault that it lets pass is let pass everywhere.

import { readdirSync, readFileSync } from "node:fs";
import { test } from "node:test";
import {
  assert,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertLess,
  assertMatch,
} from "@std/assert";
import { Event } from "../lib/device.ts";
import { captureFork, elapsed, open, refused, timeout } from "./runtime.ts";
import { onTwin, seeds, twinOnly } from "./target.ts";

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
    assertEquals(
      [...log.view(Uint8Array)],
      Array.from({ length: 200 }, (_, i) => i),
    );
  }
});

test("work does not run before the host blocks or asks, under a seed", { timeout, skip: twinOnly }, () => {
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

test("on threads a call returns while its work runs", { timeout, skip: twinOnly }, () => {
  using device = open({ linkBytesPerSecond: 100e6 });
  using stream = device.stream();
  using there = device.alloc(4 << 20);
  using host = device.pinned(4 << 20);
  using event = device.event();
  assertLess(
    elapsed(() => stream.copy(there, host)),
    25,
  ); // it takes 42 ms
  stream.record(event);
  assert(!event.query());
  assert(!event.wait(1000), "a millisecond is not enough");
  event.synchronize();
  assert(event.query());
});

/** What two streams write to one byte, as a copy sees it behind each write. `ordered`: the second waits. */
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

test("a missing wait shows: seeds interleave differently; with the wait they agree", {
  timeout,
  skip: twinOnly,
}, () => {
  const drawn = seeds(30);
  const inOrder = Array.from({ length: 40 }, (_, i) => i).join(" ");
  for (const seed of drawn) assertEquals(interleaving(seed, true), inOrder);
  const outcomes = drawn.map((seed) => interleaving(seed, false));
  assertGreater(new Set(outcomes).size, 10);
  assertEquals(
    drawn.map((seed) => interleaving(seed, false)),
    outcomes,
    "a seed fixes the order",
  );
});

test("a schedule starves a stream for long, either of them", { timeout, skip: twinOnly }, () => {
  const others = Array.from({ length: 40 }, (_, i) => {
    using device = open({ scheduleSeed: i + 1 });
    using waited = device.stream();
    using other = device.stream();
    using host = device.pinned(40);
    for (let k = 0; k < 20; k++) {
      waited.memset(host.address + k, 1, 1);
      other.memset(host.address + 20 + k, 1, 1);
    }
    waited.synchronize();
    const ran = host.view(Uint8Array).reduce((sum, x) => sum + x, 0) - 20;
    device.synchronize();
    return ran;
  });
  assertLess(Math.min(...others), 3);
  assertGreater(Math.max(...others), 17);
});

// ---- events ----

test("a wait is for the latest record before it, not for a later one", { timeout }, () => {
  for (const scheduleSeed of [0, ...seeds(20)]) {
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
    waiter.wait(event); // this record; the next one comes behind 100 ms of copying and the waiter itself
    waiter.copy(mark.address + 1, mark.address, 1);
    waiter.record(done);
    slow.wait(done);
    slow.copy(there, host);
    slow.record(event);
    waiter.synchronize();
    assertEquals([...mark.view(Uint8Array)], [1, 1]);
    if (scheduleSeed === 0 && onTwin)
      assert(!event.query(), "the query is of the latest record, whose copy is on its way");
    slow.synchronize();
    assert(event.query());
  }
});

test("a stream on its thread waits as long as the event takes", { timeout }, () => {
  using device = open({ linkBytesPerSecond: 100e6 });
  using first = device.stream();
  using second = device.stream();
  using event = device.event();
  using there = device.alloc(1_000_000);
  using host = device.pinned(1_000_000);
  using seen = device.pinned(1);
  for (const value of [1, 2, 3]) {
    host.view(Uint8Array).fill(value);
    first.copy(there, host); // 10 ms
    first.copy(host, there);
    first.memset(there, 10 * value, 1);
    first.record(event);
    second.wait(event);
    second.copy(seen, there, 1);
    second.synchronize();
    assertEquals(seen.view(Uint8Array)[0], 10 * value);
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
  for (let i = 0; i < (onTwin ? 1 : 20); i++) stream.copy(there, host); // 20 ms; a GPU's link is faster
  stream.record(end);
  assertMatch(
    refused("BAD_ARGUMENT", () => Event.elapsedMs(start, end)),
    /has not completed/,
  );
  stream.synchronize();
  assertGreaterOrEqual(Event.elapsedMs(start, end), onTwin ? 20 : 4);
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

// ---- failures and handles ----

test("an operation that fails makes its device fail for good, with its name and reason", {
  timeout,
  skip: twinOnly,
}, () => {
  for (const scheduleSeed of [0, 3]) {
    const device = open({ scheduleSeed });
    const stream = device.stream();
    const other = device.stream();
    const event = device.event();
    const host = device.pinned(8);
    const there = device.alloc(64);
    const graph = stream.capture(() => stream.memset(there, 1));
    there[Symbol.dispose](); // the graph still names it
    stream.launch(graph);
    stream.record(event);
    const expected = /fkv_memset_async: dst: no device allocation at .*freed/;
    assertMatch(
      refused("DEVICE_FAILED", () => stream.synchronize()),
      expected,
    );
    const uses = [
      () => device.synchronize(),
      () => event.query(),
      () => event.wait(10),
      () => other.memset(host, 1),
      () => other.record(event),
      () => stream.launch(graph),
      () => device.alloc(8),
    ];
    for (const use of uses) assertMatch(refused("DEVICE_FAILED", use), expected);
    assertEquals(host.view(Uint8Array)[0], 0);
    for (const child of [host, graph, event, other, stream]) child[Symbol.dispose]();
    assertEquals(device.memory().pinnedBytes, 0);
    device[Symbol.dispose]();
    using fresh = open({ scheduleSeed });
    fresh.synchronize();
  }
});

test("closing a device tells of a failure that nobody has seen", { timeout, skip: twinOnly }, () => {
  using device = open();
  const stream = device.stream();
  const there = device.alloc(64);
  const graph = stream.capture(() => stream.memset(there, 1));
  there[Symbol.dispose]();
  stream.launch(graph);
  assertMatch(
    refused("DEVICE_FAILED", () => device[Symbol.dispose]()),
    /fkv_memset_async/,
  );
});

test("a struct of another version is refused with both sizes", { timeout }, () => {
  using device = open();
  const info = new ArrayBuffer(200);
  new DataView(info).setUint32(0, 123, true);
  assertMatch(
    refused("ABI_MISMATCH", () => device.call("fkv_device_get_info", info, device.handle)),
    /123 bytes.* \d+/,
  );
  const out = new BigUint64Array(1);
  assertMatch(
    refused("ABI_MISMATCH", () => device.call("fkv_device_open", out, info)),
    /123 bytes.* 32/,
  );
});

test("a handle of the wrong kind is refused, and one of another device, too", { timeout }, () => {
  using device = open();
  using elsewhere = open();
  using stream = device.stream();
  using event = elsewhere.event();
  using host = device.pinned(8);
  assertMatch(
    refused("BAD_ARGUMENT", () => device.call("fkv_event_record", stream.handle, stream.handle)),
    /event: not a live/,
  );
  assertMatch(
    refused("BAD_ARGUMENT", () => device.call("fkv_memset_async", host.address, 0, 8, device.handle)),
    /stream: not/,
  );
  assertMatch(
    refused("BAD_ARGUMENT", () => stream.record(event)),
    /different devices/,
  );
});

test("fifty devices leave no thread and no memory behind", { timeout }, () => {
  const threads = (): number => readdirSync("/proc/self/task").length;
  const what = onTwin ? /VmSize:\s+(\d+) kB/ : /VmRSS:\s+(\d+) kB/; // a GPU's driver reserves addresses as it likes
  const mapped = (): number => Number(what.exec(readFileSync("/proc/self/status", "utf8"))?.[1]);
  const once = (i: number): void => {
    using device = open({ scheduleSeed: i % 2 });
    const stream = device.stream();
    const other = device.stream();
    const host = device.pinned(1 << 20);
    device.alloc(1 << 20);
    stream.launch(captureFork(device, stream, other, host.address));
    other.memset(host, 1);
    // Nothing is disposed but the device.
  };
  for (let i = 0; i < 5; i++) once(i);
  const before = [threads(), mapped()] as const;
  for (let i = 0; i < 50; i++) once(i);
  assertLess(threads(), before[0] + (onTwin ? 3 : 25)); // the runtime's own threads, and a driver's, come and go; 50 would be one a device
  assertLess(mapped() - before[1], 50 * 1024, "KiB; one pinned buffer a device would be 50 MiB");
});
