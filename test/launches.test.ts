/// <reference lib="esnext.disposable" preserve="true" />
// What is known of kernels that are not ours without running one: which may run, which a graph holds, the bytes of arguments.

import { test } from "node:test";
import { assertEquals, assertMatch, assertThrows } from "@std/assert";
import { ArgumentBlock, argumentSizes } from "../lib/arguments.ts";
import { Device, FreeKVError } from "../lib/device.ts";
import { type Launched, Launches } from "../lib/launches.ts";

const timeout = 20_000;
const kernel = (name: string): Launched => ({ name, module: { handle: 1 } });
const [a, b, c] = ["a", "b", "c"].map(kernel) as [Launched, Launched, Launched];

test("an event that is reached clears what came before its record, and nothing later", () => {
  const launches = new Launches();
  const [stream, event] = [1, 10];
  launches.add(stream, [a, b]);
  launches.record(event, stream);
  launches.add(stream, [b, c]);
  assertEquals(launches.names(), ["a", "b", "c"]);
  launches.reached(event);
  launches.reached(event);
  assertEquals(launches.names(), ["b", "c"]);
  launches.record(event, stream);
  launches.forget(event);
  launches.reached(event);
  assertEquals(launches.names(), ["b", "c"]);
  launches.done(stream);
  assertEquals(launches.names(), []);
});

test("what a stream waited for is done when it is, on whatever stream it ran", () => {
  const launches = new Launches();
  const [first, second, third] = [1, 2, 3];
  launches.add(first, [a]);
  launches.record(10, first);
  launches.add(first, [c]);
  launches.wait(second, 10);
  launches.add(second, [b]);
  launches.record(11, second);
  launches.wait(third, 11);
  launches.done(third);
  assertEquals(launches.names(), ["c"]);
  launches.add(second, [b]);
  launches.done();
  launches.reached(11);
  assertEquals(launches.names(), []);
});

test("a capture holds what its stream and its forks launch, and only that", () => {
  const launches = new Launches();
  const [origin, fork, other] = [1, 2, 3];
  launches.add(fork, [a]);
  const captured = launches.capture(origin, () => {
    launches.add(origin, [a]);
    launches.add(fork, [b]);
    launches.add(other, [c]);
    launches.record(10, origin);
    launches.wait(fork, 10);
    launches.add(fork, [c]);
    const inner = launches.capture(other, () => launches.add(other, [b]));
    assertEquals([...inner], [b]);
    assertEquals(
      [origin, fork, other].map((stream) => launches.captures(stream)),
      [true, true, false],
    );
  });
  assertEquals([...captured], [a, c]);
  assertEquals(launches.names(), ["a", "b", "c"]);
  launches.done(origin);
  assertEquals(launches.names(), ["a", "b", "c"]);
  launches.done(fork);
  assertEquals([launches.names(), launches.captures(origin)], [["c"], false]);
  const failing = (): never => {
    throw new RangeError("mine");
  };
  assertThrows(() => launches.capture(origin, failing), RangeError, "mine");
  assertEquals(launches.captures(origin), false);
});

test("streams and events tell it: a device's synchronize, done and query clear names", {
  timeout,
}, async () => {
  using device = Device.open({ device: "cpu" });
  const { launches } = device.context;
  using stream = device.stream();
  using other = device.stream();
  using word = device.alloc(64);
  using event = device.event();
  const clear: (() => unknown)[] = [
    () => event.synchronize(),
    () => event.done(),
    () => {
      while (!event.query());
    },
    () => {
      other.wait(event);
      other.synchronize();
    },
    () => stream.synchronize(),
    () => device.synchronize(),
  ];
  for (const wait of clear) {
    stream.memset(word, 1);
    launches.add(stream.handle, [a]);
    stream.record(event);
    assertEquals(launches.names(), ["a"]);
    await wait();
    assertEquals(launches.names(), [], String(wait));
  }
});

test("a graph whose kernel's module is gone is refused, with the kernel's name", { timeout }, () => {
  using device = Device.open({ device: "cpu" });
  using stream = device.stream();
  using other = device.stream();
  using word = device.alloc(64);
  const event = device.event(); // stands for a module: its handle throws once it is disposed
  using graph = stream.capture(() => {
    stream.memset(word, 1);
    device.context.launches.add(stream.handle, [{ name: "mine", module: event }]);
    other.memset(word, 2);
    device.context.launches.add(other.handle, [b]);
  });
  assertEquals([[...graph.kernels], device.context.launches.names()], [["mine"], ["b"]]);
  stream.launch(graph);
  event[Symbol.dispose]();
  const error = assertThrows(() => stream.launch(graph), FreeKVError, "graph launches kernel mine");
  assertEquals([error.code, error.detail.kernel], ["DISPOSED", "mine"]);
});

test("arguments lie at multiples of 8 bytes, and those that do not fit are refused", () => {
  const types = ["i8", "u8", "i16", "u16", "bytes12", "i32", "bytes1", "ptr"];
  assertEquals(argumentSizes(types), [1, 1, 2, 2, 12, 4, 1, 8]);
  const block = new ArgumentBlock(types);
  const odd = new Uint8Array(32).map((_, i) => i).subarray(3, 15);
  const bytes = block.with([-128, 255, -2, 65535, odd, -1, Uint8Array.of(9).buffer, 2 ** 40]);
  assertEquals(bytes.byteLength, 72);
  assertEquals(
    [bytes.getInt8(0), bytes.getUint8(8), bytes.getInt16(16, true), bytes.getUint16(24, true)],
    [-128, 255, -2, 65535],
  );
  assertEquals([...new Uint8Array(bytes.buffer, 32, 12)], [...odd]);
  assertEquals([bytes.getInt32(48, true), bytes.getUint8(56), bytes.getUint32(68, true)], [-1, 9, 256]);
  for (const [type, value, text] of [
    ["i8", 128, /must be an int8, got 128/],
    ["u8", -1, /must be a uint8, got -1/],
    ["i16", 0.5, /must be an int16, got 0.5/],
    ["u16", 1n, /must be a uint16, got 1/],
    ["u16", 65536, /argument 0 \(u16\) must be a uint16, got 65536/],
    ["bytes4", new Uint8Array(5), /JavaScript memory of 4 bytes, got 5 bytes/],
    ["bytes4", 7, /JavaScript memory of 4 bytes, got number/],
    ["bytes4", null, /JavaScript memory of 4 bytes, got object/],
  ] as const) {
    assertMatch(assertThrows(() => new ArgumentBlock([type]).with([value]), RangeError).message, text);
  }
  for (const type of ["bytes", "bytes0", "bytes-1", "bytes1.5", "bytes1e3", "float", "toString"])
    assertThrows(() => argumentSizes([type]), RangeError, `${type} is none of ptr, i8`);
});
