// Where and from what a figure comes: the columns that every result carries.

import { spawnSync } from "node:child_process";
import { availableParallelism, cpus } from "node:os";
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

/** `commit`: where there is no git. */
export function origin(given?: string): Origin {
  const git = (...words: string[]) => spawnSync("git", words, { cwd: root, encoding: "utf8" });
  const commit = git("rev-parse", "--short", "HEAD");
  const changed = git("diff", "--quiet", "HEAD", "--", "lib", "ffi", "cuda", "bench/*.ts", "bench/*.cpp");
  return {
    date: new Date().toISOString().slice(0, 10),
    commit:
      given ?? (commit.status === 0 ? commit.stdout.trim() + (changed.status === 0 ? "" : "+") : "unknown"),
    machine: `${cpus()[0]?.model.trim() ?? process.arch}, ${cores} cores`,
  };
}

/** Of all cores' time, how much others take while this process rests for half a second. */
async function othersShare(): Promise<number> {
  const read = (): [busy: number, all: number] => {
    const times = cpus().map(({ times }) => times);
    const all = times.reduce((n, { user, nice, sys, idle, irq }) => n + user + nice + sys + idle + irq, 0);
    return [all - times.reduce((n, { idle }) => n + idle, 0), all];
  };
  const [busyBefore, allBefore] = read();
  await new Promise((resolve) => setTimeout(resolve, 500));
  const [busy, all] = read();
  return all > allBefore ? (busy - busyBefore) / (all - allBefore) : 0;
}

/** A sentence where other processes take part of what is measured. */
export async function disturbance(): Promise<string | undefined> {
  const share = await othersShare();
  if (share < 0.05) return undefined;
  return `Not a quiet machine: others took ${Math.round(100 * share)}% of ${cores} cores just before this bench.`;
}
