// npm test [-- [-v] [-t NAME] FILE …]: runs test/*.test.ts whose name contains one of the words given, each file in
// a Bun of its own, so that a crash or a hang in native code costs that file and no other.
//   -v, --verbose    show all output of every file (a failing file's is shown anyway)
//   -t, --name NAME  only tests whose name matches this regular expression
//   -j, --jobs N     files at a time

import { readdirSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { root, say } from "./native.ts";

const testMs = 60_000; // of a test that states no time-out of its own
const fileMs = 600_000; // a loop in native code never yields to a test's own time-out
const dir = join(root, "test");

interface Count {
  passed: number;
  failed: number;
  skipped: number;
}

interface Result extends Count {
  file: string;
  seconds: number;
  output: string;
  note: string;
}

/** What Bun counted, or undefined when it never came to its closing lines. */
function readCount(output: string): Count | undefined {
  const end = output.lastIndexOf("\nRan ");
  const summary = output.slice(0, end);
  const count = (word: string): number => {
    const lines = [...summary.matchAll(new RegExp(`^ (\\d+) ${word}$`, "gm"))];
    return Number(lines.at(-1)?.[1] ?? 0);
  };
  if (end < 0) return undefined;
  return { passed: count("pass"), failed: count("fail"), skipped: count("skip") + count("todo") };
}

async function runFile(file: string, name: string | undefined): Promise<Result> {
  const start = performance.now();
  const words = ["test", "--no-orphans", `--timeout=${testMs}`, join(dir, file)];
  if (name !== undefined) words.push("--test-name-pattern", name);
  const child = Bun.spawn([process.execPath, ...words], {
    cwd: root,
    env: { ...process.env, NO_COLOR: "1", FORCE_COLOR: undefined },
    stdio: ["ignore", "pipe", "pipe"],
    timeout: fileMs,
    killSignal: "SIGKILL",
  });
  const [out, err] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
  ]);
  const status = await child.exited;
  const count = readCount(err);
  const { passed, failed, skipped } = count ?? { passed: 0, failed: 0, skipped: 0 };
  let note = "";
  if (count === undefined && name !== undefined && /^error: regex .* matched 0 tests/m.test(err)) {
    note = "no test of that name";
  } else if (count === undefined) {
    note = child.signalCode !== null ? `died of ${child.signalCode}` : "ended before its tests did";
    if (performance.now() - start >= fileMs) note = `killed after ${fileMs / 1000} s`;
  } else if (passed + failed + skipped === 0) {
    note = "has no tests";
  } else if (status !== 0 && failed === 0) {
    note = `exited with ${status}`;
  }
  // A file that went wrong outside any test counts as one failure.
  const broken = note !== "" && note !== "no test of that name";
  const seconds = (performance.now() - start) / 1000;
  return { file, passed, failed: failed + (broken ? 1 : 0), skipped, seconds, output: out + err, note };
}

function report(result: Result, verbose: boolean): void {
  const { file, passed, failed, skipped, seconds, output, note } = result;
  if (failed > 0 || verbose) process.stdout.write(`\n${output.trim()}\n\n`);
  const parts = [`${passed} passed`];
  if (failed > 0) parts.push(`${failed} failed`);
  if (skipped > 0) parts.push(`${skipped} skipped`);
  if (note !== "") parts.push(note);
  const time = `${seconds.toFixed(1)} s`.padStart(8);
  console.log(`${failed > 0 ? "FAIL" : "ok  "} ${file.padEnd(28)} ${time}   ${parts.join(", ")}`);
}

function readArguments() {
  try {
    return parseArgs({
      allowPositionals: true,
      options: {
        verbose: { type: "boolean", short: "v", default: false },
        name: { type: "string", short: "t" },
        jobs: { type: "string", short: "j", default: "1" },
      },
    });
  } catch (error) {
    say(error instanceof Error ? error.message : String(error));
    return process.exit(2);
  }
}

async function main(): Promise<number> {
  const { values, positionals: words } = readArguments();
  const all = readdirSync(dir).filter((file) => file.endsWith(".test.ts"));
  const files = all.filter((file) => words.length === 0 || words.some((word) => file.includes(word))).sort();
  const total: Count = { passed: 0, failed: 0, skipped: 0 };
  const failures: Result[] = [];
  const queue = [...files];
  const worker = async (): Promise<void> => {
    for (let file = queue.shift(); file !== undefined; file = queue.shift()) {
      const result = await runFile(file, values.name);
      report(result, values.verbose);
      total.passed += result.passed;
      total.failed += result.failed;
      total.skipped += result.skipped;
      if (result.failed > 0) failures.push(result);
    }
  };
  await Promise.all(Array.from({ length: Math.max(1, Number(values.jobs) || 1) }, worker));

  if (failures.length > 0) console.log(`\nfailed: ${failures.map((result) => result.file).join(", ")}`);
  if (files.length === 0) console.log(`no test file matches ${words.join(", ")}`);
  const skipped = total.skipped > 0 ? `, ${total.skipped} skipped` : "";
  console.log(`\n${total.passed} passed, ${total.failed} failed${skipped}`);
  // A run that tested nothing has shown nothing.
  return total.failed > 0 || total.passed === 0 ? 1 : 0;
}

process.exit(await main());
