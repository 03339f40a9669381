/// <reference lib="esnext.disposable" preserve="true" />
// Memory of a device, and pinned host memory that it reads.

import type { JsMemory } from "../ffi/symbols.ts";
import { badArgument, count, type DeviceContext, Handle } from "./context.ts";
import { FreeKVError } from "./errors.ts";

/** A place that a stream reads or writes: a buffer, or an address inside one. */
export type Memory = DeviceBuffer | PinnedBuffer | PinnedReserve | number;

/** Device memory, aligned to 256 bytes; its first contents are undefined. */
export class DeviceBuffer extends Handle {
  readonly bytes: number;

  /** Device.alloc makes them. */
  constructor(context: DeviceContext, bytes: number) {
    count("alloc", "bytes", bytes, 1);
    context.lib.fkv_device_alloc(context.u64, bytes, context.handle);
    super(context, "device buffer", Number(context.u64[0]));
    this.bytes = bytes;
  }

  get address(): number {
    return this.live;
  }

  protected override free(handle: number): void {
    this.context.lib.fkv_device_free(handle, this.context.handle);
  }
}

/** The constructor of a typed array. */
export interface ViewType<T> {
  readonly BYTES_PER_ELEMENT: number;
  new (buffer: ArrayBuffer, byteOffset: number, length: number): T;
}

const maxViewBytes = 2 ** 32;

/** Pinned host memory, zeroed, aligned to 4096 bytes, which kernels read at the same address. */
export class PinnedBuffer extends Handle {
  readonly bytes: number;
  readonly #windows = new Map<string, ArrayBuffer>();

  /** Device.pinned makes them. */
  constructor(context: DeviceContext, bytes: number) {
    count("pinned", "bytes", bytes, 1);
    context.lib.fkv_host_alloc(context.u64, bytes, context.handle);
    super(context, "pinned buffer", Number(context.u64[0]));
    this.bytes = bytes;
  }

  get address(): number {
    return this.live;
  }

  /**
   * All of it as an ArrayBuffer, without a copy; detached (length 0) when this or the device is disposed. Don't transfer it
   * (postMessage, structuredClone): what it becomes elsewhere can't be detached then, and would read freed memory.
   * Errors: BAD_ARGUMENT above 4 GiB: use window().
   */
  get buffer(): ArrayBuffer {
    return this.window(0, this.bytes);
  }

  /** A part of at most 4 GiB as an ArrayBuffer, without a copy; detached as `buffer` is. */
  window(byteOffset: number, bytes: number): ArrayBuffer {
    const address = this.live;
    count("window", "byteOffset", byteOffset);
    count("window", "bytes", bytes, 1);
    if (byteOffset + bytes > this.bytes) {
      throw badArgument("window", `bytes ${byteOffset}..${byteOffset + bytes} of a buffer of ${this.bytes}`);
    }
    if (bytes > maxViewBytes) {
      throw badArgument(
        "window",
        `${bytes} bytes are more than a view can have (4 GiB); take several windows`,
      );
    }
    const key = `${byteOffset} ${bytes}`;
    const known = this.#windows.get(key);
    if (known !== undefined && known.byteLength > 0) return known;
    const window = this.context.library.toArrayBuffer(address + byteOffset, bytes);
    this.#windows.set(key, window);
    return window;
  }

  /** `length` elements from `byteOffset` on, or as many as fit, as a typed array without a copy. */
  view<T>(type: ViewType<T>, byteOffset = 0, length?: number): T {
    const element = type.BYTES_PER_ELEMENT;
    const n = length ?? Math.floor((this.bytes - byteOffset) / element);
    count("view", "byteOffset", byteOffset);
    count("view", "length", n);
    if (byteOffset % element !== 0) throw badArgument("view", `byteOffset must be a multiple of ${element}`);
    if (byteOffset + n * element > this.bytes) {
      throw badArgument(
        "view",
        `${n} elements of ${element} bytes at ${byteOffset}, in a buffer of ${this.bytes}`,
      );
    }
    if (this.bytes <= maxViewBytes) return new type(this.buffer, byteOffset, n);
    return new type(this.window(byteOffset, n * element), 0, n);
  }

  override invalidate(): void {
    super.invalidate();
    // A view that outlives the memory would read freed pages.
    for (const window of this.#windows.values()) this.context.library.detach(window);
    this.#windows.clear();
  }

  protected override free(handle: number): void {
    this.context.lib.fkv_host_free(handle, this.context.handle);
  }
}

/**
 * Address space for pinned host memory that grows from its start on, by a thread of the library's own: nobody waits for the
 * pinning of what is not used yet. It lies still. What is pinned at a time, `pieceBytes` (a multiple of 4096), is for copies a
 * buffer by itself.
 */
export class PinnedReserve extends Handle {
  readonly bytes: number;

  /** Device.reserve makes them. */
  constructor(context: DeviceContext, bytes: number, pieceBytes: number) {
    count("reserve", "bytes", bytes, 1);
    count("reserve", "pieceBytes", pieceBytes, 1);
    context.lib.fkv_host_reserve(context.u64, bytes, pieceBytes, context.handle);
    super(context, "pinned reserve", Number(context.u64[0]));
    this.bytes = bytes;
  }

  get address(): number {
    return this.live;
  }

  /** Asks for the first `bytes`; returns at once. */
  grow(bytes: number): void {
    count("grow", "bytes", bytes);
    this.context.lib.fkv_host_grow(this.live, bytes, this.context.handle);
  }

  /** How much is there from the start, and, where it cannot grow any more, why. */
  progress(): { readonly bytes: number; readonly failure: FreeKVError | undefined } {
    const { context } = this;
    let failure: FreeKVError | undefined;
    const memory = this.live;
    try {
      context.lib.fkv_host_ready(context.u64, memory, context.handle);
    } catch (error) {
      if (!(error instanceof FreeKVError)) throw error;
      failure = error;
    }
    return { bytes: Math.min(this.bytes, Number(context.u64[0])), failure };
  }

  protected override free(handle: number): void {
    this.context.lib.fkv_host_free(handle, this.context.handle);
  }
}

/** Where a place is. Errors, for a caller without types: BAD_ARGUMENT. */
export function addressOf(call: string, name: string, memory: Memory): number {
  const address: unknown = typeof memory === "object" ? memory?.address : memory;
  if (Number.isSafeInteger(address) && (address as number) > 0) return address as number;
  throw badArgument(
    call,
    `${name} must be memory of the device, pinned memory or an address, got ${shown(memory)}`,
  );
}

/** What C reads: JavaScript memory as such, of a place its address. Errors: BAD_ARGUMENT, also for shared memory. */
export function sourceOf(call: string, memory: Memory | JsMemory): number | JsMemory {
  if (ArrayBuffer.isView(memory)) return unshared(call, memory, memory.buffer);
  if (typeof memory === "object" && memory !== null && "byteLength" in memory)
    return unshared(call, memory, memory);
  return addressOf(call, "src", memory);
}

/** An FFI takes memory of an ArrayBuffer alone; what it makes of any other differs from one runtime to the next. */
function unshared<M extends JsMemory>(call: string, memory: M, buffer: unknown): M {
  if (buffer instanceof ArrayBuffer) return memory;
  throw badArgument(
    call,
    `src must be an ArrayBuffer or a view of one, got ${shown(buffer)}; copy it into one`,
  );
}

function shown(value: unknown): string {
  return typeof value === "object" && value !== null
    ? (value.constructor?.name ?? "an object")
    : String(value);
}

/** How many bytes a place has, where that is known. */
export function bytesOf(memory: Memory | JsMemory): number | undefined {
  if (typeof memory !== "object" || memory === null) return undefined;
  return "byteLength" in memory ? memory.byteLength : memory.bytes;
}
