// The build, run in a clone of its own with a library of one line.
import { spawnSync } from "node:child_process";
import { copyFileSync, mkdirSync, mkdtempSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import { assertEquals, assertMatch } from "@std/assert";
import { packageRoot } from "../ffi/root.ts";

const compilers: readonly string[] = process.env.CXX ? [process.env.CXX] : ["g++", "c++", "clang++"];
const found = compilers.some((each) => spawnSync(each, ["--version"], { stdio: "ignore" }).status === 0);
const skip = found ? false : `no C++ compiler (${compilers.join(", ")})`;
const dir = mkdtempSync(join(tmpdir(), "freekv-build-"));
after(() => rmSync(dir, { recursive: true }));

/** A folder with the build's own files and a twin of one function. */
function clone(name: string): string {
  const root = join(dir, name);
  for (const folder of ["scripts", "cuda/cpu"]) mkdirSync(join(root, folder), { recursive: true });
  for (const script of ["build.ts", "native.ts"])
    copyFileSync(join(packageRoot(), "scripts", script), join(root, "scripts", script));
  writeFileSync(join(root, "cuda", "number.h"), "#define NUMBER 7\n");
  const text = '#include "number.h"\nextern "C" int number() { return NUMBER; }\n';
  writeFileSync(join(root, "cuda", "cpu", "number.cpp"), text);
  return root;
}

function build(root: string): { status: number | null; stderr: string } {
  const { status, stdout, stderr } = spawnSync(
    process.execPath,
    [join(root, "scripts", "build.ts"), "twin"],
    {
      encoding: "utf8",
    },
  );
  assertEquals(stdout, "");
  return { status, stderr };
}

test("a clone that was renamed compiles nothing anew; a header that changed does", {
  timeout: 60_000,
  skip,
}, () => {
  const root = clone("before");
  const first = build(root);
  assertEquals(first.status, 0, first.stderr);
  assertMatch(first.stderr, /1 of 1 files/);
  const renamed = join(dir, "after");
  renameSync(root, renamed);
  assertEquals(build(renamed), { status: 0, stderr: "" });
  writeFileSync(join(renamed, "cuda", "number.h"), "#define NUMBER 8\n");
  assertMatch(build(renamed).stderr, /1 of 1 files/);
});

test("a clone that cannot be written is told in one line and is the machine's fault", {
  timeout: 30_000,
  skip,
}, () => {
  const root = clone("read-only");
  // A file in the folder's place refuses a superuser, too.
  writeFileSync(join(root, ".cache"), "");
  const { status, stderr } = build(root);
  assertEquals(status, 3, stderr);
  assertMatch(stderr, /^freekv: cannot build here: .*must be writable\n$/);
});
