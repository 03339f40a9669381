// What this machine can do at best. Kernels are judged by their share of it, measured in the same run.

import type { Bench, Floors } from "./bench.ts";
import { cores } from "./machine.ts";
import { spread } from "./measure.ts";
import { compile } from "./native.ts";
import type { Row } from "./table.ts";

/** One thread, two (what the goals are stated for) and all of them. */
export const threadCounts: readonly number[] = [...new Set([1, 2, cores])]
  .filter((n) => n <= cores)
  .sort((a, b) => a - b);

/** Memory that a last-level cache of some hundred megabytes does not hold. */
const mebibytes = 1024;
const repetitions = 7;

export function measureFloors(): Floors[] {
  const words = [mebibytes, repetitions, ...threadCounts].map(String);
  const { success, stdout, stderr } = Bun.spawnSync([compile("floors"), ...words]);
  if (!success) throw new Error(`bench/floors.cpp failed: ${stderr.toString()}`);
  return stdout
    .toString()
    .trim()
    .split("\n")
    .map((line) => {
      const { threads, read, copy, fma } = JSON.parse(line);
      return { threads, read: spread(read), copy: spread(copy), fma: spread(fma) };
    });
}

export const floors: Bench = {
  title: "Floors: what this machine can do at best",
  async run(options) {
    const kinds = [
      ["read memory", "GB/s", "read"],
      ["copy memory", "GB/s", "copy"],
      ["f32 multiply-add", "GFLOP/s", "fma"],
    ] as const;
    const rows: Row[] = options.floors().flatMap((each) =>
      kinds.map(([name, unit, kind]) => {
        const { median, p25, p75, most } = each[kind];
        return { case: name, threads: each.threads, unit, median, p25, p75, best: most };
      }),
    );
    const notes = [
      `Each sample touches ${mebibytes} MiB. Shares in the other benches are of the best sample, so that what else ran here cannot lower a floor.`,
    ];
    return { rows, notes };
  },
};
