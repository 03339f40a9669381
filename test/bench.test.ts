// The speed bench at a tiny shape on the twin: it runs, counts the flags and misses that it forces, and fills its rows.

import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import { fileURLToPath } from "node:url";
import { assert, assertAlmostEquals, assertEquals } from "@std/assert";

const root = fileURLToPath(new URL("..", import.meta.url));
const folder = mkdtempSync(join(tmpdir(), "freekv-bench-"));
after(() => rmSync(folder, { recursive: true, force: true }));

/** The CSV's lines by column; no cell of these rows has a comma in front of those that are looked at. */
function speed(rows: string): Record<string, string>[] {
  const out = join(folder, "speed.csv");
  const words = [
    "speed",
    "--shape",
    "tiny",
    "--device",
    "cpu",
    "--commit",
    "none",
    "--out",
    out,
    "--only",
    rows,
  ];
  const { exitCode, stderr } = Bun.spawnSync([process.execPath, "bench/run.ts", ...words], { cwd: root });
  assertEquals(exitCode, 0, stderr.toString());
  const [header = "", ...lines] = readFileSync(out, "utf8").trim().split("\n");
  const columns = header.split(",");
  return lines.map((line) => {
    const cells = (line.match(/("[^"]*"|[^,]*)(,|$)/g) ?? []).map((cell) => cell.replace(/,$/, ""));
    return Object.fromEntries(columns.map((column, i) => [column, cells[i] ?? ""]));
  });
}

test("the speed bench flags and misses the shares that it says, and every row has a value", {
  timeout: 60_000,
}, () => {
  const lines = speed("2,3,7");
  for (const line of lines) assert(Number(line.value) > 0, JSON.stringify(line));
  const steps = lines.filter((line) => line["flagged %"] !== "" && /% flagged/.test(line.case ?? ""));
  assert(steps.length >= 4);
  for (const line of steps) {
    const [, flagged, missed] = /(\d+)% flagged, (\d+)% missed/.exec(line.case ?? "") ?? [];
    // 24 steps of 2 layers of 2 heads: few draws.
    assertAlmostEquals(Number(line["flagged %"]), Number(flagged), 12, line.case);
    assertAlmostEquals(Number(line["missed %"]), Number(missed), 8, line.case);
  }
});
