// The header is the contract: the tables in ffi/, the C++ compiler's layout and the library's exports must agree with it.

import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import * as constants from "../ffi/constants.ts";
import { exportsEntry } from "../ffi/index.ts";
import { layouts, type StructName } from "../ffi/layouts.ts";
import { packageRoot } from "../ffi/root.ts";
import { libraryPlaces } from "../ffi/search.ts";
import { offsets, size, structNames } from "../ffi/structs.ts";
import { type ArgKind, type EntryName, entryNames, type RawCalls, symbolTable } from "../ffi/symbols.ts";

const cuda = join(packageRoot(), "cuda");
const header = readFileSync(join(cuda, "freekv.h"), "utf8");

interface Header {
  /** name → return type and arguments, as `type name` with single spaces and no const. */
  entries: Map<string, { returns: string; args: string[] }>;
  constants: Map<string, number>;
  /** name → fields, as `type name` or `type name[n]`. */
  structs: Map<string, string[]>;
}

/** "const fkv_lane* lanes" and "const fkv_lane *lanes" alike become "fkv_lane* lanes". */
const tidy = (text: string): string =>
  text
    .replace(/\bconst\b/g, "")
    .replace(/\s+/g, " ")
    .replace(/ ?(\*+) ?/g, "$1 ")
    .trim();

function parse(text: string): Header {
  const code = text.replace(/\/\/.*$/gm, "").replace(/\/\*[\s\S]*?\*\//g, "");
  const found: Header = { entries: new Map(), constants: new Map(), structs: new Map() };
  for (const [, returns = "", name = "", list = ""] of code.matchAll(
    /^FKV_API\s+([^;{}]+?)\b(fkv_\w+)\(([^)]*)\);/gm,
  )) {
    const args = list.split(",").map(tidy);
    found.entries.set(name, { returns: tidy(returns), args: args[0] === "void" ? [] : args });
  }
  for (const [, name = "", value] of code.matchAll(/^#define (FKV_\w+) (\d+)$/gm))
    found.constants.set(name, Number(value));
  for (const [, body = ""] of code.matchAll(/\benum\s*\{([^}]*)\}/g)) {
    for (const [, name = "", value] of body.matchAll(/(\w+)\s*=\s*(\d+)/g))
      found.constants.set(name, Number(value));
  }
  for (const [, body = "", name = ""] of code.matchAll(/typedef struct \w+ \{([^}]*)\}\s*(\w+);/g)) {
    const fields = body
      .split(";")
      .filter((line) => line.trim() !== "")
      .flatMap((line) => {
        const [, type = "", names = ""] = /^([\w]+\**)\s(.*)$/.exec(tidy(line)) ?? [];
        return names.split(",").map((each) => `${type} ${each.trim()}`);
      });
    found.structs.set(name, fields);
  }
  return found;
}

const cTypes: Record<string, string> = {
  uint32_t: "u32",
  int32_t: "i32",
  uint64_t: "u64",
  int64_t: "i64",
  float: "f32",
  double: "f64",
  char: "char",
};
/** The constant behind an array's length. */
const lengths: Record<string, number> = { FKV_MAX_TOP: constants.FKV_MAX_TOP };

/** A C argument's type → the kinds that may stand for it. */
function kindsFor(type: string): ArgKind[] {
  if (type === "int32_t") return ["i32"];
  if (type === "uint64_t") return ["u64"];
  // Handles are addresses; parameter structs are JavaScript memory; other memory depends on what the entry does with it.
  if (/^fkv_(device|stream|event|graph|module|kernel|program)\*$/.test(type)) return ["ptr"];
  if (/^fkv_(cache|workspace|phase|device_info|\w+_params)\*$/.test(type) || type.endsWith("**"))
    return ["buf"];
  return type.endsWith("*") ? ["ptr", "ptr?", "buf", "mem"] : [];
}

/** What in the tables is not as the header has it. */
function differences(text: string): string[] {
  const { entries, constants: values, structs } = parse(text);
  const wrong: string[] = [];
  const compare = (what: string, table: unknown, inHeader: unknown): void => {
    const [ours, theirs] = [JSON.stringify(table), JSON.stringify(inHeader)];
    if (ours !== theirs) wrong.push(`${what}: table ${ours}, header ${theirs}`);
  };
  compare("entries", entryNames, [...entries.keys()]);
  const table: Record<string, ReturnType<typeof symbolTable>[EntryName]> = symbolTable(entryNames);
  for (const [name, { returns, args }] of entries) {
    const entry = table[name];
    if (entry === undefined) continue;
    const wanted = returns === "char*" ? "cstring" : name === "fkv_abi_version" ? "i32" : "status";
    compare(`${name} returns`, entry.returns, wanted);
    compare(
      `${name} arguments`,
      entry.args.map((arg) => arg.name),
      args.map((arg) => arg.split(" ")[1]),
    );
    for (const [i, arg] of args.entries()) {
      const kind = entry.args[i]?.kind;
      const allowed = kindsFor(arg.split(" ")[0] ?? "");
      if (kind !== undefined && !allowed.includes(kind)) wrong.push(`${name}: ${arg} is not ${kind}`);
    }
  }
  compare("constants", Object.entries(constants).sort(), [...values].sort());
  compare("structs", [...structNames].sort(), [...structs.keys()].sort());
  for (const [name, fields] of structs) {
    const shown = fields.map((field) => {
      const [, type = "", each = "", n] = /^(\S+) (\w+)(?:\[(\w+)\])?$/.exec(field) ?? [];
      const element = type.endsWith("*") ? "ptr" : (cTypes[type] ?? type);
      return [each, n === undefined ? element : `${element}[${lengths[n] ?? n}]`];
    });
    compare(name, Object.entries(layouts[name as StructName] ?? {}), shown);
  }
  return wrong;
}

test("tables and header agree on entries, arguments, constants and fields", () => {
  const { entries, constants: values, structs } = parse(header);
  assert(entries.size > 40 && values.size > 20 && structs.size > 10, "the header was not understood");
  assertEquals(differences(header), []);
});

test("a header that differs is noticed", () => {
  const edits: readonly [string, string][] = [
    ["FKV_API int32_t fkv_append(", "FKV_API int32_t fkv_appended("],
    [
      "int32_t digest_kind, int32_t layer, int32_t n_rows",
      "int32_t layer, int32_t digest_kind, int32_t n_rows",
    ],
    ["int32_t value, uint64_t bytes, fkv_stream* stream", "int32_t value, int32_t bytes, fkv_stream* stream"],
    [
      "fkv_clock_start(uint64_t* mark, fkv_stream* stream)",
      "fkv_clock_start(uint64_t* mark, fkv_event* stream, int32_t n)",
    ],
    ["FKV_API const char* fkv_backend(void)", "FKV_API int32_t fkv_backend(void)"],
    ["FKV_ABI_VERSION 1", "FKV_ABI_VERSION 2"],
    ["FKV_FIRST = 2", "FKV_FIRST = 3"],
    ["int32_t page, slot, block, frame;", "int32_t page, slot, frame, block;"],
    ["float eps, scale;", "double eps, scale;"],
    ["top_id[FKV_MAX_TOP]", "top_id[16]"],
    ["typedef struct fkv_workspace {", "typedef struct fkv_workspace {\n  uint32_t struct_bytes;"],
  ];
  for (const [from, to] of edits) {
    assert(header.includes(from), `the header has no ${from}`);
    assert(differences(header.replace(from, to)).length > 0, `${to} went unnoticed`);
  }
});

test("sizes and offsets are the C++ compiler's", { timeout: 60_000 }, () => {
  const lines = structNames.flatMap((name) => [
    `p("${name}", sizeof(${name}));`,
    ...Object.keys(layouts[name]).map((field) => `p("${name}.${field}", offsetof(${name}, ${field}));`),
  ]);
  const program = `#include <cstddef>\n#include <cstdio>\n#include "freekv.h"
    static void p(const char* name, size_t n) { std::printf("%s %zu\\n", name, n); }
    int main() { ${lines.join("\n")} }`;
  const dir = mkdtempSync(join(tmpdir(), "freekv-abi-"));
  try {
    const [source, binary] = [join(dir, "layout.cpp"), join(dir, "layout")];
    writeFileSync(source, program);
    const compilers = process.env.CXX ? [process.env.CXX] : ["g++", "c++", "clang++"];
    const tried = compilers.map((cxx) =>
      spawnSync(cxx, [`-I${cuda}`, source, "-o", binary], { encoding: "utf8" }),
    );
    assert(
      tried.some(({ status }) => status === 0),
      tried.map(({ stderr, error }) => stderr ?? error).join("\n"),
    );
    const { stdout } = spawnSync(binary, { encoding: "utf8" });
    const theirs = Object.fromEntries(
      stdout
        .trim()
        .split("\n")
        .map((line) => line.split(" ")),
    );
    const ours = structNames.flatMap((name) => [
      [name, String(size[name])],
      ...Object.entries(offsets[name]).map(([field, offset]) => [`${name}.${field}`, String(offset)]),
    ]);
    assertEquals(Object.fromEntries(ours), theirs);
  } finally {
    rmSync(dir, { recursive: true });
  }
});

test("the twin exports every entry", () => {
  const { path } = libraryPlaces("cpu").at(-1) as { path: string };
  assertEquals(
    entryNames.filter((name) => !exportsEntry(path, name)),
    [],
  );
  assert(!exportsEntry(path, "fkv_no_such_entry" as EntryName));
});

test("a misspelt or wrongly typed call does not compile", () => {
  const check = (calls: RawCalls): void => {
    const cache = new ArrayBuffer(size.fkv_cache);
    calls.fkv_append(cache, 4096, 0, 1, 4096);
    // @ts-expect-error: no such entry
    calls.fkv_apend(cache, 4096, 0, 1, 4096);
    // @ts-expect-error: an argument is missing
    calls.fkv_append(cache, 4096, 0, 1);
    // @ts-expect-error: a struct is not an address
    calls.fkv_append(4096, 4096, 0, 1, 4096);
    // @ts-expect-error: an address is not null unless the table says so
    calls.fkv_append(cache, null, 0, 1, 4096);
    // @ts-expect-error: an int32 is not a bigint
    calls.fkv_append(cache, 4096, 0n, 1, 4096);
  };
  assertEquals(typeof check, "function"); // the compiler is what tests it: npm run check
});
