// What a C status means to a caller: the one table from FKV_* to the codes of FreeKVError, with the way out.

import * as constants from "./constants.ts";
import type { LibraryKind } from "./search.ts";

/** The error codes that this folder gives; lib/errors.ts has all of them. */
export type FfiErrorCode =
  | "BAD_ARGUMENT"
  | "OUT_OF_MEMORY"
  | "NO_DEVICE"
  | "LIBRARY_NOT_FOUND"
  | "ABI_MISMATCH"
  | "DEVICE_FAILED";

/** What went wrong, for the caller to make its error of. */
export interface Failure {
  readonly code: FfiErrorCode;
  readonly message: string;
  /** The entry that failed. */
  readonly call?: string;
  readonly detail: Readonly<Record<string, unknown>>;
}
/** How this folder throws without knowing the caller's error class. */
export type ToError = (failure: Failure) => Error;

interface Meaning {
  readonly name: string;
  readonly code: FfiErrorCode;
  readonly wayOut?: string | Readonly<Record<LibraryKind, string>>;
}

const meanings: Readonly<Record<number, Meaning>> = {
  [constants.FKV_BAD_ARGUMENT]: { name: "BAD_ARGUMENT", code: "BAD_ARGUMENT" },
  [constants.FKV_BAD_SHAPE]: { name: "BAD_SHAPE", code: "BAD_ARGUMENT" },
  [constants.FKV_OUT_OF_MEMORY]: {
    name: "OUT_OF_MEMORY",
    code: "OUT_OF_MEMORY",
    wayOut: "free memory, or ask for less",
  },
  [constants.FKV_NO_DEVICE]: {
    name: "NO_DEVICE",
    code: "NO_DEVICE",
    wayOut: "check the driver and the device number, or use device cpu",
  },
  [constants.FKV_ABI_MISMATCH]: {
    name: "ABI_MISMATCH",
    code: "ABI_MISMATCH",
    wayOut: "use the native library of this very version",
  },
  [constants.FKV_CAPTURE]: {
    name: "CAPTURE",
    code: "BAD_ARGUMENT",
    wayOut:
      "issue it outside the capture; inside, every forked stream must join the captured one through an event",
  },
  [constants.FKV_NOT_RECORDED]: {
    name: "NOT_RECORDED",
    code: "BAD_ARGUMENT",
    wayOut: "call stream.record(event) first",
  },
  [constants.FKV_DEVICE_FAILED]: {
    name: "DEVICE_FAILED",
    code: "DEVICE_FAILED",
    // After an error of a kernel CUDA refuses every call of the process, also those of a device that is opened anew.
    wayOut: {
      cpu: "the device cannot be used any more; dispose it and open it again",
      cuda: "the GPU cannot be used any more in this process; restart the process",
    },
  },
  [constants.FKV_UNSUPPORTED]: { name: "UNSUPPORTED", code: "BAD_ARGUMENT" },
};

/** The failure of `call`, which returned `status`; `text` is fkv_last_error()'s, and `kind` that of its library. */
export function failureOf(call: string, status: number, text: string, kind: LibraryKind): Failure {
  const meaning = meanings[status] ?? { name: `status ${status}`, code: "DEVICE_FAILED" };
  const told = typeof meaning.wayOut === "object" ? meaning.wayOut[kind] : meaning.wayOut;
  const wayOut = told === undefined ? "" : `; ${told}`;
  return {
    code: meaning.code,
    call,
    message: `${call}: ${text === "" ? meaning.name : text}${wayOut}`,
    detail: { status: meaning.name, text },
  };
}
