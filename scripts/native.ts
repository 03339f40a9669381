// Compiles one native library: one object per source file, in parallel, rebuilt by content hash.
// An object's name holds the hash of all that made it, so a cached object is never stale, and two builds
// at once cannot spoil each other's: every file appears under its name by a rename.

import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from "node:fs";
import { availableParallelism } from "node:os";
import { basename, delimiter, dirname, join, relative } from "node:path";
import { fileURLToPath } from "node:url";

export const root: string = fileURLToPath(new URL("..", import.meta.url));
const platform = `${process.platform}-${process.arch}`;
const cache = join(root, ".cache", platform);
const dist = join(root, "dist", "native", platform);

export interface Library {
  /** `freekv_cpu` makes `libfreekv_cpu.so`, which is what Bun's, Deno's and Node's loaders take on every platform. */
  name: string;
  /** For the lines that a person reads: "CPU twin". */
  title: string;
  /** Paths from the root, which the compiler runs in: where the clone lies is no part of what is built. */
  sources: string[];
  compileFlags: string[];
  linkFlags: string[];
  /** Called only when something is to be compiled or linked: a built library needs no compiler. */
  compiler: () => string;
}

/** Something to be told in one line, with the exit code that goes with it: 1 our fault, 3 this machine's. */
export class BuildError extends Error {
  readonly exitCode: 1 | 3;
  constructor(message: string, exitCode: 1 | 3) {
    super(message);
    this.exitCode = exitCode;
  }
}

/** What it is that could not be read or written here: a read-only folder, a full disk. Anything else is thrown on. */
export function machineError(error: unknown): BuildError {
  if (!(error instanceof Error && "syscall" in error && "code" in error)) throw error;
  return new BuildError(`cannot build here: ${error.message}; .cache/ and dist/ must be writable`, 3);
}

export function say(text: string): void {
  process.stderr.write(`freekv: ${text}\n`);
}

/** The first of these programs on PATH. A program given as a path is taken as it is. */
export function findProgram(names: readonly string[]): string | undefined {
  const dirs = (process.env.PATH ?? "").split(delimiter).filter((dir) => dir !== "");
  for (const name of names) {
    const places = name.includes("/") ? [name] : dirs.map((dir) => join(dir, name));
    const found = places.find((place) => existsSync(place));
    if (found !== undefined) return found;
  }
  return undefined;
}

interface Plan {
  units: { source: string; object: string }[];
  file: string;
  stampFile: string;
  key: string;
  built: boolean;
}

function planOf(library: Library): Plan {
  const texts = new Map<string, string>();
  const units = library.sources.map((source) => {
    const key = hash([...library.compileFlags, ...closure(join(root, source), texts)]);
    return { source, object: join(cache, `${library.name}-${basename(source)}-${key}.o`) };
  });
  const file = join(dist, `lib${library.name}.so`);
  const stampFile = join(cache, `lib${library.name}.stamp`);
  const key = hash([...library.linkFlags, ...units.map((unit) => basename(unit.object))]);
  const built =
    existsSync(file) && existsSync(stampFile) && readFileSync(stampFile, "utf8") === stamp(key, file);
  return { units, file, stampFile, key, built };
}

/** Whether the library is there, made from what is there now. */
export function isBuilt(library: Library): boolean {
  return planOf(library).built;
}

/** Build the library if anything that goes into it has changed; return whether it was built. */
export async function buildLibrary(library: Library): Promise<boolean> {
  const start = performance.now();
  const { units, file, stampFile, key, built } = planOf(library);
  if (built) return false;

  const compiler = library.compiler();
  mkdirSync(cache, { recursive: true });
  mkdirSync(dist, { recursive: true });
  const missing = units.filter((unit) => !existsSync(unit.object));
  say(
    `building the ${library.title}: ${missing.length} of ${units.length} files with ${basename(compiler)} …`,
  );
  const failed: string[] = [];
  await inParallel(missing, async ({ source, object }) => {
    const compile = (path: string): string[] => [compiler, ...library.compileFlags, "-c", source, "-o", path];
    if (!(await intoPlace(object, compile))) failed.push(source);
  });
  // All files are tried first: one visit shows all there is to mend.
  if (failed.length > 0) throw new BuildError(`could not compile ${failed.join(", ")}`, 1);
  const objects = units.map((unit) => unit.object);
  // The stamp names this very file: if a concurrent build of another state of the tree puts its own library in
  // place after ours, the stamp fits neither and the next build links again.
  const link = (path: string): string[] => [compiler, ...library.linkFlags, "-o", path, ...objects];
  if (!(await intoPlace(file, link, (path) => writeFileSync(stampFile, stamp(key, path))))) {
    throw new BuildError(`could not link ${relative(root, file)}`, 1);
  }
  say(`${library.title} built in ${((performance.now() - start) / 1000).toFixed(1)} s`);
  return true;
}

function hash(parts: readonly string[]): string {
  return createHash("sha256").update(JSON.stringify(parts)).digest("hex").slice(0, 16);
}

function stamp(key: string, library: string): string {
  const { size, mtimeMs } = statSync(library);
  return `${key} ${size} ${mtimeMs}\n`;
}

/**
 * A source's text and that of every header of ours it includes, each once, in the order first met. Conditionals
 * are not evaluated: a header too many costs a rebuild too many, never one too few. System headers are not read.
 */
function closure(source: string, texts: Map<string, string>): string[] {
  const seen = new Set<string>();
  const visit = (path: string): void => {
    if (seen.has(path)) return;
    const text = texts.get(path) ?? readFileSync(path, "utf8");
    texts.set(path, text);
    seen.add(path);
    for (const [, name] of text.matchAll(/^[ \t]*#[ \t]*include[ \t]*"([^"]+)"/gm)) {
      if (name === undefined) continue;
      const places = [join(dirname(path), name), join(root, "cuda", name)];
      const found = places.find((place) => existsSync(place));
      if (found !== undefined) visit(found);
    }
  };
  visit(source);
  // Paths count too: a file renamed or moved is another translation unit (__FILE__, relative includes).
  return [...seen].flatMap((path) => [relative(root, path), texts.get(path) ?? ""]);
}

async function inParallel<T>(items: readonly T[], work: (item: T) => Promise<void>): Promise<void> {
  const queue = [...items];
  const worker = async (): Promise<void> => {
    for (let item = queue.shift(); item !== undefined; item = queue.shift()) await work(item);
  };
  await Promise.all(Array.from({ length: availableParallelism() }, worker));
}

/** Run a compiler whose output is to become `path`, and show what it says; return whether it succeeded. */
async function intoPlace(
  path: string,
  command: (temporary: string) => string[],
  before?: (temporary: string) => void,
): Promise<boolean> {
  const temporary = `${path}.${process.pid}.tmp`;
  try {
    const child = Bun.spawn(command(temporary), { cwd: root, stdout: "pipe", stderr: "pipe" });
    const [out, err] = await Promise.all([
      new Response(child.stdout).text(),
      new Response(child.stderr).text(),
    ]);
    process.stderr.write(out + err);
    if ((await child.exited) !== 0) return false;
    before?.(temporary);
    renameSync(temporary, path);
    return true;
  } finally {
    rmSync(temporary, { force: true });
  }
}
