// Every npm script goes through here, so that each one works in a fresh clone, under plain Node (20 or later)
// and under Bun alone: install what is missing, find Bun, run the script's steps.
// Set-up speaks on stderr only, and with nothing to do it says nothing.

import { spawn, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import {
  existsSync,
  readdirSync,
  readFileSync,
  realpathSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { constants } from "node:os";
import { delimiter, join } from "node:path";
import { fileURLToPath } from "node:url";

const root = fileURLToPath(new URL("..", import.meta.url));
const nodeModules = join(root, "node_modules");

/** A script is a list of Bun command lines; the caller's arguments go to the last. */
const scripts = {
  start: [["scripts/build.ts", "twin", "cuda:here"], ["lib/cli.ts"]],
  test: [["scripts/build.ts", "twin", "cuda:here", "ptx"], ["scripts/test.ts"]],
  bench: [["scripts/build.ts", "twin", "cuda:here"], ["bench/run.ts"]],
  check: [["scripts/check.ts"]],
  build: [["scripts/build.ts"]],
  "build:twin": [["scripts/build.ts", "twin"]],
  prepack: [["scripts/build.ts", "js", "twin"]],
};

const [name, ...args] = process.argv.slice(2);
const steps = scripts[name];
if (steps === undefined) {
  say(`no script "${name ?? ""}"; there are: ${Object.keys(scripts).join(", ")}`);
  process.exit(2);
}
install();
const bun = findBun();
for (const [i, step] of steps.entries()) {
  const last = i === steps.length - 1;
  const [script, ...words] = step;
  const code = await run(bun, [join(root, script), ...words, ...(last ? args : [])]);
  if (code !== 0 || last) process.exit(code);
}

function say(text) {
  process.stderr.write(`freekv: ${text}\n`);
}

function onPath(program) {
  for (const dir of (process.env.PATH ?? "").split(delimiter)) {
    if (dir !== "" && existsSync(join(dir, program))) return join(dir, program);
  }
  return undefined;
}

/** Install when node_modules is missing or was made from another lock file. */
function install() {
  const stamp = join(nodeModules, ".freekv-lock");
  const lock = createHash("sha256")
    .update(readFileSync(join(root, "package-lock.json")))
    .digest("hex");
  if (existsSync(stamp) && readFileSync(stamp, "utf8") === lock) return;

  // No package of ours needs its install script, and bun's would move the binary that findBun looks for.
  const npm = onPath("npm");
  const [program, ...words] =
    npm !== undefined
      ? [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
      : [bunItself() ?? onPath("bun"), "install", "--frozen-lockfile", "--ignore-scripts"];
  if (program === undefined) {
    say("neither npm nor bun is on PATH; install Node 20 or later with npm, or Bun");
    process.exit(3);
  }
  say(`installing packages (${npm !== undefined ? "npm ci" : "bun install"}) …`);
  const start = performance.now();
  rmSync(stamp, { force: true });
  const { status, error, stdout, stderr } = spawnSync(program, words, { cwd: root, encoding: "utf8" });
  if (status !== 0) {
    process.stderr.write(error !== undefined ? `${error.message}\n` : `${stdout}${stderr}`);
    say("packages could not be installed; the lines above say why");
    process.exit(3);
  }
  writeFileSync(stamp, lock);
  say(`packages installed in ${((performance.now() - start) / 1000).toFixed(1)} s`);
}

/** The Bun we run under. `bun run` may start it through a link named `node`, under which it acts as Node would. */
function bunItself() {
  return process.versions.bun === undefined ? undefined : realpathSync(process.execPath);
}

function findBun() {
  const itself = bunItself();
  if (itself !== undefined) return itself;

  const oven = join(nodeModules, "@oven");
  const candidates = (existsSync(oven) ? readdirSync(oven) : []).map((each) =>
    join(oven, each, "bin", "bun"),
  );
  candidates.push(join(nodeModules, "bun", "bin", "bun.exe"));
  for (const each of candidates) {
    // Without bun's install script the second is a stub of some hundred bytes; and of two builds for one
    // platform (glibc, musl) only one runs.
    if (existsSync(each) && statSync(each).size > 1e6 && version(each) !== undefined) return each;
  }
  const pinned = JSON.parse(readFileSync(join(root, "package.json"), "utf8")).devDependencies.bun;
  const global = onPath("bun");
  if (global !== undefined && version(global) === pinned) return global;
  say(
    `no Bun for ${process.platform}-${process.arch} in node_modules; install Bun ${pinned} and put it on PATH`,
  );
  return process.exit(3);
}

/** What `bun --version` says, or undefined where that binary does not run here. */
function version(bun) {
  const { status, stdout } = spawnSync(bun, ["--version"], { encoding: "utf8" });
  return status === 0 ? stdout.trim() : undefined;
}

/** Run one step with our standard streams; resolve with its exit code (128 + n for signal n, as a shell has it). */
function run(bun, words) {
  return new Promise((resolve) => {
    const child = spawn(bun, words, { stdio: "inherit" });
    for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) {
      process.on(signal, () => {
        // A terminal's Ctrl-C has reached the child already: a second one could mean "now, at once" to it.
        if (signal !== "SIGINT" || !process.stdin.isTTY) child.kill(signal);
      });
    }
    child.on("error", (error) => {
      say(error.message);
      resolve(3);
    });
    child.on("exit", (code, signal) => resolve(code ?? 128 + constants.signals[signal]));
  });
}
