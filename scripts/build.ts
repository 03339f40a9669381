// npm run build [twin] [js] [cuda] [cuda:SM] [cuda:here] [ptx]: without a word, the first three. `npm start`, `npm test` and
// `npm run bench` build the twin and cuda:here, which takes milliseconds when nothing has changed.
//   twin  dist/native/<platform>-<arch>/libfreekv_cpu.so   portable: never -march=native
//   js    dist/lib, dist/ffi                               JS, types and maps for Node and Deno
//   cuda  dist/native/<platform>-<arch>/libfreekv_cuda.so  every architecture we compile for
//   cuda:SM    the same for one architecture alone, e.g. cuda:90a: what CI compiles
//   cuda:here  the same for this machine's GPU; nothing where no driver and no device answers
//   ptx        .cache/ptx/NAME.ptx   of test/examples/NAME.cu and test/kernels/NAME.cu; nothing where there is no nvcc

import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { basename, join } from "node:path";
import {
  BuildError,
  buildLibrary,
  findProgram,
  isBuilt,
  type Library,
  machineError,
  root,
  say,
} from "./native.ts";

const include = "-Icuda";

/**
 * Node and Deno close a library when the environment that loaded it ends: a worker, or the process. A device that is still open
 * then has threads that run in it, so that its code stays where it is. (macOS closes no library that has thread-local variables.)
 */
const stays = (linker: string): string[] =>
  process.platform === "darwin" ? [] : [`${linker}-z`, `${linker}nodelete`];

/** Paths from the root. */
function sources(dir: string, extension: string): string[] {
  const full = join(root, dir);
  const names = existsSync(full) ? readdirSync(full) : [];
  const chosen = names.filter((name) => name.endsWith(extension)).sort();
  return chosen.map((name) => join(dir, name));
}

function cxx(): string {
  // CXX chooses the compiler and nothing else: flags are ours, because results must not depend on them.
  const wanted = process.env.CXX;
  const names = wanted !== undefined && wanted !== "" ? [wanted] : ["g++", "c++", "clang++"];
  const found = findProgram(names);
  if (found !== undefined) return found;
  const hint = process.platform === "darwin" ? "xcode-select --install" : "e.g. apt-get install g++";
  throw new BuildError(
    `no C++ compiler: ${names.join(", ")} not found; install one (${hint}) or set CXX to one`,
    3,
  );
}

function twin(): Library {
  const machine = process.arch === "x64" ? ["-march=x86-64"] : [];
  return {
    name: "freekv_cpu",
    title: "CPU twin",
    sources: [...sources("cuda/cpu", ".cpp"), ...sources("cuda", ".cpp")],
    compileFlags: [
      ...["-std=c++20", "-O3", ...machine, "-fPIC", "-fvisibility=hidden", "-pthread"],
      ...["-Wall", "-Wextra", "-Wno-psabi", include],
    ],
    linkFlags: ["-shared", "-pthread", ...stays("-Wl,")],
    compiler: cxx,
  };
}

/** Real code for the data-centre and desktop chips we know of, and PTX of the newest for those to come. */
const architectures: readonly string[] = ["80", "86", "89", "90a", "100", "120"];

function findNvcc(): string | undefined {
  return findProgram(["nvcc", "/usr/local/cuda/bin/nvcc"]);
}

function nvcc(): string {
  const found = findNvcc();
  if (found !== undefined) return found;
  throw new BuildError(
    "CUDA not compiled: no nvcc; install the CUDA toolkit (13 or later) and put nvcc on PATH",
    3,
  );
}

/** For these architectures. The runtime is linked in and its symbols hidden; the driver is looked for at run time. */
function cuda(sms: readonly string[], ptx: readonly string[]): Library {
  return {
    name: "freekv_cuda",
    title: "CUDA library",
    sources: [...sources("cuda", ".cu"), ...sources("cuda", ".cpp")],
    compileFlags: [
      ...["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", include],
      ...sms.map((sm) => `-gencode=arch=compute_${sm},code=sm_${sm}`),
      ...ptx.map((sm) => `-gencode=arch=compute_${sm},code=compute_${sm}`),
    ],
    linkFlags: ["-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL", ...stays("-Xlinker=")],
    compiler: nvcc,
  };
}

const everyCuda = (): Library => cuda(architectures, architectures.slice(-1));

/** The architecture of this machine's first GPU, or undefined where no driver and no device answers. */
function architectureHere(): string | undefined {
  const program = findProgram(["nvidia-smi"]);
  if (program === undefined) return undefined;
  const { stdout } = Bun.spawnSync([program, "--query-gpu=compute_cap", "--format=csv,noheader"]);
  const [, major, minor] = /^(\d+)\.(\d+)/.exec(stdout.toString()) ?? [];
  if (major === undefined || minor === undefined || Number(major) < 8) return undefined;
  return `${major}${minor}` === "90" ? "90a" : `${major}${minor}`;
}

async function buildCudaHere(): Promise<void> {
  // With all architectures in it the library fits any device: it is not replaced by a smaller one.
  if (isBuilt(everyCuda())) return;
  const sm = architectureHere();
  if (sm === undefined) return;
  if (findNvcc() !== undefined) await buildNative(cuda([sm], []));
  else
    say(
      "a GPU answers, but there is no nvcc to build the CUDA library with; install the CUDA toolkit (13 or later)",
    );
}

/** The kernels of examples and tests, as PTX that every GPU we support can run. */
async function buildPtx(): Promise<void> {
  const compiler = findNvcc();
  if (compiler === undefined) return;
  const dir = join(root, ".cache", "ptx");
  for (const source of [...sources("test/examples", ".cu"), ...sources("test/kernels", ".cu")]) {
    const words = ["-ptx", "-O3", "-std=c++20", "-arch=compute_80", source];
    const made = createHash("sha256")
      .update(JSON.stringify(words))
      .update(readFileSync(join(root, source)));
    const [file, stamp] = [".ptx", ".stamp"].map((end) => join(dir, `${basename(source, ".cu")}${end}`)) as [
      string,
      string,
    ];
    const key = made.digest("hex");
    if (existsSync(file) && existsSync(stamp) && readFileSync(stamp, "utf8") === key) continue;
    mkdirSync(dir, { recursive: true });
    const temporary = `${file}.${process.pid}.tmp`;
    const { success, stderr } = Bun.spawnSync([compiler, ...words, "-o", temporary], { cwd: root });
    if (!success) throw new BuildError(`could not compile ${basename(source)}:\n${stderr}`, 1);
    rmSync(stamp, { force: true });
    renameSync(temporary, file);
    writeFileSync(stamp, key);
  }
}

/** Of the files that the JS is made from: another hash, another build. */
function hashOfSources(): string {
  const sum = createHash("sha256");
  for (const dir of ["lib", "ffi"]) {
    const names = readdirSync(join(root, dir), { recursive: true, encoding: "utf8" });
    for (const name of names.filter((each) => each.endsWith(".ts")).sort()) {
      sum.update(`${dir}/${name}\n`).update(readFileSync(join(root, dir, name)));
    }
  }
  for (const name of ["tsconfig.json", "tsconfig.build.json", "package-lock.json"]) {
    sum.update(readFileSync(join(root, name)));
  }
  return sum.digest("hex");
}

async function buildJs(): Promise<void> {
  const start = performance.now();
  const [dist, stamp] = [join(root, "dist"), join(root, ".cache", "js.stamp")];
  const parts = ["lib", "ffi"];
  const key = hashOfSources();
  const built = parts.every((part) => existsSync(join(dist, part)));
  if (built && existsSync(stamp) && readFileSync(stamp, "utf8") === key) return;

  // Aside first: a file that was removed from lib/ must not live on in the package, and a failed build costs nothing.
  // Beside dist, because the maps name their sources by paths from here.
  const aside = join(root, `dist.${process.pid}.tmp`);
  try {
    const words = ["node_modules/typescript/bin/tsc", "-p", "tsconfig.build.json", "--outDir", aside];
    const tsc = Bun.spawn([process.execPath, ...words], {
      cwd: root,
      stdio: ["ignore", "inherit", "inherit"],
    });
    if ((await tsc.exited) !== 0) throw new BuildError("the TypeScript could not be built", 1);
    rmSync(stamp, { force: true });
    mkdirSync(dist, { recursive: true });
    for (const part of parts) {
      rmSync(join(dist, part), { recursive: true, force: true });
      renameSync(join(aside, part), join(dist, part));
    }
    writeFileSync(stamp, key);
  } finally {
    rmSync(aside, { recursive: true, force: true });
  }
  say(`JS and types built in ${((performance.now() - start) / 1000).toFixed(1)} s`);
}

async function buildNative(library: Library): Promise<void> {
  if (library.sources.length === 0) say(`${library.title}: no source files, nothing to compile`);
  else await buildLibrary(library);
}

const targets: Record<string, () => Promise<void>> = {
  twin: () => buildNative(twin()),
  js: buildJs,
  cuda: () => buildNative(everyCuda()),
  "cuda:here": buildCudaHere,
  ptx: buildPtx,
  ...Object.fromEntries(architectures.map((sm) => [`cuda:${sm}`, () => buildNative(cuda([sm], []))])),
};
const usual: readonly string[] = ["twin", "js", "cuda"];

async function main(words: readonly string[]): Promise<number> {
  const unknown = words.filter((word) => !(word in targets));
  if (unknown.length > 0) {
    say(`nothing is called ${unknown.join(", ")}; build takes ${Object.keys(targets).join(", ")}`);
    return 2;
  }
  let code = 0;
  for (const [name, build] of Object.entries(targets)) {
    if (!(words.length > 0 ? words : usual).includes(name)) continue;
    try {
      await build();
    } catch (error) {
      const { message, exitCode } = error instanceof BuildError ? error : machineError(error);
      // The other targets are still worth having: no nvcc does not cost a twin.
      say(message);
      if (code !== 1) code = exitCode;
    }
  }
  return code;
}

process.exit(await main(process.argv.slice(2)));
