// The Deno backend. Deno takes a 64-bit integer as a bigint, and a pointer either as such or as JavaScript memory, so
// that an entry with a `mem` argument is bound twice.

import type { ArgKind, Backend, EntryName, Load, ReturnKind, SymbolTable } from "./symbols.ts";

type NativeType = "i32" | "u64" | "buffer" | "pointer";
interface ForeignFunction {
  readonly name: string;
  readonly parameters: readonly NativeType[];
  readonly result: NativeType;
}
interface PointerObject {
  readonly value: unique symbol;
}
/** Not in the types of ES2023, which is what the other files may use. */
interface Detachable extends ArrayBuffer {
  transfer(bytes: number): ArrayBuffer;
}
type Call = (...args: unknown[]) => unknown;

/** What this file uses of Deno's own namespace, so that no package of types is needed. */
declare const Deno: {
  dlopen(path: string, symbols: Record<string, ForeignFunction>): { readonly symbols: Record<string, Call> };
  readonly UnsafePointer: { create(address: bigint): PointerObject | null };
  readonly UnsafePointerView: {
    new (pointer: PointerObject): { getCString(): string };
    getArrayBuffer(pointer: PointerObject, bytes: number): ArrayBuffer;
  };
};

const argTypes = {
  ptr: "u64",
  "ptr?": "u64",
  buf: "buffer",
  mem: "buffer",
  i32: "i32",
  u64: "u64",
} as const satisfies { [K in ArgKind]: NativeType };
const returnTypes = { status: "i32", i32: "i32", cstring: "pointer" } as const satisfies {
  [K in ReturnKind]: NativeType;
};

export const load: Load = <N extends EntryName>(path: string, table: SymbolTable<N>): Backend<N> => {
  const names = Object.keys(table) as N[];
  const definitions: Record<string, ForeignFunction> = {};
  const addressed = (name: N): string => `${name} at an address`;
  for (const name of names) {
    const { args, returns } = table[name];
    const result = returnTypes[returns];
    definitions[name] = { name, parameters: args.map(({ kind }) => argTypes[kind]), result };
    if (args.some(({ kind }) => kind === "mem")) {
      const parameters = args.map(({ kind }) => (kind === "mem" ? "u64" : argTypes[kind]));
      definitions[addressed(name)] = { name, parameters, result };
    }
  }
  const { symbols } = Deno.dlopen(path, definitions);

  const calls: Record<string, unknown> = {};
  for (const name of names) {
    const { args, returns } = table[name];
    const kinds = args.map(({ kind }) => kind);
    const call = symbols[name] as Call;
    const mem = kinds.indexOf("mem");
    if (returns === "cstring") calls[name] = () => text(call() as PointerObject);
    else if (mem < 0) calls[name] = converting(kinds, call);
    else {
      const byAddress = kinds.map((kind) => (kind === "mem" ? "ptr" : kind));
      const [memory, address] = [
        converting(kinds, call),
        converting(byAddress, symbols[addressed(name)] as Call),
      ];
      calls[name] = (...all: unknown[]) => (typeof all[mem] === "object" ? memory : address)(...all);
    }
  }
  return {
    calls: calls as Backend<N>["calls"],
    toArrayBuffer: (address, bytes) => Deno.UnsafePointerView.getArrayBuffer(pointer(address), bytes),
    detach: (buffer) => void (buffer as Detachable).transfer(0),
  };
};

function pointer(address: number): PointerObject {
  const created = Deno.UnsafePointer.create(BigInt(address));
  if (created === null) throw new RangeError("a view of the null pointer");
  return created;
}

function text(start: PointerObject): string {
  return new Deno.UnsafePointerView(start).getCString();
}

const wide = (value: unknown): bigint =>
  typeof value === "bigint" ? value : BigInt((value as number | null) ?? 0);
const same = (value: unknown): unknown => value;

/** `call`, given numbers where it takes bigints. Deno's fast calls want each argument by itself, not spread. */
function converting(kinds: readonly ArgKind[], call: Call): Call {
  const [p, q, r, s, t, u, v, w] = Array.from({ length: 8 }, (_, i) =>
    argTypes[kinds[i] ?? "i32"] === "u64" ? wide : same,
  ) as [Call, Call, Call, Call, Call, Call, Call, Call];
  const byLength: readonly Call[] = [
    () => call(),
    (a) => call(p(a)),
    (a, b) => call(p(a), q(b)),
    (a, b, c) => call(p(a), q(b), r(c)),
    (a, b, c, d) => call(p(a), q(b), r(c), s(d)),
    (a, b, c, d, e) => call(p(a), q(b), r(c), s(d), t(e)),
    (a, b, c, d, e, f) => call(p(a), q(b), r(c), s(d), t(e), u(f)),
    (a, b, c, d, e, f, g) => call(p(a), q(b), r(c), s(d), t(e), u(f), v(g)),
    (a, b, c, d, e, f, g, h) => call(p(a), q(b), r(c), s(d), t(e), u(f), v(g), w(h)),
  ];
  const fixed = byLength[kinds.length];
  if (fixed === undefined) throw new RangeError(`no entry has ${kinds.length} arguments`);
  return fixed;
}
