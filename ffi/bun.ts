// The Bun backend. Other runtimes' backends export the same `load`.

import { CString, dlopen, type FFIFunction, type Pointer, toArrayBuffer } from "bun:ffi";
import type { ArgKind, Backend, EntryName, Load, ReturnKind, SymbolTable } from "./symbols.ts";

// `ptr` takes numbers, null, ArrayBuffers and views alike.
const argTypes = {
  ptr: "ptr",
  "ptr?": "ptr",
  buf: "ptr",
  mem: "ptr",
  i32: "i32",
  u64: "u64",
} as const satisfies {
  [K in ArgKind]: string;
};
const returnTypes = { status: "i32", i32: "i32", cstring: "ptr" } as const satisfies {
  [K in ReturnKind]: string;
};

export const load: Load = <N extends EntryName>(path: string, table: SymbolTable<N>): Backend<N> => {
  const names = Object.keys(table) as N[];
  const definitions: Record<string, FFIFunction> = {};
  for (const name of names) {
    const { args, returns } = table[name];
    definitions[name] = { args: args.map(({ kind }) => argTypes[kind]), returns: returnTypes[returns] };
  }
  const { symbols } = dlopen(path, definitions);

  const calls: Record<string, unknown> = {};
  for (const name of names) {
    const call = symbols[name] as () => unknown;
    calls[name] = table[name].returns === "cstring" ? () => new CString(call() as Pointer).toString() : call;
  }
  return {
    calls: calls as Backend<N>["calls"],
    toArrayBuffer: (address, bytes) => toArrayBuffer(address as Pointer, 0, bytes),
    detach: (buffer) => void buffer.transfer(0),
  };
};
