/// <reference lib="esnext.disposable" preserve="true" />
// Opening a device: which library, which options, and what debug mode sees.

import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { assert, assertEquals, assertMatch, assertThrows } from "@std/assert";
import { FKV_DEVICE_FAILED } from "../ffi/constants.ts";
import { packageRoot } from "../ffi/root.ts";
import { failureOf } from "../ffi/status.ts";
import { Device, type DeviceOptions, FreeKVError } from "../lib/device.ts";
import { type ErrorCode, exitCode, httpStatus } from "../lib/errors.ts";

const open = (options: DeviceOptions = {}): Device => Device.open({ device: "cpu", debug: true, ...options });

/** What `fn` throws, which must be a FreeKVError of this code. */
function thrown(code: ErrorCode, fn: () => unknown): FreeKVError {
  const error = assertThrows(fn, FreeKVError);
  assertEquals(error.code, code, error.message);
  return error;
}

test("debug mode names the argument that a call cannot take", () => {
  using device = open();
  using stream = device.stream();
  using there = device.alloc(16);
  // As an untyped caller would: the FFI would turn each of these into some number and go on.
  const lib = device.lib as unknown as Record<string, (...args: unknown[]) => void>;
  const memset =
    (...args: unknown[]) =>
    () =>
      lib.fkv_memset_async?.(...args);
  const { address } = there;
  const { handle } = stream;
  const detached = new ArrayBuffer(8);
  detached.transfer(0);
  const uses: [RegExp, () => unknown][] = [
    [/takes 4 arguments, got 3/, memset(address, 0, 16)],
    [/dst must be an address .*, got undefined/, memset(undefined, 0, 16, handle)],
    [/dst must be an address .*, got 0/, memset(0, 0, 16, handle)],
    [/dst must be an address .*, got Uint8Array/, memset(new Uint8Array(16), 0, 16, handle)],
    [/value must be an int32, got 1.5/, memset(address, 1.5, 16, handle)],
    [/value must be an int32, got 2147483648/, memset(address, 2 ** 31, 16, handle)],
    [/value must be an int32, got NaN/, memset(address, NaN, 16, handle)],
    [/bytes must be a uint64 .*, got -1/, memset(address, 0, -1, handle)],
    [/bytes must be a uint64 .*, got 18446744073709551616/, memset(address, 0, 2n ** 64n, handle)],
    [/stream must be an address .*, got null/, memset(address, 0, 16, null)],
    [/params must be an ArrayBuffer or a view.*, got 4096/, () => lib.fkv_rope?.(4096, handle)],
    [/params must be an ArrayBuffer or a view.*, got ArrayBuffer/, () => lib.fkv_rope?.(detached, handle)],
  ];
  for (const [text, use] of uses) assertMatch(thrown("BAD_ARGUMENT", use).message, text);
  memset(address, -(2 ** 31), 16n, handle)();
  stream.synchronize();
});

test("without debug mode C itself refuses null", () => {
  using device = open({ debug: false });
  using stream = device.stream();
  const error = thrown("BAD_ARGUMENT", () => device.call("fkv_memset_async", 0, 0, 16, stream.handle));
  assertEquals([error.call, error.detail.status], ["fkv_memset_async", "BAD_ARGUMENT"]);
  assertEquals([exitCode(error), httpStatus(error)], [1, 500]); // what C refuses is our mistake, not the user's
  thrown("BAD_ARGUMENT", () => device.call("fkv_nothing" as "fkv_rope", new ArrayBuffer(8), 4096));
});

test("a failed twin is opened again; after a failed GPU the process is started again", () => {
  const told = (kind: "cpu" | "cuda"): string =>
    failureOf("fkv_device_open", FKV_DEVICE_FAILED, "it failed", kind).message;
  assertMatch(told("cpu"), /^fkv_device_open: it failed; .* dispose it and open it again$/);
  assertMatch(told("cuda"), /^fkv_device_open: it failed; .* in this process; restart the process$/);
});

test("options are checked by name", () => {
  const bad = [
    { device: "gpu" },
    { device: "cuda:x" },
    { scheduleSeed: -1 },
    { scheduleSeed: 1.5 },
    { threads: -2 },
    { linkBytesPerSecond: Number.NaN },
    { debug: 1 },
    { libraryPath: 5 },
    { deviec: "cpu" },
  ] as unknown as DeviceOptions[];
  for (const options of bad) {
    const [name = ""] = Object.keys(options);
    const error = thrown("BAD_ARGUMENT", () => Device.open(options));
    assertMatch(error.message, new RegExp(name));
    assertEquals(exitCode(error), 2);
  }
});

test("auto takes a GPU that answers, else the twin, and says why", () => {
  using device = Device.open();
  if (device.backend === "cuda") return assertMatch(device.name, /^cuda:0$/);
  assertEquals(device.name, "cpu");
  assertMatch(device.fallback ?? "", /libfreekv_cuda\.so|no cuda device|NVIDIA driver/);
  using asked = open();
  assertEquals([asked.name, asked.fallback], ["cpu", undefined]);
  const names = Device.list().map((each) => each.device);
  assertEquals(names.at(-1), "cpu");
});

let dir = "";
before(() => {
  dir = mkdtempSync(join(tmpdir(), "freekv-device-"));
});
after(() => rmSync(dir, { recursive: true }));

const compilers: readonly string[] = process.env.CXX ? [process.env.CXX] : ["g++", "c++", "clang++"];
const compiler = compilers.find((each) => spawnSync(each, ["--version"], { stdio: "ignore" }).status === 0);
const skip = compiler === undefined ? `no C++ compiler (${compilers.join(", ")})` : false;

/** A library of this C++ text. */
function compile(name: string, text: string): string {
  const [source, library] = [join(dir, `${name}.cpp`), join(dir, `lib${name}.so`)];
  writeFileSync(source, text);
  const words = ["-shared", "-fPIC", source, "-o", library];
  const { status, stderr } = spawnSync(compiler ?? "", words, { encoding: "utf8" });
  assertEquals(status, 0, stderr);
  return library;
}

test("a library that cannot be loaded is named, with the reason", () => {
  const missing = join(dir, "none.so");
  const notFound = thrown("LIBRARY_NOT_FOUND", () => open({ libraryPath: missing }));
  assertMatch(notFound.message, /none\.so: no such file/);
  assertEquals(exitCode(notFound), 3);
  const garbage = join(dir, "garbage.so");
  writeFileSync(garbage, "not a library");
  assertMatch(thrown("LIBRARY_NOT_FOUND", () => open({ libraryPath: garbage })).message, /garbage\.so: ./);
  assertMatch(notFound.message, /npm run build:twin.*--library-path/);
  const { detail } = notFound;
  assertEquals(detail.tried, [{ path: missing, origin: "libraryPath", reason: "no such file" }]);
});

test("a library of another version is refused", { timeout: 60_000, skip }, () => {
  const version = (n: number): string => `extern "C" int fkv_abi_version() { return ${n}; }`;
  const newer = compile("newer", version(99));
  assertMatch(
    thrown("ABI_MISMATCH", () => open({ libraryPath: newer })).message,
    /ABI version 99, this code has 1/,
  );
  const partial = compile("partial", version(1));
  const error = thrown("ABI_MISMATCH", () => open({ libraryPath: new URL(`file://${partial}`) }));
  assertMatch(error.message, /does not export fkv_last_error, .*fkv_prefill_attend/);
});

test("a library at an explicit path decides what auto is, and must be what device asks for", () => {
  using twin = open();
  const { libraryPath } = twin;
  assert(libraryPath.startsWith(packageRoot()));
  using device = Device.open({ libraryPath });
  assertEquals([device.backend, device.fallback], ["cpu", undefined]);
  thrown("BAD_ARGUMENT", () => Device.open({ device: "cuda:0", libraryPath }));
});
