/// <reference lib="esnext.disposable" preserve="true" />
// Every symbol of the ABI, with every kind of argument at its edges, against a library that tells what reached it.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import type * as cuda from "freekv/cuda";
import { compile, folder, open, root, withoutCompiler } from "./shared.ts";

type Calls = cuda.Device["lib"];
/** An address, one that may be null, JavaScript memory, either of the two, int32, uint64. */
type Kind = "address" | "null" | "memory" | "either" | "i32" | "u64";
type KindsOf<A extends readonly unknown[]> = { readonly [I in keyof A]: Kind };

const kinds: { readonly [N in keyof Calls]: KindsOf<Parameters<Calls[N]>> } = {
  fkv_abi_version: [],
  fkv_last_error: [],
  fkv_backend: [],
  fkv_device_count: ["memory"],
  fkv_device_open: ["memory", "memory"],
  fkv_device_close_sync: ["address"],
  fkv_device_get_info: ["memory", "address"],
  fkv_device_synchronize_sync: ["address"],
  fkv_device_alloc: ["memory", "u64", "address"],
  fkv_device_free: ["address", "address"],
  fkv_host_alloc: ["memory", "u64", "address"],
  fkv_host_free: ["address", "address"],
  fkv_host_reserve: ["memory", "u64", "u64", "address"],
  fkv_host_grow: ["address", "u64", "address"],
  fkv_host_ready: ["memory", "address", "address"],
  fkv_host_register: ["either", "u64", "address"],
  fkv_host_unregister: ["either", "address"],
  fkv_memcpy_async: ["address", "either", "u64", "address"],
  fkv_memcpy_2d_async: ["address", "u64", "either", "u64", "u64", "u64", "address"],
  fkv_memset_async: ["address", "i32", "u64", "address"],
  fkv_memset_2d_async: ["address", "u64", "i32", "u64", "u64", "address"],
  fkv_write_async: ["address", "either", "u64", "address"],
  fkv_stream_create: ["memory", "address"],
  fkv_stream_compute: ["memory", "address"],
  fkv_stream_destroy_sync: ["address"],
  fkv_stream_synchronize_sync: ["address"],
  fkv_stream_wait_event: ["address", "address"],
  fkv_event_create: ["memory", "address"],
  fkv_event_destroy: ["address"],
  fkv_event_record: ["address", "address"],
  fkv_event_query: ["memory", "address"],
  fkv_event_wait_sync: ["memory", "address", "u64"],
  fkv_event_elapsed_ms: ["memory", "address", "address"],
  fkv_capture_begin: ["address"],
  fkv_capture_end: ["memory", "address"],
  fkv_graph_launch: ["address", "address"],
  fkv_graph_destroy: ["address"],
  fkv_clock_start: ["address", "address"],
  fkv_clock_stop: ["address", "address", "address"],
  fkv_embed: ["address", "address", "address", "i32", "i32", "i32", "i32", "address"],
  fkv_dense_chain: ["memory", "i32", "i32", "i32", "null", "address"],
  fkv_chain_scratch_bytes: ["memory", "i32", "i32", "i32"],
  fkv_rope: ["memory", "address"],
  fkv_control_load: ["memory", "address", "address", "i32", "i32", "address"],
  fkv_append: ["memory", "address", "i32", "i32", "address"],
  fkv_check: ["memory", "address", "i32", "i32", "address"],
  fkv_estimate: ["memory", "memory", "null", "i32", "i32", "i32", "address"],
  fkv_select: ["memory", "memory", "i32", "i32", "i32", "address"],
  fkv_recall_gather: ["memory", "memory", "i32", "i32", "address"],
  fkv_recall_scatter: ["memory", "address", "address", "i32", "i32", "address"],
  fkv_retrieve: ["memory", "memory", "address"],
  fkv_attend: ["address", "memory", "address", "i32", "i32", "address"],
  fkv_attend_scratch_bytes: ["memory", "memory"],
  fkv_page_finish: ["memory", "i32", "i32", "i32", "address"],
  fkv_sample: ["memory", "memory", "address"],
  fkv_pages_copy: ["memory", "memory", "address"],
  fkv_pages_digest: ["memory", "memory", "i32", "address"],
  fkv_prefill_append: ["memory", "memory", "address"],
  fkv_prefill_attend: ["memory", "memory", "address"],
  fkv_module_load: ["memory", "either", "u64", "address"],
  fkv_module_unload_sync: ["address"],
  fkv_module_kernel: ["memory", "memory", "memory", "i32", "address"],
  fkv_kernel_launch: ["address", "memory", "memory", "address"],
  fkv_program_compile_sync: ["memory", "memory", "memory", "memory", "memory", "address"],
  fkv_program_sizes: ["memory", "memory", "address"],
  fkv_program_read: ["memory", "memory", "address"],
  fkv_program_destroy: ["address"],
};

/** A value, and what C is to see: a number, an address, or the first 8 bytes of JavaScript memory. */
type Edge = readonly [value: unknown, seen: bigint];
const numbers = (values: readonly (number | bigint)[]): Edge[] =>
  values.map((value) => [value, BigInt(value)]);
const addresses = numbers([1, 2 ** 31, 2 ** 53 - 1, 0]);

/** New ones for each call, since C writes to some. */
function memories(): Edge[] {
  const filled = new Uint8Array(64).map((_, i) => 7 * i + 1);
  const first = (at: number): bigint => new DataView(filled.buffer).getBigUint64(at, true);
  return [
    [filled.slice().buffer, first(0)],
    [new Float64Array([1.5]), 0x3ff8000000000000n],
    [new BigUint64Array([2n ** 64n - 1n]), 2n ** 64n - 1n],
    [filled.subarray(9, 40), first(9)],
    [new DataView(filled.slice().buffer, 3, 8), first(3)],
    [new Int32Array(2 ** 12).fill(-1), 2n ** 64n - 1n],
  ];
}

function edgesOf(kind: Kind): Edge[] {
  switch (kind) {
    case "address":
      return addresses;
    case "null":
      return [[null, 0n], ...addresses];
    case "memory":
      return memories();
    case "either":
      return [...memories(), ...addresses];
    case "i32":
      return numbers([0, 1, -1, 2 ** 31 - 1, -(2 ** 31)]);
    case "u64":
      return numbers([0, 1, 2 ** 31, 2 ** 32, 2 ** 53 - 1, 2n ** 53n, 2n ** 63n, 2n ** 64n - 1n]);
  }
}

/** A library with the header's entries: each succeeds, and fkv_last_error tells its name and arguments. */
function echoLibrary(dir: string): string {
  const entries = [...header.matchAll(/^FKV_API int32_t (\w+)\(([^)]*)\);/gm)].map(
    ([, name = "", list = ""]) => {
      const parameters = list === "void" ? [] : list.split(", ");
      const names = parameters.map((parameter) => /\w+$/.exec(parameter)?.[0] ?? "");
      const output = { fkv_device_count: "*count = 1", fkv_device_open: "*device = (fkv_device*)1" }[name];
      const body =
        name === "fkv_abi_version" ? "return FKV_ABI_VERSION;" : `return echo(${[`"${name}"`, ...names]});`;
      const set = output === undefined ? "" : `if (${names[0]}) ${output}; `;
      return `int32_t ${name}(${list}) { ${set === "" ? body : `${body.replace("return", "int32_t status =")} ${set}return status;`} }`;
    },
  );
  return compile(
    dir,
    "echo",
    `#include <string>
     #include "${join(root, "cuda", "freekv.h")}"
     static std::string text;
     static std::string show(int32_t x) { return std::to_string(x); }
     static std::string show(uint64_t x) { return std::to_string(x); }
     static std::string show(const void* p) {
       uint64_t a = (uint64_t)p, first = 0;
       if (a <= 1 || a == 1ull << 31 || a == (1ull << 53) - 1) return std::to_string(a);
       __builtin_memcpy(&first, p, 8);
       return std::to_string(first);
     }
     template <class... A> static int32_t echo(const char* name, A... args) {
       text = name;
       ((text += " " + show(args)), ...);
       return 0;
     }
     extern "C" {
     const char* fkv_last_error() { return text.c_str(); }
     const char* fkv_backend() { return "cpu"; }
     ${entries.join("\n")}
     }`,
  );
}

const header = readFileSync(join(root, "cuda", "freekv.h"), "utf8");

test("every symbol of the header is in this test", () => {
  const names = [...header.matchAll(/^FKV_API .*?(fkv_\w+)\(/gm)].map(([, name]) => name);
  assertEquals(Object.keys(kinds), names);
  using device = open();
  assertEquals(Object.keys(device.lib), names);
});

for (const debug of [false, true]) {
  const how = debug ? ", also through debug mode" : "";
  test(`every argument reaches C as it is${how}`, { timeout: 60_000, skip: withoutCompiler }, () => {
    using dir = folder();
    using device = open({ libraryPath: echoLibrary(dir.path), debug });
    const { lib } = device;
    let calls = 0;
    for (const [name, list] of Object.entries(kinds) as [keyof Calls, readonly Kind[]][]) {
      if (list.length === 0) continue;
      const call = lib[name] as (...args: unknown[]) => void;
      for (let round = 0; round < 12; round++) {
        const args = list.map((kind, i) => {
          const edges = edgesOf(kind);
          // Debug mode refuses the null pointer where C would.
          const pointer = kind === "address" || kind === "either";
          const usable = debug && pointer ? edges.filter(([, seen]) => seen !== 0n) : edges;
          return usable[(round + i) % usable.length] as Edge;
        });
        call(...args.map(([value]) => value));
        assertEquals(lib.fkv_last_error(), [name, ...args.map(([, seen]) => seen)].join(" "));
        calls++;
      }
    }
    assert(calls > 500, `${calls} calls`);
  });
}

test("what returns no status returns its value", () => {
  using device = open();
  assertEquals(device.lib.fkv_abi_version(), 1);
  assertEquals(device.lib.fkv_backend(), "cpu");
});

test("a misspelt, missing or wrongly typed call does not compile", () => {
  using device = open();
  const { lib } = device;
  const uncalled = [
    // @ts-expect-error: no such entry
    () => lib.fkv_nothing(1),
    // @ts-expect-error: an argument too few
    () => lib.fkv_memset_async(1, 0, 16),
    // @ts-expect-error: an argument too many
    () => lib.fkv_event_destroy(1, 2),
    // @ts-expect-error: a handle is a number
    () => lib.fkv_event_destroy("1"),
    // @ts-expect-error: outputs are JavaScript memory
    () => lib.fkv_event_query(4096, 1),
    // @ts-expect-error: an int32 is no bigint
    () => lib.fkv_memset_async(1, 0n, 16, 1),
    // @ts-expect-error: by its name, too
    () => device.call("fkv_nothing", 1),
  ];
  assertEquals(uncalled.length, 7);
});
