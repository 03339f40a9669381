/// <reference lib="esnext.disposable" preserve="true" />
// Graphs: what a capture takes, what breaks it, and how its graph runs.

import { test } from "node:test";
import {
  assert,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertLess,
  assertMatch,
} from "@std/assert";
import { Event, type Graph } from "../lib/device.ts";
import { beginCapture, captureFork, open, quickest, refused, timeout } from "./runtime.ts";
import { onTwin, seeds, twinOnly } from "./target.ts";

// ---- graphs ----

test("a graph reads what its memory holds when it is launched, and keeps its edges", { timeout }, () => {
  for (const scheduleSeed of [0, ...seeds(30)]) {
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
  for (const scheduleSeed of [0, ...seeds(20)]) {
    // On threads the byte that crosses the link takes half a millisecond each way.
    using device = open({ scheduleSeed, linkBytesPerSecond: scheduleSeed === 0 ? 2000 : 0 });
    using stream = device.stream();
    using other = device.stream();
    using there = device.alloc(1);
    using host = device.pinned(3);
    const [a, b, c] = [host.address, host.address + 1, host.address + 2];
    // Turns three bytes by one place, by way of the device: two turns at once would lose one.
    using turn = stream.capture(() => {
      stream.copy(there, a, 1);
      stream.copy(a, b, 1);
      stream.copy(b, c, 1);
      stream.copy(c, there, 1);
    });
    const bytes = host.view(Uint8Array);
    bytes.set([1, 2, 3]);
    for (let i = 0; i < 20; i++) {
      stream.launch(turn);
      other.launch(turn);
    }
    device.synchronize();
    assertEquals([...bytes], [2, 3, 1], `40 turns, seed ${scheduleSeed}`);
  }
});

test("a graph's branches overlap, launch after launch", { timeout, skip: twinOnly }, () => {
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

test("a capture refuses what CUDA refuses, is broken by it, and leaves its streams usable", {
  timeout,
}, () => {
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
    assertMatch(
      refused("CAPTURE", () => stream.memset(there, 2)),
      /broken by/,
      name,
    );
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
  using there = device.alloc(4);
  using host = device.pinned(4);
  using graph = stream.capture(() => {
    stream.write(there, new Uint8Array([6, 7, 8, 9])); // its bytes are part of the call
    other.memset(host, 3);
    other.record(event);
    event.synchronize();
    other.synchronize();
    assert(event.query());
    assertEquals(host.view(Uint8Array)[3], 3);
    stream.copy(host, there);
  });
  stream.launch(graph);
  stream.synchronize();
  assertEquals([...host.view(Uint8Array)], [6, 7, 8, 9]);
});

test("waits do not cross a capture's boundary", { timeout }, () => {
  using device = open();
  using stream = device.stream();
  using other = device.stream();
  using third = device.stream();
  using event = device.event();
  using host = device.pinned(4);
  stream
    .capture(() => {
      stream.memset(host, 1);
      stream.record(event);
    })
    [Symbol.dispose]();
  assertMatch(
    refused("CAPTURE", () => other.wait(event)),
    /inside a capture/,
  );
  assertMatch(
    refused("CAPTURE", () => event.query()),
    /edge of the graph/,
  );
  const end = beginCapture(device, stream);
  assertMatch(
    refused("CAPTURE", () => stream.wait(event)),
    /outside the capture/,
  );
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
  assertMatch(
    refused("CAPTURE", end),
    onTwin ? /unjoined fork: .*operation 1, fkv_memset_async/ : /unjoined fork/,
  );
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
  assertMatch(
    refused("CAPTURE", () => device.call("fkv_capture_end", out, stream.handle)),
    /does not capture/,
  );
  const end = beginCapture(device, stream);
  stream.memset(host, 1);
  stream.record(event);
  other.wait(event);
  assertMatch(
    refused("CAPTURE", () => device.call("fkv_capture_end", out, other.handle)),
    /another stream/,
  );
  refused("CAPTURE", end);
});
