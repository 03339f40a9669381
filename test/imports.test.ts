// The import rule: imports point one way, down this list, through however many files between.
//   cli, server → index → engine → model → layer → {select, recall, correct, pages} → device → ffi
// A unit is a file of lib/, the files named after it (recall-staged.ts) and the folder of that name. A unit that is not
// listed belongs wherever its imports put it.

import { existsSync, readdirSync, readFileSync } from "node:fs";
import { dirname, join, posix } from "node:path";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { assert, assertArrayIncludes, assertEquals } from "@std/assert";

const layers = [
  ["cli", "server"],
  ["index"],
  ["engine"],
  ["model"],
  ["layer"],
  ["select", "recall", "correct", "pages"],
  ["device"],
];

/** Path → text, paths relative to the repository with forward slashes. */
type Tree = Map<string, string>;
interface Manifest {
  imports: Record<string, { source: Record<string, string> }>;
  exports: Record<string, string | { source: string }>;
  dependencies: Record<string, string>;
}

const root = join(dirname(fileURLToPath(import.meta.url)), "..");
const manifest: Manifest = JSON.parse(readFileSync(join(root, "package.json"), "utf8"));
const tree = readTree();

function readTree(): Tree {
  const found: Tree = new Map();
  for (const dir of ["lib", "ffi", "cuda", "test", "bench", "scripts", "examples"]) {
    if (!existsSync(join(root, dir))) continue;
    for (const name of readdirSync(join(root, dir), { recursive: true, encoding: "utf8" })) {
      const path = posix.join(dir, name.replaceAll("\\", "/"));
      if (/\.(ts|mjs|js|cpp|cu|cuh|h|hpp)$/.test(path))
        found.set(path, readFileSync(join(root, path), "utf8"));
    }
  }
  return found;
}

const typeOnly = /^[ \t]*(?:import|export)\s+type\b/;

/** Every module a text names: static, re-exported and dynamic; imports of types alone too, if they are asked for. */
function specifiers(text: string, types: boolean): string[] {
  const statically = /^[ \t]*(?:import|export)\b(?:[^'"`;]*?\bfrom)?\s*["']([^"'\n]+)["']/gm;
  const dynamically = /\bimport\(\s*["']([^"'\n]+)["']/g;
  const found = [...text.matchAll(statically), ...text.matchAll(dynamically)];
  return found.filter(([all]) => types || !typeOnly.test(all)).map((match) => match[1] ?? "");
}

/** The files a specifier stands for; one that is not ours stays as it is ("zod", "node:fs"). */
function resolve(from: string, specifier: string): string[] {
  if (specifier.startsWith(".")) return [posix.join(posix.dirname(from), specifier)];
  const backends = manifest.imports[specifier]?.source;
  if (backends !== undefined) return Object.values(backends).map((path) => posix.normalize(path));
  if (specifier === "freekv" || specifier.startsWith("freekv/")) {
    const entry = manifest.exports[specifier.replace("freekv", ".")];
    return [typeof entry === "object" ? posix.normalize(entry.source) : "package.json"];
  }
  return [specifier];
}

function importsOf(files: Tree, path: string, types = true): string[] {
  if (!/\.(ts|mjs|js)$/.test(path)) return [];
  return specifiers(files.get(path) ?? "", types).flatMap((specifier) => resolve(path, specifier));
}

/** All that a file reaches, each with the chain that leads there. `types`: whether others' type imports lead on. */
function reach(files: Tree, start: string, types = true): Map<string, string[]> {
  const chains = new Map<string, string[]>();
  const visit = (path: string, chain: string[]): void => {
    for (const next of importsOf(files, path, types || path === start)) {
      if (chains.has(next)) continue;
      chains.set(next, [...chain, next]);
      visit(next, [...chain, next]);
    }
  };
  visit(start, [start]);
  return chains;
}

const isFile = (path: string): boolean => /^(lib|ffi|cuda|test|bench|scripts|examples)\//.test(path);
const top = (path: string): string => path.split("/")[0] ?? "";
const packageOf = (name: string): string => name.split("/", name.startsWith("@") ? 2 : 1).join("/");

function unit(path: string): string | undefined {
  return /^lib\/([a-z]+)/.exec(path)?.[1];
}

function layerOf(path: string): number {
  return layers.findIndex((layer) => layer.includes(unit(path) ?? ""));
}

/** What breaks the rule, each as the chain of files that does. */
function violations(files: Tree): string[] {
  const found: string[] = [];
  for (const path of files.keys()) {
    const chains = reach(files, path);
    const cycle = chains.get(path);
    if (cycle !== undefined) found.push(`a cycle: ${cycle.join(" → ")}`);
    for (const next of importsOf(files, path)) {
      const say = (what: string): number => found.push(`${what}: ${path} → ${next}`);
      const [here, there] = [top(path), top(next)];
      if (next.startsWith("bun:") && path !== "ffi/bun.ts" && here !== "bench")
        say("only ffi/bun.ts knows Bun's modules");
      if (!isFile(next)) continue;
      if (here === "ffi" && there !== "ffi") say("ffi imports nothing of ours");
      if (here === "lib" && there !== "lib" && there !== "ffi") say("lib imports lib and ffi");
      const shared = here === "bench" && next === "test/cases.ts";
      if (["test", "bench", "scripts"].includes(there) && here !== there && !shared) {
        say(`nothing else imports ${there}`);
      }
    }
    if (layerOf(path) < 0) continue;
    for (const [next, chain] of chains) {
      if (layerOf(next) >= 0 && layerOf(next) < layerOf(path)) found.push(`upwards: ${chain.join(" → ")}`);
    }
    // Stages exchange values and never import each other; the type of such a value may come by way of a third file.
    for (const [next, chain] of reach(files, path, false)) {
      const apart = layerOf(next) === layerOf(path) && unit(next) !== unit(path);
      const serves = unit(path) === "cli" && unit(next) === "server";
      if (apart && !serves) found.push(`sideways: ${chain.join(" → ")}`);
    }
  }
  for (const [next, chain] of reach(files, "lib/device.ts")) {
    const barred = ["zod", "@huggingface/tokenizers"].includes(packageOf(next));
    if (barred || ["weights", "tokenizer", "tasks"].includes(unit(next) ?? "")) {
      found.push(`freekv/cuda stands alone: ${chain.join(" → ")}`);
    }
  }
  return found;
}

test("imports point one way", () => {
  assertEquals(violations(tree), []);
});

test("packages that lib and ffi import are dependencies, not devDependencies", () => {
  const declared = Object.keys(manifest.dependencies);
  for (const path of tree.keys()) {
    if (top(path) !== "lib" && top(path) !== "ffi") continue;
    const packages = importsOf(tree, path).filter((next) => !isFile(next) && !/^(node|bun):/.test(next));
    assertArrayIncludes(declared, packages.map(packageOf), path);
  }
});

test("C and CUDA files include only each other", () => {
  for (const [path, text] of tree) {
    if (top(path) !== "cuda") continue;
    for (const [, name = ""] of text.matchAll(/^[ \t]*#[ \t]*include[ \t]*"([^"]+)"/gm)) {
      const places = [posix.join(posix.dirname(path), name), posix.join("cuda", name)];
      assert(
        places.some((place) => top(place) === "cuda" && tree.has(place)),
        `${path} includes ${name}`,
      );
    }
  }
});

test("the rule catches what it forbids, and nothing else", () => {
  const bad: [string, Record<string, string>][] = [
    [
      "sideways: lib/select.ts → lib/helper.ts → lib/recall/gather.ts",
      {
        "lib/select.ts": `import { a } from "./helper.ts";`,
        "lib/helper.ts": `export { a } from "./recall/gather.ts";`,
        "lib/recall/gather.ts": "",
      },
    ],
    [
      "sideways: lib/pages.ts → lib/recall-staged.ts",
      { "lib/pages.ts": `import type { R } from "./recall-staged.ts";`, "lib/recall-staged.ts": "" },
    ],
    [
      "upwards: lib/device.ts → lib/helper.ts → lib/engine.ts",
      {
        "lib/device.ts": `import { h } from "./helper.ts";`,
        "lib/helper.ts": `import type {\n  E,\n} from "./engine.ts";`,
        "lib/engine.ts": "",
      },
    ],
    [
      "upwards: lib/model.ts → lib/cli.ts",
      { "lib/model.ts": `const x = await import("./cli.ts");`, "lib/cli.ts": "" },
    ],
    [
      "ffi imports nothing of ours: ffi/index.ts → lib/errors.ts",
      { "ffi/index.ts": `import "../lib/errors.ts";` },
    ],
    [
      "lib imports lib and ffi: lib/layer.ts → test/cases.ts",
      { "lib/layer.ts": `import "../test/cases.ts";` },
    ],
    [
      "nothing else imports test: scripts/a.ts → test/cases.ts",
      { "scripts/a.ts": `import "../test/cases.ts";` },
    ],
    [
      "freekv/cuda stands alone: lib/device.ts → lib/config.ts → zod",
      { "lib/device.ts": `import "./config.ts";`, "lib/config.ts": `import { z } from "zod";` },
    ],
    [
      "only ffi/bun.ts knows Bun's modules: lib/pages.ts → bun:ffi",
      { "lib/pages.ts": `import { ptr } from "bun:ffi";` },
    ],
    [
      "a cycle: lib/a.ts → lib/b.ts → lib/a.ts",
      { "lib/a.ts": `import "./b.ts";`, "lib/b.ts": `import "./a.ts";` },
    ],
  ];
  for (const [violation, files] of bad) {
    assertArrayIncludes(violations(new Map(Object.entries(files))), [violation]);
  }
  const good = {
    "bench/run.ts": `import { cases } from "../test/cases.ts";`,
    "test/cases.ts": `import { Engine } from "freekv";`,
    "lib/index.ts": `export { Engine } from "./engine.ts";`,
    "lib/engine.ts": `import { a } from "./model.ts";\nimport { e } from "./errors.ts";`,
    "lib/model.ts": `import { l } from "./layer.ts";`,
    "lib/layer.ts": `import { g } from "./recall/gather.ts";\nimport { s } from "./select.ts";`,
    "lib/recall/gather.ts": `import { r } from "./index.ts";\n// import { s } from "../select.ts";`,
    "lib/recall/index.ts": `import { d } from "../device.ts";`,
    "lib/select.ts": `import { d } from "./device.ts";\nimport { c } from "./cache.ts";`,
    "lib/cache.ts": `import type { P } from "./pages.ts";`,
    "lib/pages.ts": "",
    "lib/device.ts": `import { open } from "../ffi/index.ts";`,
    "ffi/index.ts": `import { open } from "#backend";`,
    "ffi/bun.ts": `import { dlopen } from "bun:ffi";`,
  };
  assertEquals(violations(new Map(Object.entries(good))), []);
});
