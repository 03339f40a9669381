// What the host pays, under each runtime: calls by their number and types of arguments, launches, polls, reads of pinned
// memory, structs, objects.

import { existsSync, readdirSync } from "node:fs";
import { join } from "node:path";
import type { Bench, BenchOptions } from "./bench.ts";
import { root } from "./machine.ts";
import { compile } from "./native.ts";
import type { Row } from "./table.ts";

interface Runtime {
  readonly name: string;
  /** The command line without the script, or why it cannot be run here. */
  readonly command: readonly string[] | string;
  /** Bun runs the TypeScript; the others run JavaScript, on dist. */
  readonly source: boolean;
}
interface Measured {
  readonly case: string;
  readonly told: boolean;
  readonly median: number;
  readonly p25: number;
  readonly p75: number;
  readonly best: number;
}

const source = join(root, "bench", "ffi-cases.ts");

function runs(program: string): boolean {
  try {
    return Bun.spawnSync([program, "--version"], { stdout: "ignore", stderr: "ignore" }).success;
  } catch {
    return false;
  }
}

/** The binary in the npm package `deno`: of two builds for one platform (glibc, musl), the one that runs. */
function denoProgram(): string | undefined {
  const dir = join(root, "node_modules", "@deno");
  const folders = existsSync(dir) ? readdirSync(dir) : [];
  return folders.flatMap((each) => [join(dir, each, "deno"), join(dir, each, "deno.exe")]).find(runs);
}

function runtimes(): Runtime[] {
  const deno = denoProgram();
  const denoWords = ["run", "--quiet", "--no-lock", "--no-check", "--allow-all"];
  return [
    { name: "Bun", command: [process.execPath, "run"], source: true },
    {
      name: "Deno",
      command: deno === undefined ? "node_modules has no Deno for this machine" : [deno, ...denoWords],
      source: false,
    },
    { name: "Node", command: runs("node") ? ["node"] : "node is not on PATH", source: false },
  ];
}

/** The cases as JavaScript, and the package as Node and Deno read it. */
async function build(): Promise<string> {
  const js = Bun.spawnSync([process.execPath, join(root, "scripts", "build.ts"), "js"], { cwd: root });
  if (!js.success) throw new Error(`the JavaScript could not be built:\n${js.stdout}${js.stderr}`);
  const outdir = join(root, ".cache", "bench");
  const external = ["#backend", "freekv/cuda", "mitata"];
  const built = await Bun.build({ entrypoints: [source], outdir, target: "node", external });
  if (!built.success) throw new Error(`${source} could not be built: ${built.logs.join("\n")}`);
  return join(outdir, "ffi-cases.js");
}

function measureIn(command: readonly string[], script: string, library: string): Measured[] {
  const { success, stdout, stderr } = Bun.spawnSync([...command, script, library], { cwd: root });
  if (!success) throw new Error(`${command[0]} failed:\n${stdout}${stderr}`);
  const lines = stdout.toString().trim().split("\n");
  return lines.map((line) => JSON.parse(line) as Measured);
}

/** "Bun 1.4.5" */
function versionOf(name: string, command: readonly string[]): string {
  const said = Bun.spawnSync([command[0] as string, "--version"]).stdout.toString();
  return `${name} ${/\d+\.\d+\.\d+/.exec(said)?.[0] ?? ""}`;
}

/** Two significant digits below ten, three above, and thousands marked. */
function readable(ns: number): string {
  return Number(ns.toPrecision(ns < 10 ? 2 : 3)).toLocaleString("en-US");
}

export const ffi: Bench = {
  title: "FFI: what the host pays",
  async run({ say }: BenchOptions) {
    const library = compile("calls", { shared: true });
    const script = await build();
    const notes = ["mitata; the least median of five rounds; the CPU twin's device."];
    const versions: string[] = [];
    const rows: Row[] = [];
    const told = new Set<string>();
    for (const { name, command, source: runsSource } of runtimes()) {
      if (typeof command === "string") {
        notes.push(`Without ${name}: ${command}.`);
        continue;
      }
      say(name);
      versions.push(versionOf(name, command));
      for (const each of measureIn(command, runsSource ? source : script, library)) {
        const { case: title, median, p25, p75, best } = each;
        if (each.told) told.add(title);
        rows.push({ runtime: name, case: title, unit: "ns", median, p25, p75, best });
      }
    }
    const names = [...new Set(rows.map((row) => row.runtime as string))];
    // The README's table: test/ffi-table.test.ts holds it to the CSV.
    const shown = [...told].map((title) => {
      const of = (name: string): string => {
        const found = rows.find((row) => row.runtime === name && row.case === title);
        return found === undefined ? "–" : readable(found.median as number);
      };
      return { "ns, median": title, ...Object.fromEntries(names.map((name) => [name, of(name)])) };
    });
    return { rows, shown, notes: [...notes, `${versions.join(", ")}.`] };
  },
};
