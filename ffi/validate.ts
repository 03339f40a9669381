// Debug mode: FFIs coerce silently (undefined becomes 0, 1.5 becomes 1), so check each argument before the call.

import type { ToError } from "./status.ts";
import type { ArgKind, Entry } from "./symbols.ts";

type Check = (value: unknown) => boolean;

const isAddress: Check = (value) => Number.isSafeInteger(value) && (value as number) > 0;

const isMemory: Check = (value) =>
  (value instanceof ArrayBuffer || ArrayBuffer.isView(value)) && value.byteLength > 0;

const checks: { readonly [K in ArgKind]: { readonly test: Check; readonly wanted: string } } = {
  ptr: { test: isAddress, wanted: "an address (a positive integer)" },
  "ptr?": {
    test: (value) => value === null || value === 0 || isAddress(value),
    wanted: "an address (a positive integer) or null",
  },
  buf: { test: isMemory, wanted: "an ArrayBuffer or a view, not empty, not detached" },
  mem: {
    test: (value) => isAddress(value) || isMemory(value),
    wanted: "an address, or an ArrayBuffer or a view that is not empty or detached",
  },
  i32: { test: (value) => Number.isInteger(value) && value === Number(value) >> 0, wanted: "an int32" },
  u64: {
    test: (value) =>
      typeof value === "bigint"
        ? value === BigInt.asUintN(64, value)
        : Number.isSafeInteger(value) && (value as number) >= 0,
    wanted: "a uint64 (an integer from 0, at most 2^53 − 1 as a number)",
  },
};

/** Throw BAD_ARGUMENT unless `args` are what the entry takes. */
export function validate(call: string, entry: Entry, args: readonly unknown[], toError: ToError): void {
  const refuse = (text: string): Error =>
    toError({
      code: "BAD_ARGUMENT",
      call,
      message: `${call}: ${text}`,
      detail: { status: "BAD_ARGUMENT", text },
    });
  if (args.length !== entry.args.length) {
    throw refuse(`takes ${entry.args.length} arguments, got ${args.length}`);
  }
  for (const [i, { name, kind }] of entry.args.entries()) {
    const { test, wanted } = checks[kind];
    if (!test(args[i])) throw refuse(`${name} must be ${wanted}, got ${show(args[i])}`);
  }
}

function show(value: unknown): string {
  return typeof value === "object" && value !== null
    ? (value.constructor?.name ?? "an object")
    : String(value);
}
