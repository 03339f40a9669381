/// <reference lib="esnext.disposable" preserve="true" />
// What the conformance tests share. They run under Bun, Deno and Node, and know the package by its name alone.

import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { assertEquals, assertThrows } from "@std/assert";
import * as cuda from "freekv/cuda";

/** The folder of the package. */
export const root: string = dirname(fileURLToPath(import.meta.resolve("freekv/package.json")));

export const open = (options: cuda.DeviceOptions = {}): cuda.Device =>
  cuda.Device.open({ device: "cpu", ...options });

/** What `fn` throws, which must be a FreeKVError of this code. */
export function thrown(code: cuda.ErrorCode, fn: () => unknown): cuda.FreeKVError {
  const error = assertThrows(fn, cuda.FreeKVError);
  assertEquals(error.code, code, error.message);
  return error;
}

/** A folder that is removed when it is disposed. */
export function folder(): { readonly path: string } & Disposable {
  const path = mkdtempSync(join(tmpdir(), "freekv-conformance-"));
  return { path, [Symbol.dispose]: () => rmSync(path, { recursive: true, force: true }) };
}

const compilers: readonly string[] = process.env.CXX ? [process.env.CXX] : ["g++", "c++", "clang++"];
const compiler: string | undefined = compilers.find(
  (each) => spawnSync(each, ["--version"], { stdio: "ignore" }).status === 0,
);
/** For a test's `skip`: why it cannot compile a library, or false. */
export const withoutCompiler: string | false =
  compiler === undefined ? `no C++ compiler (${compilers.join(", ")})` : false;

/** A shared library of this C++ text. */
export function compile(dir: string, name: string, text: string): string {
  const [source, library] = [join(dir, `${name}.cpp`), join(dir, `lib${name}.so`)];
  writeFileSync(source, text);
  const words = ["-std=c++20", "-shared", "-fPIC", source, "-o", library];
  const { status, stderr } = spawnSync(compiler ?? "", words, { encoding: "utf8" });
  assertEquals(status, 0, stderr);
  return library;
}
