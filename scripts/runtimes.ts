// How each runtime runs test files, and what its output says of them. All of them run the conformance tests.
// Bun and Deno run the source; Node runs dist and the tests as tsc makes them, for it is Node 20 that must do.

import { existsSync, readdirSync } from "node:fs";
import { basename, join } from "node:path";
import { findProgram, root } from "./native.ts";

export interface Count {
  passed: number;
  failed: number;
  skipped: number;
}

export interface Runtime {
  readonly name: string;
  /** The command line for these files, or why there is none here. */
  command(files: readonly string[], pattern: string | undefined): string[] | string;
  /** What its output counted, or undefined when it never came to its closing lines. */
  count(output: string): Count | undefined;
}

const compiled = join(root, ".cache", "conformance");

/** Of a test that states no time-out of its own. */
const testMs = 60_000;

const number = (output: string, pattern: RegExp): number =>
  Number([...output.matchAll(pattern)].at(-1)?.[1] ?? 0);

export const bun: Runtime = {
  name: "Bun",
  command: (files, pattern) => [
    ...[process.execPath, "test", "--no-orphans", `--timeout=${testMs}`, ...files],
    ...(pattern === undefined ? [] : ["--test-name-pattern", pattern]),
  ],
  count(output) {
    const end = output.lastIndexOf("\nRan ");
    if (end < 0) return undefined;
    const summary = output.slice(0, end);
    const of = (word: string): number => number(summary, new RegExp(`^ (\\d+) ${word}$`, "gm"));
    return { passed: of("pass"), failed: of("fail"), skipped: of("skip") + of("todo") };
  },
};

const deno: Runtime = {
  name: "Deno",
  command(files, pattern) {
    const program = findDeno();
    if (program === undefined) return `node_modules has no Deno for ${process.platform}-${process.arch}`;
    return [
      ...[program, "test", "--quiet", "--no-lock", "--no-check", "--conditions=source", "--allow-all"],
      ...(pattern === undefined ? [] : [`--filter=/${pattern}/`]),
      ...files,
    ];
  },
  count(output) {
    const line = /^(?:ok|FAILED) \| .*$/m.exec(output)?.[0];
    if (line === undefined) return undefined;
    const of = (word: string): number => number(line, new RegExp(`(\\d+) ${word}`, "g"));
    return { passed: of("passed"), failed: of("failed"), skipped: of("ignored") };
  },
};

const node: Runtime = {
  name: "Node",
  command(files, pattern) {
    const program = findProgram(["node"]);
    if (program === undefined) return "node is not on PATH";
    return [
      ...[program, "--enable-source-maps", "--test", "--test-reporter=tap"],
      ...(pattern === undefined ? [] : [`--test-name-pattern=${pattern}`]),
      ...files.map((file) => join(compiled, basename(file).replace(/\.ts$/, ".js"))),
    ];
  },
  count(output) {
    if (!/^# fail \d+$/m.test(output)) return undefined;
    const of = (word: string): number => number(output, new RegExp(`^# ${word} (\\d+)$`, "gm"));
    return { passed: of("pass"), failed: of("fail") + of("cancelled"), skipped: of("skipped") + of("todo") };
  },
};

export const runtimes: readonly Runtime[] = [bun, deno, node];

/** The binary in the npm package `deno`, whose install script, which would link it, is not run. */
function findDeno(): string | undefined {
  const dir = join(root, "node_modules", "@deno");
  if (!existsSync(dir)) return undefined;
  for (const each of readdirSync(dir)) {
    for (const file of ["deno", "deno.exe"]) {
      const path = join(dir, each, file);
      // Of two builds for one platform (glibc, musl) only one runs.
      if (runs(path)) return path;
    }
  }
  return undefined;
}

function runs(path: string): boolean {
  try {
    return Bun.spawnSync([path, "--version"], { stdout: "ignore", stderr: "ignore" }).success;
  } catch {
    return false;
  }
}

/** Builds dist and the tests as Node reads them; returns what the compilers say where they fail. */
export function buildForNode(): string | undefined {
  const steps = [
    ["scripts/build.ts", "js"],
    ["node_modules/typescript/bin/tsc", "-p", "test/conformance/tsconfig.json"],
  ];
  for (const step of steps) {
    const { success, stdout, stderr } = Bun.spawnSync([process.execPath, ...step], { cwd: root });
    if (!success) return `${stdout}${stderr}`;
  }
  return undefined;
}
