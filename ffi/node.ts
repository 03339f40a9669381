// The Node backend, over koffi, which takes a pointer as a number, as an ArrayBuffer or as a view of one.

import { load as open, view } from "koffi";
import type { ArgKind, Backend, EntryName, Load, ReturnKind, SymbolTable } from "./symbols.ts";

const argTypes = {
  ptr: "void *",
  "ptr?": "void *",
  buf: "void *",
  mem: "void *",
  i32: "int32_t",
  u64: "uint64_t",
} as const satisfies { [K in ArgKind]: string };
const returnTypes = { status: "int32_t", i32: "int32_t", cstring: "str" } as const satisfies {
  [K in ReturnKind]: string;
};

export const load: Load = <N extends EntryName>(path: string, table: SymbolTable<N>): Backend<N> => {
  const library = open(path);
  const calls: Record<string, unknown> = {};
  for (const name of Object.keys(table) as N[]) {
    const { args, returns } = table[name];
    const types = args.map(({ kind }) => argTypes[kind]);
    calls[name] = library.func(name, returnTypes[returns], types);
  }
  return { calls: calls as Backend<N>["calls"], toArrayBuffer: view, detach };
};

/**
 * Node marks a buffer of foreign memory as not transferable: structuredClone copies it instead, and Node 20 has no
 * ArrayBuffer.prototype.transfer. A byte stream takes over the buffer that it is given to read into, at the call.
 */
function detach(buffer: ArrayBuffer): void {
  const reader = new ReadableStream({ type: "bytes" }).getReader({ mode: "byob" });
  void reader.read(new Uint8Array(buffer)); // never answered: nothing is ever written to this stream
}
