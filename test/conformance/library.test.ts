/// <reference lib="esnext.disposable" preserve="true" />
// A library that is missing, of another processor, or of another version: each a typed error that lists what was tried.

import { readFileSync, writeFileSync } from "node:fs";
import { join, relative, resolve } from "node:path";
import { test } from "node:test";
import { pathToFileURL } from "node:url";
import { assert, assertEquals, assertMatch } from "@std/assert";
import * as cuda from "freekv/cuda";
import { compile, folder, open, thrown, withoutCompiler } from "./shared.ts";

test("a missing library is named, and so is every place that was searched", () => {
  using dir = folder();
  const path = join(dir.path, "none.so");
  for (const libraryPath of [path, pathToFileURL(path)]) {
    const error = thrown("LIBRARY_NOT_FOUND", () => open({ libraryPath }));
    assertEquals(error.detail.tried, [{ path, origin: "libraryPath", reason: "no such file" }]);
    assert(error.message.includes(path), error.message);
  }
  const listed = thrown("LIBRARY_NOT_FOUND", () => cuda.Device.list({ libraryPath: path }));
  assertMatch(listed.message, /no library at libraryPath .*--library-path.*\n {2}.*none\.so: no such file/);
});

test("a path that is not absolute begins at the working directory, whatever the loader would make of it", () => {
  const bare = "no-such-library.so"; // without a slash a loader searches its own places
  for (const libraryPath of [bare, `./${bare}`]) {
    const error = thrown("LIBRARY_NOT_FOUND", () => open({ libraryPath }));
    const [tried] = error.detail.tried as { path: string; reason: string }[];
    assertEquals([tried?.path, tried?.reason], [resolve(bare), "no such file"]);
  }
  using device = open();
  using again = open({ libraryPath: relative(process.cwd(), device.libraryPath) });
  assertEquals(again.libraryPath, device.libraryPath);
});

test("a library of another processor cannot be loaded, and the reason says so", () => {
  using device = open();
  using dir = folder();
  const path = join(dir.path, "foreign.so");
  const bytes = readFileSync(device.libraryPath);
  if (bytes.toString("latin1", 1, 4) === "ELF")
    bytes.writeUInt16LE(bytes.readUInt16LE(18) === 183 ? 62 : 183, 18);
  else bytes.fill(0x55, 0, 16);
  writeFileSync(path, bytes);
  const error = thrown("LIBRARY_NOT_FOUND", () => open({ libraryPath: path }));
  const [tried] = error.detail.tried as { path: string; reason: string }[];
  assertEquals(tried?.path, path);
  assertMatch(tried?.reason ?? "", /.{10}/);
  assert(error.message.includes(tried?.reason ?? "?"), error.message);
});

test("a library at a path lists its own devices", () => {
  using device = open();
  const { libraryPath } = device;
  assertEquals(cuda.Device.list({ libraryPath }), [{ device: "cpu", libraryPath }]);
  const unknown = { libraryPaht: libraryPath } as cuda.LibraryChoice;
  assertMatch(thrown("BAD_ARGUMENT", () => cuda.Device.list(unknown)).message, /Device\.list.*libraryPaht/);
});

test("what is no library at all is refused the same way", () => {
  using dir = folder();
  const path = join(dir.path, "text.so");
  writeFileSync(path, "not a library");
  assert(thrown("LIBRARY_NOT_FOUND", () => open({ libraryPath: path })).message.includes(path));
});

test("a library of another version is refused before anything of it is used", {
  timeout: 60_000,
  skip: withoutCompiler,
}, () => {
  using dir = folder();
  const version = (n: number): string => `extern "C" int fkv_abi_version() { return ${n}; }`;
  const newer = compile(dir.path, "newer", version(99));
  const error = thrown("ABI_MISMATCH", () => open({ libraryPath: newer }));
  assertMatch(error.message, /ABI version 99, this code has 1/);
  assert(error.message.includes(newer));
  const partial = thrown("ABI_MISMATCH", () =>
    open({ libraryPath: compile(dir.path, "partial", version(1)) }),
  );
  assertMatch(partial.message, /does not export fkv_last_error, .*fkv_prefill_attend/);
});
