// npm run bench [-- NAME…] [--json] [--keep] [--out FILE] [--commit HASH] [--model DIR] [--cold]
//               [--only ROWS] [--shape NAME] [--device NAME] [--peers FILE] [--steps N]
//   NAME           floors, ffi, twin, overlap, start; without a name, all of these; and chain and speed, which are for a GPU
//   --json         JSON lines in place of Markdown tables
//   --keep         CSV files in bench/results/, which are committed, in place of .cache/bench/NAME-MACHINE.csv
//   --out FILE     one CSV file of all rows, in place of these
//   --commit HASH  what is measured, where git cannot say it
//   --model DIR    a Hugging Face folder in place of the demo model (overlap)
//   --cold         start: also in a fresh clone of HEAD under a new HOME
//   speed:
//   --only ROWS    of its table, e.g. 3,4
//   --shape NAME   "llama-3.1-8b" (default), or "tiny", to see that it runs
//   --device NAME  default "auto"
//   --steps N      of a measurement, in place of 200
//   --peers FILE   what bench/speed/peers.py wrote on this machine

import { mkdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { parseArgs } from "node:util";
import type { Bench, Floors, Machine } from "./bench.ts";
import { chain } from "./chain.ts";
import { ffi } from "./ffi.ts";
import { floors, measureFloors } from "./floors.ts";
import { disturbance, origin, root } from "./machine.ts";
import { overlap } from "./overlap.ts";
import { speed } from "./speed.ts";
import { start } from "./start.ts";
import { csv, markdown, type Row } from "./table.ts";
import { twin } from "./twin.ts";

/** Those that run without being named: what this machine's CPU does. */
const usual: Readonly<Record<string, Bench>> = { floors, ffi, twin, overlap, start };
const benches: Readonly<Record<string, Bench>> = { ...usual, chain, speed };

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
        commit: { type: "string" },
        model: { type: "string" },
        cold: { type: "boolean" },
        only: { type: "string" },
        shape: { type: "string" },
        device: { type: "string" },
        peers: { type: "string" },
        steps: { type: "string" },
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
const only = values.only?.split(",").map(Number);
if (only?.some((row) => !Number.isInteger(row))) fail(`--only ${values.only}: give rows as 3,4`);
const steps = values.steps === undefined ? undefined : Number(values.steps);
if (steps !== undefined && !(Number.isInteger(steps) && steps >= 12))
  fail(`--steps ${values.steps}: give 12 or more`);
const names = positionals.length > 0 ? positionals : Object.keys(usual);
const from = origin(values.commit);
/** The benches' device is the CPU twin, unless they say otherwise; files are named so. */
const cpu: Machine = { words: from.machine, slug: "cpu" };
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

async function runOne(name: string, bench: Bench): Promise<void> {
  const began = performance.now();
  const disturbed = await disturbance();
  const { machine = cpu, ...table } = await bench.run({
    ...{ model: values.model, cold: values.cold },
    ...{ only, shape: values.shape, device: values.device, peers: values.peers, steps },
    floors() {
      measured ??= measureFloors();
      return measured;
    },
    say(text) {
      if (process.stderr.isTTY) process.stderr.write(`bench: ${name}: ${text}\n`);
    },
    partly(rows, machine) {
      const told = Object.entries(rows.at(-1) ?? {}).filter(([, value]) => value !== null);
      process.stderr.write(`bench: ${name}: ${JSON.stringify(Object.fromEntries(told))}\n`);
      save(name, machine, rows);
    },
  });
  const rows = save(name, machine, table.rows);
  collected.push(...rows);
  if (values.json) for (const row of rows) console.log(JSON.stringify(row));
  else {
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    const notes = [...(table.notes ?? []), ...(disturbed === undefined ? [] : [disturbed])];
    console.log(`## ${bench.title}\n\n${markdown({ rows: table.shown ?? table.rows, notes })}\n`);
    console.log(`${machine.words} · commit ${from.commit} · ${from.date} · ${seconds} s\n`);
  }
}

/** Writes a bench's rows, after those of the benches before where all go into one file; returns them with where they come from. */
function save(name: string, machine: Machine, rows: readonly Row[]): Row[] {
  const named = rows.map((row) => ({ ...from, machine: machine.words, bench: name, ...row }));
  const place = values.keep ? join("bench", "results") : join(".cache", "bench");
  const file = values.out ?? join(root, place, `${name}-${machine.slug}.csv`);
  mkdirSync(dirname(file), { recursive: true });
  writeFileSync(file, csv(values.out === undefined ? named : [...collected, ...named]));
  return named;
}
