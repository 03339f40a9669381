// Compiles a bench's own C++ into .cache/, for this very machine: floors want the widest instructions there are.

import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, renameSync } from "node:fs";
import { join } from "node:path";
import { root } from "./machine.ts";

/** The compiled file of bench/NAME.cpp: a program, or with `shared` a library. Errors where there is no compiler. */
export function compile(name: string, { shared = false }: { shared?: boolean } = {}): string {
  const source = join(root, "bench", `${name}.cpp`);
  const wanted = process.env.CXX;
  const names = wanted ? [wanted] : ["g++", "c++", "clang++"];
  const compiler = names.map((each) => Bun.which(each)).find((path) => path !== null);
  if (!compiler) throw new Error(`no C++ compiler: ${names.join(", ")} not found; install one or set CXX`);
  const flags = ["-std=c++20", "-O3", "-march=native", "-pthread", ...(shared ? ["-shared", "-fPIC"] : [])];
  // The processor is part of the name: -march=native means another thing elsewhere.
  const made = createHash("sha256")
    .update(JSON.stringify([flags, compiler, process.arch, processor(), readFileSync(source, "utf8")]))
    .digest("hex")
    .slice(0, 16);
  const file = join(root, ".cache", "bench", `${name}-${made}${shared ? ".so" : ""}`);
  if (existsSync(file)) return file;
  mkdirSync(join(root, ".cache", "bench"), { recursive: true });
  const temporary = `${file}.${process.pid}.tmp`;
  const built = Bun.spawnSync([compiler, ...flags, source, "-o", temporary]);
  if (!built.success) throw new Error(`bench/${name}.cpp does not compile:\n${built.stderr.toString()}`);
  renameSync(temporary, file);
  return file;
}

function processor(): string {
  const file = "/proc/cpuinfo";
  return existsSync(file) ? (/^flags\s*:.*$/m.exec(readFileSync(file, "utf8"))?.[0] ?? "") : "";
}
