/// <reference lib="esnext.disposable" preserve="true" />
// The package as npm packs it: its maps and types are right, and installed in an empty project it works on all three
// runtimes, with no compiler and nothing of our devDependencies.

import { spawnSync } from "node:child_process";
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { checkPackage, createPackageFromTarballData } from "@arethetypeswrong/core";
import { assert, assertArrayIncludes, assertEquals, assertGreater, assertMatch } from "@std/assert";
import { publint } from "publint";
import { formatMessage } from "publint/utils";
import { packageRoot } from "../ffi/root.ts";

const root = packageRoot();
const onPath = (name: string): boolean => spawnSync(name, ["--version"], { stdio: "ignore" }).status === 0;
const skip = onPath("node") && onPath("npm") ? false : "node and npm are not on PATH";
const timeout = 120_000;

let dir = "";
let tarball = "";
let files: string[] = [];

function run(
  program: string,
  words: readonly string[],
  cwd: string,
  env: NodeJS.ProcessEnv = process.env,
): string {
  const { status, stdout, stderr, error } = spawnSync(program, words, { cwd, env, encoding: "utf8" });
  assertEquals(status, 0, `${program} ${words.join(" ")}\n${error?.message ?? ""}${stdout}${stderr}`);
  return stdout;
}

/** The binary in the npm package `deno`: of two builds for one platform (glibc, musl), the one that runs. */
function denoProgram(): string {
  const folder = join(root, "node_modules", "@deno");
  const found = readdirSync(folder).flatMap((each) => [
    join(folder, each, "deno"),
    join(folder, each, "deno.exe"),
  ]);
  const program = found.find(onPath);
  assert(program !== undefined, `no Deno in ${folder} runs here`);
  return program;
}

before(() => {
  if (skip) return;
  dir = mkdtempSync(join(tmpdir(), "freekv-package-"));
  run(process.execPath, ["scripts/build.ts", "js", "twin"], root);
  const words = ["pack", "--ignore-scripts", "--json", "--pack-destination", dir];
  // As on a machine with a GPU, whose build is for that GPU alone.
  const otherBuild = join(root, "dist", "native", `none-${process.pid}`);
  mkdirSync(otherBuild, { recursive: true });
  let packed: { filename: string; files: { path: string }[] };
  try {
    writeFileSync(join(otherBuild, "libfreekv_cuda.so"), "");
    [packed] = JSON.parse(run("npm", words, root));
  } finally {
    rmSync(otherBuild, { recursive: true });
  }
  tarball = join(dir, packed.filename);
  files = packed.files.map((file) => file.path);
});
after(() => {
  if (dir !== "") rmSync(dir, { recursive: true, force: true });
});

test("it holds the JavaScript, the types, the source, the twin and the demo model, and nothing else", {
  skip,
}, () => {
  assertArrayIncludes(files, [
    ...["dist/lib/index.js", "dist/lib/index.d.ts", "dist/lib/index.js.map", "dist/lib/cli.js"],
    ...["dist/ffi/node.js", "dist/ffi/deno.js", "ffi/bun.ts", "lib/index.ts", "cuda/freekv.h"],
    ...[`dist/native/${process.platform}-${process.arch}/libfreekv_cpu.so`, "lib/demo-model/tokenizer.json"],
    ...["package.json", "LICENSE", "README.md"],
  ]);
  const strange = files.filter(
    (file) => !/^(dist\/(lib|ffi|native)|lib|ffi|cuda|scripts)\/|^[^/]+$/.test(file),
  );
  assertEquals(strange, []);
  const native = files.filter((file) => file.startsWith("dist/native/"));
  assertEquals(
    native.filter((file) => !/^dist\/native\/[^/]+\/libfreekv_cpu\.\w+$/.test(file)),
    [],
    "no CUDA library",
  );
  // Types that name Bun's would be errors in everyone else's program.
  const declarations = files.filter((file) => file.endsWith(".d.ts"));
  const naming = declarations.filter((file) =>
    /bun-types|from "bun/.test(readFileSync(join(root, file), "utf8")),
  );
  assertEquals([declarations.length > 20, naming], [true, []]);
});

test("publint has nothing to say", { timeout, skip }, async () => {
  const data = readFileSync(tarball);
  const { messages, pkg } = await publint({ pack: { tarball: new Uint8Array(data).buffer }, strict: true });
  assertEquals(
    messages.map((message) => formatMessage(message, pkg ?? {}, { color: false })),
    [],
  );
});

test("the types resolve for whoever imports ES modules", { timeout, skip }, async () => {
  const result = await checkPackage(createPackageFromTarballData(new Uint8Array(readFileSync(tarball))));
  assert(result.types !== false, "has no types");
  assertArrayIncludes(Object.keys(result.entrypoints), [".", "./cuda"]);
  // The profile "esm-only": neither CommonJS nor the resolution that knows no exports.
  const others = new Set(["node10", "node16-cjs"]);
  const problems = result.problems.filter(
    (each) => !("resolutionKind" in each && others.has(each.resolutionKind)),
  );
  assertEquals(problems, []);
});

const program = `
import { existsSync } from "node:fs";
import { demoModel, Engine } from "freekv";
import * as cuda from "freekv/cuda";

const device = cuda.Device.open({ device: "cpu" });
const [stream, there, host] = [device.stream(), device.alloc(64), device.pinned(64)];
const bytes = host.view(Uint8Array);
stream.copy(there, Uint8Array.from({ length: 64 }, (_, i) => 3 * i));
stream.copy(host, there);
stream.synchronize();
const told = { entry: import.meta.resolve("freekv/cuda"), library: device.libraryPath, copied: [...bytes], answers: [] };
device[Symbol.dispose]();
told.detached = bytes.length;

const model = process.argv[2];
const engine = await Engine.load(model, { device: "cpu", pageSize: 16, budget: 64, sink: 16, window: 16 });
for (const options of [{}, { temperature: 1, seed: 9 }, { policy: "full" }])
  told.answers.push((await engine.generate(Array.from({ length: 200 }, (_, i) => 3 + (i * i) % 90), { maxTokens: 32, ignoreEos: true, ...options }).result()).tokens);
await engine[Symbol.asyncDispose]();

if (existsSync(new URL(demoModel + "/model.safetensors"))) {
  const demo = await Engine.load(demoModel, { device: "cpu", budget: 512, sink: 64, window: 64 });
  const rain = "The rain had stopped before noon. ".repeat(60);
  for (const name of ["amber", "cedar"]) {
    const prompt = rain + "The code of amber is leopard. The code of cedar is harbor. " + rain;
    const asked = prompt + "\\n\\nQuestion: What is the code of " + name + "?\\nAnswer: The code of " + name + " is";
    told.answers.push((await demo.generate(asked, { maxTokens: 5 }).result()).tokens);
  }
  await demo[Symbol.asyncDispose]();
}
console.log(JSON.stringify(told));
process.exit(0);
`;

test("installed in an empty project it gives the same on Bun, Deno and Node", { timeout, skip }, () => {
  const project = join(dir, "project");
  mkdirSync(project);
  writeFileSync(join(project, "package.json"), '{ "private": true, "type": "module" }\n');
  writeFileSync(join(project, "main.js"), program);
  const words = ["install", tarball, "--ignore-scripts", "--prefer-offline", "--no-audit", "--no-fund"];
  run("npm", words, project);
  const installed = readdirSync(join(project, "node_modules"));
  for (const name of ["bun", "deno", "typescript", "bun-types", "mitata"])
    assert(!installed.includes(name), name);

  const model = join(root, "test", "fixtures", "golden", "llama");
  const env = { ...process.env, PATH: "", NO_COLOR: "1" }; // no compiler, no other program
  const commands = {
    Bun: [process.execPath, "main.js"],
    Deno: [denoProgram(), "run", "--allow-all", "--no-lock", "main.js"],
    Node: [run("node", ["-p", "process.execPath"], project).trim(), "main.js"],
  };
  const told = Object.entries(commands).map(([name, [first, ...rest]]) => {
    const out = JSON.parse(run(first as string, [...rest, model], project, env));
    assertMatch(out.entry, name === "Bun" ? /freekv\/lib\/device\.ts$/ : /freekv\/dist\/lib\/device\.js$/);
    assertMatch(out.library, /project.node_modules.freekv.dist.native/, name);
    assertEquals([out.copied[21], out.detached], [63, 0], name);
    return out.answers as number[][];
  });
  assertGreater(new Set(told[0]?.[1]).size, 10);
  assertEquals(told[1], told[0]);
  assertEquals(told[2], told[0]);
  const { version } = JSON.parse(readFileSync(join(root, "package.json"), "utf8"));
  assertEquals(run("npm", ["exec", "--offline", "--", "freekv", "--version"], project).trim(), version);
});

test("the README's examples compile against the installed package's types", { timeout, skip }, () => {
  const project = join(dir, "typed");
  mkdirSync(project);
  run("tar", ["-xzf", tarball, "-C", project], root);
  const folder = join(project, "node_modules");
  mkdirSync(folder);
  renameSync(join(project, "package"), join(folder, "freekv"));
  for (const name of ["bun-types", "mitata", "@types", "undici-types"])
    if (existsSync(join(root, "node_modules", name)))
      symlinkSync(join(root, "node_modules", name), join(folder, name));
  const options = {
    module: "nodenext",
    target: "esnext",
    lib: ["esnext", "dom", "esnext.disposable"],
    strict: true,
    noEmit: true,
    skipLibCheck: true,
    types: ["bun-types"],
  };
  writeFileSync(join(project, "package.json"), '{ "private": true, "type": "module" }\n');
  writeFileSync(
    join(project, "tsconfig.json"),
    JSON.stringify({ compilerOptions: options, include: ["*.ts"] }),
  );
  for (const name of ["ask.ts", "bench.ts", "server.ts"])
    writeFileSync(join(project, name), readFileSync(join(root, "test", "examples", name)));
  const tsc = join(root, "node_modules", "typescript", "bin", "tsc");
  run("node", [tsc, "-p", project], project);
  writeFileSync(join(project, "wrong.ts"), 'import { Engine } from "freekv";\nEngine.load(5);\n');
  const wrong = spawnSync("node", [tsc, "-p", project], { cwd: project, encoding: "utf8" });
  assertMatch(wrong.stdout, /^wrong\.ts\(2,13\): error TS2345/, "a wrong call does not compile");
});
