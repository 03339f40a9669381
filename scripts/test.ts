// npm test [-- [-v] [-t NAME] FILE …]: runs test/*.test.ts whose name contains one of the words given, each file in
// a Bun of its own, so that a crash or a hang in native code costs that file and no other; then test/conformance/ in
// each runtime, chosen by the same words ("conformance" for all of it).
//   -v, --verbose    show all output of every file (a failing file's is shown anyway)
//   -t, --name NAME  only tests whose name matches this regular expression
//   -j, --jobs N     files at a time
//       --device D   "cpu" (default: the twin), "cuda" or "cuda-plain": then only the files that open test/target.ts's device
//                    run, on the first GPU (plain: with the launches of older chips), and what only the twin has is skipped and
//                    counted

import { existsSync, readdirSync, readFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { parseArgs } from "node:util";
import { root, say } from "./native.ts";
import { buildForNode, bun, type Count, type Runtime, runtimes } from "./runtimes.ts";

const fileMs = 600_000; // a loop in native code never yields to a test's own time-out

/** Files that one process runs. */
interface Job {
  readonly label: string;
  readonly files: readonly string[];
  readonly runtime: Runtime;
}

interface Result extends Count {
  label: string;
  seconds: number;
  output: string;
  note: string;
}

async function runJob(
  { label, files, runtime }: Job,
  pattern: string | undefined,
  device: string,
): Promise<Result> {
  const start = performance.now();
  const ended = (note: string, output: string, count: Partial<Count> = {}): Result => {
    const { passed = 0, failed = 0, skipped = 0 } = count;
    // What went wrong outside any test counts as one failure.
    const broken = note !== "" && note !== "no test of that name";
    const seconds = (performance.now() - start) / 1000;
    return { label, passed, failed: failed + (broken ? 1 : 0), skipped, seconds, output, note };
  };
  const command = runtime.command(files, pattern);
  if (typeof command === "string") return { ...ended("", ""), skipped: files.length, note: command };
  const refused = runtime.name === "Node" ? buildForNode() : undefined;
  if (refused !== undefined) return ended("could not be compiled", refused);
  const child = Bun.spawn(command, {
    cwd: root,
    env: { ...process.env, NO_COLOR: "1", FORCE_COLOR: undefined, FREEKV_TEST_DEVICE: device },
    stdio: ["ignore", "pipe", "pipe"],
    timeout: fileMs,
    killSignal: "SIGKILL",
  });
  const [out, err] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
  ]);
  const output = out + err;
  const status = await child.exited;
  const count = runtime.count(output);
  if (count === undefined) {
    if (pattern !== undefined && /^error: regex .* matched 0 tests/m.test(err)) {
      return ended("no test of that name", output);
    }
    if (performance.now() - start >= fileMs) return ended(`killed after ${fileMs / 1000} s`, output);
    const died = child.signalCode !== null ? `died of ${child.signalCode}` : "ended before its tests did";
    return ended(died, output);
  }
  const { passed, failed, skipped } = count;
  if (passed + failed + skipped === 0) {
    return ended(pattern === undefined ? "has no tests" : "no test of that name", output, count);
  }
  return ended(status !== 0 && failed === 0 ? `exited with ${status}` : "", output, count);
}

function report(result: Result, verbose: boolean): void {
  const { label, passed, failed, skipped, seconds, output, note } = result;
  if (failed > 0 || verbose) process.stdout.write(`\n${output.trim()}\n\n`);
  const parts = [`${passed} passed`];
  if (failed > 0) parts.push(`${failed} failed`);
  if (skipped > 0) parts.push(`${skipped} skipped`);
  if (note !== "") parts.push(note);
  const time = `${seconds.toFixed(1)} s`.padStart(8);
  console.log(`${failed > 0 ? "FAIL" : "ok  "} ${label.padEnd(28)} ${time}   ${parts.join(", ")}`);
}

function readArguments() {
  try {
    return parseArgs({
      allowPositionals: true,
      options: {
        verbose: { type: "boolean", short: "v", default: false },
        name: { type: "string", short: "t" },
        jobs: { type: "string", short: "j", default: "1" },
        device: { type: "string", default: "cpu" },
      },
    });
  } catch (error) {
    say(error instanceof Error ? error.message : String(error));
    return process.exit(2);
  }
}

/** Whether a test file, or what it imports of test/, asks a target.ts for its device. */
function opensTarget(file: string, seen = new Set<string>()): boolean {
  if (basename(file) === "target.ts") return true;
  if (seen.has(file) || !file.startsWith(join(root, "test")) || !existsSync(file)) return false;
  seen.add(file);
  const imports = readFileSync(file, "utf8").matchAll(/ from "(\.{1,2}\/[^"]+\.ts)"/g);
  return [...imports].some(([, path = ""]) => opensTarget(join(dirname(file), path), seen));
}

/** A job for each file of test/, and one for each runtime of all the files of test/conformance. */
function jobsOf(words: readonly string[], device: string): Job[] {
  const filesOf = (folder: string): string[] => {
    const names = readdirSync(join(root, folder)).filter((name) => name.endsWith(".test.ts"));
    const paths = names.sort().map((name) => join(folder, name));
    return paths.filter(
      (path) => words.length === 0 || words.some((word) => path.slice("test/".length).includes(word)),
    );
  };
  const jobs: Job[] = filesOf("test").map((file) => ({
    label: basename(file),
    files: [join(root, file)],
    runtime: bun,
  }));
  const all = filesOf("test/conformance").map((file) => join(root, file));
  const files = device === "cpu" ? all : all.filter((file) => opensTarget(file));
  const own = device === "cpu" ? jobs : jobs.filter((job) => job.files.every((file) => opensTarget(file)));
  if (files.length === 0) return own;
  return [...own, ...runtimes.map((runtime) => ({ label: `conformance (${runtime.name})`, files, runtime }))];
}

async function main(): Promise<number> {
  const { values, positionals: words } = readArguments();
  const { device } = values;
  if (!["cpu", "cuda", "cuda-plain"].includes(device)) {
    say(`--device is cpu, cuda or cuda-plain, not ${device}`);
    return 2;
  }
  const jobs = jobsOf(words, device);
  const total: Count = { passed: 0, failed: 0, skipped: 0 };
  const failures: Result[] = [];
  const queue = [...jobs];
  const worker = async (): Promise<void> => {
    for (let job = queue.shift(); job !== undefined; job = queue.shift()) {
      const result = await runJob(job, values.name, device);
      report(result, values.verbose);
      total.passed += result.passed;
      total.failed += result.failed;
      total.skipped += result.skipped;
      if (result.failed > 0) failures.push(result);
    }
  };
  await Promise.all(Array.from({ length: Math.max(1, Number(values.jobs) || 1) }, worker));

  if (failures.length > 0) console.log(`\nfailed: ${failures.map((result) => result.label).join(", ")}`);
  if (jobs.length === 0) console.log(`no test file matches ${words.join(", ")}`);
  const skipped = total.skipped > 0 ? `, ${total.skipped} skipped` : "";
  console.log(`\n${total.passed} passed, ${total.failed} failed${skipped}`);
  // A run that tested nothing has shown nothing.
  return total.failed > 0 || total.passed === 0 ? 1 : 0;
}

process.exit(await main());
