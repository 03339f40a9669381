/// <reference lib="esnext.disposable" preserve="true" />
// What kernels of one's own are given, on a GPU: values of every type, as they are.

import { test } from "node:test";
import { assertEquals, assertMatch } from "@std/assert";
import { Module } from "../lib/device.ts";
import { open, probe, skip, thrown, timeout } from "./kernels/rig.ts";

test("arguments of every type arrive at their edges", { timeout, skip }, () => {
  using device = open(true);
  using stream = device.stream();
  using module = Module.load(device, probe);
  const kernel = module.kernel("arguments", ["ptr", "i32", "u32", "i64", "u64", "f32", "f64"]);
  using out = device.pinned(56);
  const bits = (value: number): bigint =>
    new DataView(new Float64Array([value]).buffer).getBigUint64(0, true);
  const seen = (): bigint[] => [...out.view(BigUint64Array)];
  const shape = { grid: 1, block: 1, stream };
  const wide = (value: number | bigint): bigint => BigInt.asUintN(64, BigInt(value));
  for (const [i, u, l, w, d] of [
    [0, 0, 0, 0, 0],
    [-1, 2 ** 32 - 1, -1, 2 ** 53 - 1, -0],
    [2 ** 31 - 1, 2 ** 31, -(2 ** 53) + 1, 2n ** 64n - 1n, Number.NaN],
    [-(2 ** 31), 1, -(2n ** 63n), 2n ** 63n, Number.POSITIVE_INFINITY],
  ] as const) {
    kernel.launch(shape, out, i, u, l, w, 1.5, d);
    assertEquals(seen(), [BigInt(out.address), wide(i), wide(u), wide(l), wide(w), 0x3fc00000n, bits(d)]);
  }
  const call = kernel.launch.bind(kernel) as (...args: unknown[]) => void;
  const bad: [RegExp, unknown[]][] = [
    [/takes 7 arguments .*, got 6/, [out, 0, 0, 0, 0, 0]],
    [/takes 7 arguments .*, got 8/, [out, 0, 0, 0, 0, 0, 0, 0]],
    [/argument 0 \(ptr\) must be an address, a buffer or null, got undefined/, [undefined, 0, 0, 0, 0, 0, 0]],
    [/argument 1 \(i32\) must be an int32, got 2147483648/, [out, 2 ** 31, 0, 0, 0, 0, 0]],
    [/argument 2 \(u32\) must be a uint32, got -1/, [out, 0, -1, 0, 0, 0, 0]],
    [/argument 3 \(i64\) must be an int64, got 0.5/, [out, 0, 0, 0.5, 0, 0, 0]],
    [/argument 4 \(u64\) must be a uint64, got 18446744073709551616/, [out, 0, 0, 0, 2n ** 64n, 0, 0]],
    [/argument 5 \(f32\) must be a number, got null/, [out, 0, 0, 0, 0, null, 0]],
  ];
  for (const [text, args] of bad)
    assertMatch(thrown("BAD_ARGUMENT", () => call(shape, ...args)).message, text);
  out[Symbol.dispose]();
  thrown("DISPOSED", () => call(shape, out, 0, 0, 0, 0, 0, 0));
});

test("integers of 1 and 2 bytes, and structs by value, arrive whole", { timeout, skip }, () => {
  using device = open(true);
  using stream = device.stream();
  using module = Module.load(device, probe);
  const narrow = module.kernel("narrow", [
    ...(["ptr", "i8", "u8", "i16", "u16", "u16", "i8", "bytes16", "bytes12", "f64"] as const),
  ]);
  using out = device.pinned(96);
  const odd = Uint8Array.from({ length: 12 }, (_, i) => 200 + i);
  const vector = Float32Array.of(1, -2, 0.5, Number.POSITIVE_INFINITY);
  const shape = { grid: 1, block: 1, stream };
  for (const [i, u, s, w] of [
    [-128, 255, -32768, 65535],
    [127, 0, 32767, 0],
    [-1, 128, -1, 32768],
  ] as const) {
    out.view(Uint8Array).fill(0);
    narrow.launch(shape, out, i, u, s, w, 0x3c00, -7, vector, odd, Math.PI);
    assertEquals([...out.view(BigInt64Array, 0, 6)], [i, u, s, w, 0x3c00, -7].map(BigInt));
    assertEquals([...out.view(Float32Array, 48, 4)], [...vector]);
    assertEquals(out.view(Float64Array, 64, 1)[0], Math.PI);
    assertEquals([...out.view(Uint8Array, 72, 11)], [...odd.subarray(0, 11)]);
  }
  const large = module.kernel("large", ["ptr", "bytes4080"]);
  large.launch(
    shape,
    out,
    Uint32Array.from({ length: 1020 }, (_, i) => i),
  );
  assertEquals(out.view(Uint32Array)[0], (1020 * 1019) / 2);
  assertMatch(
    thrown("BAD_ARGUMENT", () => module.kernel("large", ["ptr", "bytes4096"])).message,
    /takes 2 arguments of 8, 4080 bytes; 2 arguments of 8, 4096 bytes were declared/,
  );
});
