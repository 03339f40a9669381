// npm run bench [-- NAME…] [--json] [--keep] [--out FILE] [--model DIR] [--cold]
//   NAME         floors, ffi, twin, overlap, start; without a name, all of them
//   --json       JSON lines in place of Markdown tables
//   --keep       CSV files in bench/results/, which are committed, in place of .cache/bench/NAME-cpu.csv
//   --out FILE   one CSV file of all rows, in place of these
//   --model DIR  a Hugging Face folder in place of the demo model (overlap)
//   --cold       start: also in a fresh clone of HEAD under a new HOME

import { mkdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { parseArgs } from "node:util";
import type { Bench, Floors } from "./bench.ts";
import { ffi } from "./ffi.ts";
import { floors, measureFloors } from "./floors.ts";
import { disturbance, origin, root } from "./machine.ts";
import { overlap } from "./overlap.ts";
import { start } from "./start.ts";
import { csv, markdown, type Row } from "./table.ts";
import { twin } from "./twin.ts";

const benches: Readonly<Record<string, Bench>> = { floors, ffi, twin, overlap, start };

function fail(message: string): never {
  process.stderr.write(`bench: ${message}\n`);
  process.exit(2);
}

function parse() {
  try {
    return parseArgs({
      allowPositionals: true,
      options: {
        json: { type: "boolean" },
        keep: { type: "boolean" },
        out: { type: "string" },
        model: { type: "string" },
        cold: { type: "boolean" },
      },
    });
  } catch (error) {
    return fail((error as Error).message);
  }
}

const { positionals, values } = parse();
for (const name of positionals) {
  if (!Object.hasOwn(benches, name))
    fail(`no bench "${name}"; there are: ${Object.keys(benches).join(", ")}`);
}
const names = positionals.length > 0 ? positionals : Object.keys(benches);
const from = origin();
let measured: Floors[] | undefined;
const collected: Row[] = [];

for (const name of names) {
  try {
    await runOne(name, benches[name] as Bench);
  } catch (error) {
    // One that cannot run here does not keep the others from it.
    process.stderr.write(`bench: ${name}: ${(error as Error).message}\n`);
    process.exitCode = 1;
  }
}
if (values.out !== undefined) save(values.out, collected);

async function runOne(name: string, bench: Bench): Promise<void> {
  const began = performance.now();
  const disturbed = await disturbance();
  const table = await bench.run({
    model: values.model,
    cold: values.cold,
    floors() {
      measured ??= measureFloors();
      return measured;
    },
    say(text) {
      if (process.stderr.isTTY) process.stderr.write(`bench: ${name}: ${text}\n`);
    },
  });
  const rows = table.rows.map((row) => ({ ...from, bench: name, ...row }));
  if (values.json) for (const row of rows) console.log(JSON.stringify(row));
  else {
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    const notes = [...(table.notes ?? []), ...(disturbed === undefined ? [] : [disturbed])];
    console.log(`## ${bench.title}\n\n${markdown({ rows: table.shown ?? table.rows, notes })}\n`);
    console.log(`${from.machine} · commit ${from.commit} · ${from.date} · ${seconds} s\n`);
  }
  // The device that these benches run on is the CPU twin; its files are named so.
  const place = values.keep ? join("bench", "results") : join(".cache", "bench");
  if (values.out === undefined) save(join(root, place, `${name}-cpu.csv`), rows);
  else collected.push(...rows);
}

function save(file: string, rows: readonly Row[]): void {
  mkdirSync(dirname(file), { recursive: true });
  writeFileSync(file, csv(rows));
}
