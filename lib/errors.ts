// The one error class, and what each of its codes means outside: to a shell and to HTTP.

export type ErrorCode =
  | "BAD_ARGUMENT"
  | "BAD_CHECKPOINT"
  | "UNSUPPORTED_MODEL"
  | "CONTEXT_TOO_LONG"
  | "OUT_OF_MEMORY"
  | "BUSY"
  | "DISPOSED"
  | "NO_DEVICE"
  | "LIBRARY_NOT_FOUND"
  | "ABI_MISMATCH"
  | "DEVICE_FAILED";

export interface ErrorContext {
  /** What failed: an ABI entry or a method. */
  call?: string | undefined;
  detail?: Readonly<Record<string, unknown>> | undefined;
  cause?: unknown;
}

export class FreeKVError extends Error {
  readonly code: ErrorCode;
  readonly call?: string;
  /** What a program may want to know; for a failed ABI entry `status` (the C status' name) and `text` (C's own words). */
  readonly detail: Readonly<Record<string, unknown>>;

  /** `message` is for a person: what is wrong, and the way out. */
  constructor(code: ErrorCode, message: string, { call, detail = {}, cause }: ErrorContext = {}) {
    super(message, cause === undefined ? undefined : { cause });
    this.name = "FreeKVError";
    this.code = code;
    if (call !== undefined) this.call = call;
    this.detail = detail;
  }
}

/** Does what gives something back. A failed device says so at every call; here it would only hide the first error. */
export function unlessFailed(work: () => void): void {
  try {
    work();
  } catch (error) {
    if (!(error instanceof FreeKVError && error.code === "DEVICE_FAILED")) throw error;
  }
}

interface Outside {
  /** 1 our fault · 2 your input · 3 this machine. */
  readonly exit: 1 | 2 | 3;
  readonly http: number;
}

const outside: Readonly<Record<ErrorCode, Outside>> = {
  BAD_ARGUMENT: { exit: 2, http: 400 },
  BAD_CHECKPOINT: { exit: 2, http: 500 },
  UNSUPPORTED_MODEL: { exit: 2, http: 500 },
  CONTEXT_TOO_LONG: { exit: 2, http: 400 },
  OUT_OF_MEMORY: { exit: 3, http: 503 },
  BUSY: { exit: 1, http: 503 },
  DISPOSED: { exit: 1, http: 503 },
  NO_DEVICE: { exit: 3, http: 503 },
  LIBRARY_NOT_FOUND: { exit: 3, http: 503 },
  ABI_MISMATCH: { exit: 3, http: 503 },
  DEVICE_FAILED: { exit: 3, http: 500 },
};

/** What a user gave is refused before C sees it: what C refuses is our own mistake. */
function isOurs(error: FreeKVError): boolean {
  return error.code === "BAD_ARGUMENT" && error.detail.status !== undefined;
}

/** The exit code of a command that ends with this error. */
export function exitCode(error: unknown): 1 | 2 | 3 {
  return error instanceof FreeKVError && !isOurs(error) ? outside[error.code].exit : 1;
}

/** The HTTP status of a request that ends with this error. */
export function httpStatus(error: unknown): number {
  return error instanceof FreeKVError && !isOurs(error) ? outside[error.code].http : 500;
}
