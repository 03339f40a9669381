// The README's table of what a call costs is what the bench kept.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { assertEquals, assertGreater } from "@std/assert";
import { packageRoot } from "../ffi/root.ts";

const root = packageRoot();
const read = (...path: string[]): string => readFileSync(join(root, ...path), "utf8");

/** The cells of a CSV line, of which some are quoted. */
function cells(line: string): string[] {
  const found = [...line.matchAll(/(?:^|,)(?:"((?:[^"]|"")*)"|([^",]*))/g)];
  return found.map(([, quoted, plain]) => quoted?.replaceAll('""', '"') ?? plain ?? "");
}

test("the README's table of calls has the numbers of bench/results/ffi-cpu.csv", () => {
  const [header = "", ...lines] = read("bench", "results", "ffi-cpu.csv").trim().split("\n");
  const columns = cells(header);
  const column = (line: string[], name: string): string => line[columns.indexOf(name)] ?? "";
  const kept = new Map(
    lines.map(cells).map((line) => {
      const ns = Number(column(line, "median"));
      const shown = Number(ns.toPrecision(ns < 10 ? 2 : 3)).toLocaleString("en-US");
      return [`${column(line, "runtime")}: ${column(line, "case")}`, shown];
    }),
  );
  const [, after = ""] = read("README.md").split("<!-- from bench/results/ffi-cpu.csv -->\n");
  const table = after.trimStart().split("\n\n")[0]?.trim().split("\n") ?? [];
  const [[, ...runtimes] = [], , ...rows] = table.map((line) =>
    line
      .split("|")
      .slice(1, -1)
      .map((cell) => cell.trim()),
  );
  assertEquals(runtimes, ["Bun", "Deno", "Node"]);
  assertGreater(rows.length, 10);
  for (const [name, ...shown] of rows) {
    assertEquals(
      shown,
      runtimes.map((runtime) => kept.get(`${runtime}: ${name}`)),
      name,
    );
  }
});
