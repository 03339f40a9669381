// Finds, loads and checks a native library, and wraps its entries so that a status that is not FKV_OK throws.

import { existsSync } from "node:fs";
import { load } from "#backend";
import { FKV_ABI_VERSION, FKV_OK } from "./constants.ts";
import { type LibraryKind, libraryPlaces, type Place, wayToGet } from "./search.ts";
import { failureOf, type ToError } from "./status.ts";
import { type Backend, type Calls, type EntryName, entryNames, symbolTable } from "./symbols.ts";
import { validate } from "./validate.ts";

export interface LibraryOptions {
  /** The file to load, instead of searching. */
  libraryPath?: string | URL | undefined;
  /** Check every argument of every call before it is made. */
  debug?: boolean | undefined;
  toError: ToError;
}

export interface Library {
  readonly path: string;
  readonly kind: LibraryKind;
  /** Whether every argument of every call is checked. */
  readonly debug: boolean;
  readonly calls: Calls;
  /** A view of memory that C owns: 1 to 2^32 bytes. Whoever frees that memory detaches the view first. */
  toArrayBuffer(address: number, bytes: number): ArrayBuffer;
  /** Make such a view empty; the memory stays as it is. */
  detach(buffer: ArrayBuffer): void;
}

/** A place that was tried in vain, and why. */
interface Miss extends Place {
  readonly reason: string;
  readonly mismatch: boolean;
}

/**
 * Load the first library of this kind that works.
 * Errors: LIBRARY_NOT_FOUND, or ABI_MISMATCH where one was found but is another version's; both list every path.
 */
export function openLibrary(kind: LibraryKind, options: LibraryOptions): Library {
  const misses: Miss[] = [];
  for (const place of libraryPlaces(kind, options.libraryPath)) {
    const result = tryPlace(place);
    if (!("reason" in result)) return wrap(place.path, result, options);
    misses.push(result);
  }
  const mismatch = misses.some((miss) => miss.mismatch);
  const list = misses.map(({ path, reason }) => `\n  ${path}: ${reason}`).join("");
  const what = options.libraryPath === undefined ? `${kind} library` : "library at libraryPath";
  throw options.toError({
    code: mismatch ? "ABI_MISMATCH" : "LIBRARY_NOT_FOUND",
    message: mismatch
      ? `the ${what} is of another version than this code; get one of this version: ${wayToGet(kind)}. Tried:${list}`
      : `no ${what} could be loaded; get one (${wayToGet(kind)}), or say where one is: libraryPath, on the command line --library-path. Tried:${list}`,
    detail: { kind, tried: misses.map(({ path, origin, reason }) => ({ path, origin, reason })) },
  });
}

function tryPlace(place: Place): Backend | Miss {
  const miss = (reason: string, mismatch = false): Miss => ({ ...place, reason, mismatch });
  if (!existsSync(place.path)) return miss("no such file");
  let version: number;
  try {
    version = load(place.path, symbolTable(["fkv_abi_version"])).calls.fkv_abi_version();
  } catch (error) {
    return miss(error instanceof Error ? error.message : String(error));
  }
  if (version !== FKV_ABI_VERSION)
    return miss(`ABI version ${version}, this code has ${FKV_ABI_VERSION}`, true);
  try {
    return load(place.path, symbolTable(entryNames));
  } catch {
    return miss(
      `does not export ${entryNames.filter((name) => !exportsEntry(place.path, name)).join(", ")}`,
      true,
    );
  }
}

/** Whether the library at `path` has this entry. */
export function exportsEntry(path: string, name: EntryName): boolean {
  try {
    load(path, symbolTable([name]));
    return true;
  } catch {
    return false;
  }
}

function wrap(path: string, backend: Backend, { debug = false, toError }: LibraryOptions): Library {
  const raw = backend.calls;
  const kind = raw.fkv_backend() === "cuda" ? "cuda" : "cpu";
  const table = symbolTable(entryNames);
  const calls: Record<string, unknown> = {};
  for (const name of entryNames) {
    const entry = table[name];
    let call = raw[name] as (...args: unknown[]) => unknown;
    if (entry.returns === "status") {
      const unchecked = call;
      call = (...args) => {
        const status = unchecked(...args) as number;
        if (status !== FKV_OK) throw toError(failureOf(name, status, raw.fkv_last_error(), kind));
      };
    }
    if (debug) {
      const unvalidated = call;
      call = (...args) => {
        validate(name, entry, args, toError);
        return unvalidated(...args);
      };
    }
    calls[name] = call;
  }
  return {
    path,
    kind,
    debug,
    calls: calls as unknown as Calls,
    toArrayBuffer: backend.toArrayBuffer,
    // One that its holder transferred is empty already, and no runtime detaches it again.
    detach: (buffer) => {
      if (buffer.byteLength > 0) backend.detach(buffer);
    },
  };
}
