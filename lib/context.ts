/// <reference lib="esnext.disposable" preserve="true" />
// What the objects of one device share: its library, its handle, and who lives on it.

import type { Library } from "../ffi/index.ts";
import type { Calls } from "../ffi/symbols.ts";
import { FreeKVError, unlessFailed } from "./errors.ts";
import type { Launches } from "./launches.ts";

/** A device, or something that lives on one. */
export interface OnDevice {
  /** For this folder's own files: what everything on one device shares. */
  readonly context: DeviceContext;
}

export class DeviceContext {
  readonly library: Library;
  readonly launches: Launches;
  /** Outputs of calls that return one value at once; read before the next call. */
  readonly u64: BigUint64Array = new BigUint64Array(1);
  readonly i32: Int32Array = new Int32Array(1);
  readonly f32: Float32Array = new Float32Array(1);
  readonly #children = new Set<Handle>();
  #handle: number;

  constructor(library: Library, launches: Launches, handle: number) {
    this.library = library;
    this.launches = launches;
    this.#handle = handle;
  }

  get isOpen(): boolean {
    return this.#handle !== 0;
  }
  get handle(): number {
    if (this.#handle === 0) throw disposed("device");
    return this.#handle;
  }
  /** The entries of the ABI. */
  get lib(): Calls {
    if (this.#handle === 0) throw disposed("device");
    return this.library.calls;
  }

  adopt(child: Handle): void {
    this.#children.add(child);
  }
  forget(child: Handle): void {
    this.#children.delete(child);
  }

  /**
   * Closes the device: its children are invalid from now on, and C frees what they held. All of it is done, also when a part
   * throws; the first error is thrown at the end.
   */
  close(): void {
    if (this.#handle === 0) return;
    const handle = this.#handle;
    this.#handle = 0;
    const errors: unknown[] = [];
    const attempt = (work: () => void): void => {
      try {
        work();
      } catch (error) {
        errors.push(error);
      }
    };
    for (const child of this.#children) attempt(() => child.invalidate());
    this.#children.clear();
    attempt(() => this.library.calls.fkv_device_close_sync(handle));
    if (errors.length > 0) throw errors[0];
  }
}

/** Something of a device that C knows by an address. Valid until it or its device is disposed. */
export abstract class Handle implements Disposable, OnDevice {
  readonly context: DeviceContext;
  readonly #what: string;
  #handle: number;

  /** `what`: how errors call it. */
  protected constructor(context: DeviceContext, what: string, handle: number) {
    this.context = context;
    this.#what = what;
    this.#handle = handle;
    context.adopt(this);
  }

  /** The address as C knows it. Errors: DISPOSED. */
  protected get live(): number {
    if (this.#handle === 0) throw disposed(this.#what);
    return this.#handle;
  }

  /** Gives `handle` back to C, which refuses it during a capture where it must wait for the device. */
  protected abstract free(handle: number): void;

  /** Makes every later use a DISPOSED error, without a call into C. */
  invalidate(): void {
    this.#handle = 0;
  }

  /** Errors: BAD_ARGUMENT during a capture, unless this is an event or a graph; it lives on, and is disposed after it. */
  [Symbol.dispose](): void {
    const handle = this.#handle;
    if (handle === 0) return;
    let kept = false;
    try {
      unlessFailed(() => this.free(handle));
    } catch (error) {
      kept = error instanceof FreeKVError && error.detail.status === "CAPTURE";
      throw error;
    } finally {
      if (!kept) {
        this.context.forget(this);
        this.invalidate();
      }
    }
  }
}

export function disposed(what: string): FreeKVError {
  return new FreeKVError("DISPOSED", `this ${what} was disposed, or its device was; make a new one`, {
    detail: { what },
  });
}

export function badArgument(call: string, text: string): FreeKVError {
  return new FreeKVError("BAD_ARGUMENT", `${call}: ${text}`, { call });
}

/** `value` if it is an integer of at least `least`. */
export function count(call: string, name: string, value: number, least = 0): number {
  if (Number.isSafeInteger(value) && value >= least) return value;
  throw badArgument(call, `${name} must be an integer of at least ${least}, got ${String(value)}`);
}
