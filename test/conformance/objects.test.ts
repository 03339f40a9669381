/// <reference lib="esnext.disposable" preserve="true" />
// Device, Stream, Event, Graph, DeviceBuffer: order, replay, lifetimes, errors.

import { test } from "node:test";
import { assert, assertEquals, assertGreater, assertMatch, assertThrows } from "@std/assert";
import * as cuda from "freekv/cuda";
import { thrown } from "./shared.ts";
import { gpuOnly, open, target, twinOnly } from "./target.ts";

const timeout = 30_000;

test("a device tells what it is", { timeout }, () => {
  using device = open({ threads: 2 });
  const name = target === "cpu" ? "cpu" : "cuda:0";
  assertEquals([device.name, device.backend, device.fallback], [name, target, undefined]);
  assert(cuda.Device.list().some((each) => each.device === name && each.libraryPath === device.libraryPath));
  const info = device.info();
  assertGreater(info.totalBytes, 2 ** 28);
  assertGreater(info.model.length, 0);
  const limits = [info.maxThreadsPerBlock, info.sharedBytesPerBlock, info.warpSize, info.l2Bytes];
  if (target === "cpu") {
    assertEquals([info.computeCapability, info.multiprocessors], [null, 2]);
    assertEquals(limits, [0, 0, 0, 0]);
  } else {
    assertMatch(info.computeCapability ?? "", /^\d+\.\d$/);
    assert(limits.every((limit) => limit >= 32));
  }
  using there = device.alloc(1000);
  using host = device.pinned(4096);
  const { allocatedBytes, pinnedBytes } = device.memory();
  assertEquals([allocatedBytes, pinnedBytes], [there.bytes, host.bytes]);
});

test("copies, fills and writes happen in order, 1-D and 2-D", { timeout }, () => {
  using device = open();
  using stream = device.stream();
  using there = device.alloc(64);
  using host = device.pinned(64);
  stream.memset(there, 0xff);
  stream.copy2d(
    there,
    16,
    new Uint8Array(24).map((_, i) => i),
    8,
    4,
    3,
  );
  stream.write(there.address + 1, new Uint16Array([0x0a0b]));
  stream.copy(host, there);
  stream.synchronize();
  const rows = [0, 1, 2, 3].map((row) => [...host.view(Uint8Array, 16 * row, 5)]);
  assertEquals(rows, [
    [0, 11, 10, 3, 255],
    [8, 9, 10, 11, 255],
    [16, 17, 18, 19, 255],
    [255, 255, 255, 255, 255],
  ]);
});

test("a 2-D fill leaves what lies between its rows, on either side", { timeout }, () => {
  using device = open();
  using stream = device.stream();
  using there = device.alloc(32);
  using host = device.pinned(64);
  stream.memset(there, 9);
  stream.memset2d(there.address + 1, 8, 0x105, 3, 4);
  stream.memset2d(host.address + 32, 16, 7, 2, 2);
  stream.copy(host, there, 32);
  stream.memset2d(host.address + 63, 0, 3, 1, 1); // one row has no pitch
  for (const [width, height] of [
    [0, 5],
    [5, 0],
  ] as const)
    stream.memset2d(there, 8, 1, width, height);
  stream.synchronize();
  const bytes = host.view(Uint8Array);
  assertEquals(
    [0, 1, 2, 3].map((row) => [...bytes.subarray(8 * row, 8 * row + 8)]),
    [0, 1, 2, 3].map(() => [9, 5, 5, 5, 9, 9, 9, 9]),
  );
  assertEquals([...bytes.subarray(32, 52)], [7, 7, ...new Array(14).fill(0), 7, 7, 0, 0]);
  assertEquals(bytes[63], 3);
  thrown("BAD_ARGUMENT", () => stream.memset2d(there, 2, 0, 3, 4));
  thrown("BAD_ARGUMENT", () => stream.memset2d(there, 8, 0, 8, 5));
  thrown("BAD_ARGUMENT", () => stream.memset2d(there.address, 2 ** 52, 0, 8, 2 ** 20));
});

test("an empty array is no work, and the smallest and largest writes arrive", { timeout }, () => {
  for (const debug of [false, true]) {
    using device = open({ debug });
    using stream = device.stream();
    using there = device.alloc(3072);
    using host = device.pinned(3072);
    stream.memset(there, 7);
    for (const nothing of [new Uint8Array(0), new ArrayBuffer(0), new Float64Array(4).subarray(4)]) {
      stream.copy(there, nothing);
      stream.write(there, nothing);
      stream.copy2d(there, 16, nothing, 16, 0, 3);
      stream.memset(there, 1, 0);
    }
    stream.write(there.address + 5, new Uint8Array([9]));
    stream.copy(host, there);
    stream.synchronize();
    const bytes = host.view(Uint8Array);
    assertEquals([bytes.filter((byte) => byte === 7).length, bytes[5]], [3071, 9]);
    const most = new Uint8Array(3072).map((_, i) => i % 251);
    stream.write(there, most);
    stream.copy(host, there);
    stream.synchronize();
    assertEquals(
      bytes.every((byte, i) => byte === most[i]),
      true,
    );
  }
});

test("an event orders two streams and tells when they are done", { timeout }, async () => {
  for (let scheduleSeed = 1; scheduleSeed <= 5; scheduleSeed++) {
    using device = open({ scheduleSeed });
    using first = device.stream();
    using second = device.stream();
    using start = device.event();
    using end = device.event();
    using there = device.alloc(4);
    using host = device.pinned(4);
    first.record(start);
    first.memset(there, scheduleSeed);
    first.record(end);
    second.wait(end);
    second.copy(host, there);
    second.record(end);
    await end.done();
    assertEquals(host.view(Uint8Array)[3], scheduleSeed);
    assert(end.query() && end.wait(0) && end.wait(2 ** 31));
    assert(cuda.Event.elapsedMs(start, end) >= 0);
  }
});

test("a graph replays what was captured, forks included", { timeout }, () => {
  using device = open();
  using stream = device.stream();
  using side = device.stream();
  using forked = device.event();
  using joined = device.event();
  using host = device.pinned(16);
  const bytes = host.view(Uint8Array);
  using graph = stream.capture(() => {
    stream.copy(host.address + 1, host.address, 1);
    stream.record(forked);
    side.wait(forked);
    side.copy(host.address + 2, host.address + 1, 1);
    side.record(joined);
    stream.wait(joined);
    stream.copy(host.address + 3, host.address + 2, 1);
  });
  stream.synchronize();
  assertEquals([...bytes.subarray(0, 4)], [0, 0, 0, 0]);
  for (const value of [3, 250]) {
    bytes[0] = value;
    stream.launch(graph);
    stream.synchronize();
    assertEquals([...bytes.subarray(0, 5)], [value, value, value, value, 0]);
  }
});

test("structs are packed as C reads them", { timeout }, () => {
  using device = open();
  const info = new ArrayBuffer(cuda.size.fkv_device_info);
  new DataView(info).setUint32(0, info.byteLength, true);
  device.call("fkv_device_get_info", info, device.handle);
  const read = cuda.read.fkv_device_info(new DataView(info), 0);
  assertEquals(read.name, device.info().model);
  const bytes = new BigUint64Array(1);
  device.lib.fkv_chain_scratch_bytes(bytes, 1, 64, 64);
  assert((bytes[0] ?? 0n) > 0n);
  const error = thrown("ABI_MISMATCH", () =>
    device.lib.fkv_device_get_info(new ArrayBuffer(64), device.handle),
  );
  assertEquals([error.call, error.detail.status], ["fkv_device_get_info", "ABI_MISMATCH"]);
});

const ptx = new TextEncoder().encode(".version 8.0\n.target sm_80\n.address_size 64\n");

test("the twin refuses modules, and says why and what to do", { timeout, skip: twinOnly }, () => {
  for (const debug of [false, true]) {
    using device = open({ debug });
    for (const [call, use] of [
      ["fkv_module_load", () => cuda.Module.load(device, ptx)],
      ["fkv_program_compile_sync", () => cuda.Module.compile(device, "__global__ void nothing() {}")],
    ] as const) {
      const error = thrown("BAD_ARGUMENT", use);
      assertEquals([error.call, error.detail.status], [call, "UNSUPPORTED"]);
      assertMatch(error.message, /CPU twin .* cannot run GPU code; open a CUDA device/);
    }
    // Before it is asked anything.
    thrown("BAD_ARGUMENT", () => cuda.Module.load(device, "no-such-file.ptx"));
    thrown("BAD_ARGUMENT", () => cuda.Module.load(device, new Uint8Array(0)));
    const text = thrown("BAD_ARGUMENT", () => cuda.Module.compile(device, "a\0b")).message;
    assertMatch(text, /source must be text without zero bytes/);
  }
});

const twice = `.version 8.0
.target sm_80
.address_size 64
.visible .entry twice(.param .u64 values, .param .u32 n) {
  .reg .pred %p;
  .reg .b32 %i, %n, %v;
  .reg .b64 %at, %offset;
  ld.param.u64 %at, [values];
  ld.param.u32 %n, [n];
  mov.u32 %i, %tid.x;
  setp.ge.u32 %p, %i, %n;
  @%p ret;
  mul.wide.u32 %offset, %i, 4;
  add.u64 %at, %at, %offset;
  ld.global.u32 %v, [%at];
  add.u32 %v, %v, %v;
  st.global.u32 [%at], %v;
  ret;
}
`;

test("a kernel of one's own runs, by itself and in a graph", { timeout, skip: gpuOnly }, () => {
  using device = open();
  using stream = device.stream();
  using host = device.pinned(4096);
  using module = cuda.Module.load(device, new TextEncoder().encode(twice));
  const kernel = module.kernel("twice", ["ptr", "u32"]);
  const values = host.view(Int32Array, 0, 100).map((_, i) => i);
  host.view(Int32Array, 0, 100).set(values);
  const launch = (): void => kernel.launch({ grid: [1], block: [128], stream }, host, 99);
  using graph = stream.capture(launch);
  launch();
  stream.launch(graph);
  stream.synchronize();
  assertEquals(
    [...host.view(Int32Array, 0, 100)],
    [...values.map((value) => (value < 99 ? 4 * value : value))],
  );
});

test("a kernel's arguments have the types of its list", () => {
  const uncalled = (kernel: cuda.Kernel<["ptr", "i32", "f32", "u64"]>, options: cuda.LaunchOptions): void => {
    kernel.launch(options, 4096, 1, 0.5, 2n ** 63n);
    kernel.launch(options, null, 1, 0.5, 1);
    // @ts-expect-error: an argument too few
    kernel.launch(options, 4096, 1, 0.5);
    // @ts-expect-error: an argument too many
    kernel.launch(options, 4096, 1, 0.5, 1, 2);
    // @ts-expect-error: an int32 is no bigint
    kernel.launch(options, 4096, 1n, 0.5, 1);
    // @ts-expect-error: a float is no buffer
    kernel.launch(options, 4096, 1, null, 1);
    // @ts-expect-error: text is nothing
    kernel.launch(options, "4096", 1, 0.5, 1);
  };
  const unknown = (module: cuda.Module): void => {
    // @ts-expect-error: no such type
    module.kernel("add", ["ptr", "float"]);
  };
  assertEquals([typeof uncalled, typeof unknown], ["function", "function"]);
});

test("errors name the call and the way out", { timeout }, () => {
  using device = open();
  using stream = device.stream();
  using event = device.event();
  const unrecorded = thrown("BAD_ARGUMENT", () => event.query());
  assertEquals([unrecorded.call, unrecorded.detail.status], ["fkv_event_query", "NOT_RECORDED"]);
  assertMatch(unrecorded.message, /call stream\.record\(event\) first/);
  const nothing = thrown("BAD_ARGUMENT", () => device.lib.fkv_memset_async(0, 0, 16, stream.handle));
  assertEquals(nothing.detail.status, "BAD_ARGUMENT");
  assertGreater(String(nothing.detail.text).length, 0);
  thrown("OUT_OF_MEMORY", () => device.alloc(2 ** 53 - 1));
  thrown("OUT_OF_MEMORY", () => device.pinned(2 ** 53 - 1));
  for (const bytes of [0, -1, 1.5, Number.NaN, 2 ** 53]) thrown("BAD_ARGUMENT", () => device.alloc(bytes));
  thrown("BAD_ARGUMENT", () => stream.capture(async () => {}));
  assertThrows(() => {
    stream.capture(() => {
      throw new RangeError("mine");
    });
  }, RangeError);
});

test("what was disposed, or whose device was, is a typed error at every use", { timeout }, () => {
  const device = open();
  using stream = device.stream();
  using event = device.event();
  using there = device.alloc(16);
  using host = device.pinned(16);
  using graph = stream.capture(() => stream.copy(there.address, host.address, 16));
  stream.record(event);
  const uses = [
    () => stream.handle,
    () => stream.synchronize(),
    () => stream.record(event),
    () => stream.launch(graph),
    () => stream.capture(() => {}),
    () => event.handle,
    () => event.query(),
    () => event.wait(0),
    () => graph.handle,
    () => stream.memset2d(there, 4, 0, 4, 4),
    () => cuda.Module.load(device, ptx),
    () => cuda.Module.compile(device, "__global__ void nothing() {}"),
    () => there.address,
    () => host.address,
    () => host.window(0, 8),
    () => device.handle,
    () => device.alloc(16),
    () => device.pinned(16),
    () => device.stream(),
    () => device.event(),
    () => device.info(),
    () => device.synchronize(),
    () => device.call("fkv_device_synchronize_sync", 1),
  ];
  device[Symbol.dispose]();
  for (const use of uses) thrown("DISPOSED", use);
  device[Symbol.dispose]();

  using other = open();
  const gone = other.event();
  gone[Symbol.dispose]();
  gone[Symbol.dispose]();
  using queue = other.stream();
  thrown("DISPOSED", () => queue.record(gone));
  queue.synchronize();
});
