/// <reference lib="esnext.disposable" preserve="true" />
// What cannot be done now, or with these values, is refused before anything has changed.

import { test } from "node:test";
import { assertEquals, assertMatch } from "@std/assert";
import { thrown } from "./shared.ts";
import { open } from "./target.ts";

const timeout = 30_000;

test("what cannot be disposed during a capture lives on, and so does its device", { timeout }, () => {
  using device = open();
  using keep = device.alloc(16);
  using host = device.pinned(16);
  const stream = device.stream();
  const there = device.alloc(16);
  const pinned = device.pinned(16);
  const reserve = device.reserve(8192, 4096);
  const side = device.stream();
  const fork = device.event();
  const view = pinned.view(Uint8Array);
  for (const object of [there, pinned, reserve, stream, side]) {
    const error = thrown("BAD_ARGUMENT", () =>
      stream.capture(() => {
        stream.memset(keep, 1);
        stream.record(fork);
        side.wait(fork);
        object[Symbol.dispose]();
      }),
    );
    assertEquals(error.detail.status, "CAPTURE");
    assertMatch(error.message, /outside the capture/);
    // Told and swallowed inside, it is still no graph.
    const swallowed = thrown("BAD_ARGUMENT", () =>
      stream.capture(() => {
        stream.record(fork);
        side.wait(fork);
        thrown("BAD_ARGUMENT", () => object[Symbol.dispose]());
      }),
    );
    assertMatch(swallowed.message, /broken/);
  }
  assertEquals([there.bytes, view.length, reserve.bytes], [16, 16, 8192]);
  stream.memset(there, 3);
  stream.copy(pinned, there);
  stream.synchronize();
  assertEquals(view[15], 3);
  // Events and graphs wait for nothing.
  const passing = device.event();
  using graph = stream.capture(() => {
    stream.copy(host, keep);
    passing[Symbol.dispose]();
  });
  stream.launch(graph);
  for (const object of [stream, side, there, pinned, reserve, fork]) object[Symbol.dispose]();
  const { allocatedBytes, pinnedBytes } = device.memory();
  assertEquals([allocatedBytes, pinnedBytes, view.length], [16, 16, 0]);
});

test("a device that is closed during a capture is closed, and the capture over", { timeout }, () => {
  const device = open();
  const stream = device.stream();
  const there = device.alloc(16);
  thrown("DISPOSED", () =>
    stream.capture(() => {
      stream.memset(there, 1);
      device[Symbol.dispose]();
    }),
  );
  thrown("DISPOSED", () => stream.synchronize());
});

test("numbers and memory that no copy can take are refused before anything is queued", { timeout }, () => {
  const notCounts: readonly unknown[] = [
    ...[Number.NaN, -1, 1.5, 2 ** 53, Number.POSITIVE_INFINITY, "8", 8n, null],
  ];
  const notValues: readonly unknown[] = [Number.NaN, 1.5, 2 ** 31, -(2 ** 31) - 1, 2 ** 32 + 7, "7", 7n];
  const shared = new SharedArrayBuffer(8);
  const notSources: readonly unknown[] = [
    ...[shared, new Uint8Array(shared), new DataView(shared), "12345678", null, {}, Number.NaN, 0, -8],
  ];
  const notPlaces: readonly unknown[] = [
    new Uint8Array(8),
    new ArrayBuffer(8),
    shared,
    "8",
    null,
    {},
    1.5,
    0,
  ];
  for (const debug of [false, true]) {
    using device = open({ debug });
    using stream = device.stream();
    using there = device.alloc(64);
    using host = device.pinned(64);
    stream.memset(there, 5);
    const refused = (each: unknown, uses: readonly (() => void)[]): void => {
      for (const use of uses) {
        const { call, detail, message } = thrown("BAD_ARGUMENT", use);
        assertMatch(`${call}: ${message}`, /^(stream\.\w+): \1: /, String(each));
        assertEquals(detail.status, undefined, message); // C was not asked
      }
    };
    for (const each of notCounts) {
      const n = each as number;
      refused(each, [
        // Absent is all of it, and so is null.
        ...(each === null ? [] : [() => stream.copy(there, host, n), () => stream.memset(there, 1, n)]),
        () => stream.copy2d(there, n, host, 8, 4, 2),
        () => stream.copy2d(there, 8, host, n, 4, 2),
        () => stream.copy2d(there, 8, host, 8, n, 2),
        () => stream.copy2d(there, 8, host, 8, 4, n),
        () => stream.memset2d(there, n, 1, 4, 2),
        () => stream.memset2d(there, 8, 1, n, 2),
        () => stream.memset2d(there, 8, 1, 4, n),
      ]);
    }
    for (const each of notValues) {
      const value = each as number;
      refused(each, [() => stream.memset(there, value), () => stream.memset2d(there, 8, value, 4, 2)]);
    }
    for (const each of notSources) {
      const src = each as ArrayBuffer;
      refused(each, [
        () => stream.copy(there, src, 8),
        () => stream.copy2d(there, 8, src, 4, 4, 2),
        () => stream.write(there, src),
      ]);
    }
    for (const each of notPlaces) {
      const dst = each as number;
      refused(each, [
        () => stream.copy(dst, host, 8),
        () => stream.copy2d(dst, 4, host, 4, 4, 2),
        () => stream.memset(dst, 1, 8),
        () => stream.memset2d(dst, 4, 1, 4, 2),
        () => stream.write(dst, new Uint8Array(8)),
      ]);
    }
    stream.copy(host, there);
    stream.synchronize();
    assertEquals([...host.view(Uint8Array)], new Array(64).fill(5));
  }
});
