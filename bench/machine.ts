// Where and from what a figure comes: the columns that every result carries.

import { spawnSync } from "node:child_process";
import { availableParallelism, cpus, loadavg } from "node:os";
import { packageRoot } from "../ffi/root.ts";

export const root: string = packageRoot();
export const cores: number = availableParallelism();

export interface Origin {
  /** YYYY-MM-DD */
  readonly date: string;
  /** Short hash; "+" where the code differs from that commit. */
  readonly commit: string;
  /** The CPU and how many cores of it this process may use. */
  readonly machine: string;
}

export function origin(): Origin {
  const git = (...words: string[]) => spawnSync("git", words, { cwd: root, encoding: "utf8" });
  const commit = git("rev-parse", "--short", "HEAD");
  const changed = git("diff", "--quiet", "HEAD", "--", "lib", "ffi", "cuda", "bench/*.ts", "bench/*.cpp");
  return {
    date: new Date().toISOString().slice(0, 10),
    commit: commit.status === 0 ? commit.stdout.trim() + (changed.status === 0 ? "" : "+") : "unknown",
    machine: `${cpus()[0]?.model.trim() ?? process.arch}, ${cores} cores`,
  };
}

/** A sentence where other processes take part of what is measured. */
export function busy(): string | undefined {
  const load = loadavg()[0] as number;
  return load < 0.3 * cores
    ? undefined
    : `Other work ran here: load average ${load.toFixed(1)} on ${cores} cores when this began.`;
}
