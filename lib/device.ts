/// <reference lib="esnext.disposable" preserve="true" />
// A device, opened: the CPU twin or a GPU. Exported as freekv/cuda, with what lives on a device and the ABI's structs.

import { type Library, openLibrary } from "../ffi/index.ts";
import type { LibraryKind } from "../ffi/search.ts";
import type { Failure } from "../ffi/status.ts";
import { pack, read, size } from "../ffi/structs.ts";
import type { CallArgs, Calls, EntryName } from "../ffi/symbols.ts";
import { badArgument, DeviceContext, type OnDevice } from "./context.ts";
import { FreeKVError } from "./errors.ts";
import { Launches } from "./launches.ts";
import { DeviceBuffer, PinnedBuffer, PinnedReserve } from "./memory.ts";
import { Event, Stream } from "./stream.ts";

export * from "../ffi/constants.ts";
export { offsets, pack, read, size, write } from "../ffi/structs.ts";
export { type ErrorCode, FreeKVError } from "./errors.ts";
export { DeviceBuffer, type Memory, PinnedBuffer, PinnedReserve } from "./memory.ts";
export {
  type Arguments,
  type ArgumentType,
  type CompileOptions,
  type Dimensions,
  Kernel,
  type LaunchOptions,
  Module,
} from "./module.ts";
export { Event, Graph, Stream } from "./stream.ts";

export type DeviceName = "cpu" | `cuda:${number}`;

export interface LibraryChoice {
  /** The native library to load, instead of searching for it. */
  libraryPath?: string | URL | undefined;
  /**
   * Validate every argument of every call into the library, and wait for each kernel of yours where it is launched, so that
   * what goes wrong in it is reported there.
   */
  debug?: boolean | undefined;
}

export interface DeviceOptions extends LibraryChoice {
  /** "auto" (default): the first GPU where the CUDA library is found and a device answers, else the CPU twin. */
  device?: "auto" | "cuda" | DeviceName | undefined;
  /** The twin's: 0 (default) runs streams as threads; else one operation at a time, in an order drawn from this seed. */
  scheduleSeed?: number | bigint | undefined;
  /** The twin's: a simulated host link, each way; 0 (default) is none. */
  linkBytesPerSecond?: number | undefined;
  /** The twin's compute threads; 0 (default) is one per core. */
  threads?: number | undefined;
  /** CUDA's: our kernels do as on a chip without clusters, warpgroups and 200 KiB of shared memory, with the same bits. */
  plain?: boolean | undefined;
}

export interface DeviceMemory {
  readonly totalBytes: number;
  readonly freeBytes: number;
  /** By alloc(), now. */
  readonly allocatedBytes: number;
  /** By pinned() and reserve(), now. */
  readonly pinnedBytes: number;
}

export interface DeviceInfo extends DeviceMemory {
  /** The hardware's name. */
  readonly model: string;
  /** CUDA's, e.g. "9.0"; null for the twin. */
  readonly computeCapability: string | null;
  /** Of a GPU; the twin's compute threads. */
  readonly multiprocessors: number;
  /** What a kernel may ask for: this and the next three are 0 for the twin, which runs none of yours. */
  readonly maxThreadsPerBlock: number;
  readonly sharedBytesPerBlock: number;
  readonly warpSize: number;
  readonly l2Bytes: number;
}

export interface DeviceListing {
  /** What Device.open takes as `device`. */
  readonly device: DeviceName;
  readonly libraryPath: string;
}

/** A library, and what is known of the kernels that its errors may be about. */
interface Opened {
  readonly library: Library;
  readonly launches: Launches;
}

export class Device implements Disposable, OnDevice {
  /** "cpu" or "cuda:N": what `device` would say to get this one again. */
  readonly name: DeviceName;
  readonly backend: LibraryKind;
  readonly libraryPath: string;
  /** Why "auto" took the CPU twin; undefined if it was asked for, or was not taken. */
  readonly fallback: string | undefined;
  readonly context: DeviceContext;

  private constructor(
    { library, launches }: Opened,
    ordinal: number,
    handle: number,
    fallback: string | undefined,
  ) {
    this.name = library.kind === "cpu" ? "cpu" : `cuda:${ordinal}`;
    this.backend = library.kind;
    this.libraryPath = library.path;
    this.fallback = fallback;
    this.context = new DeviceContext(library, launches, handle);
  }

  /**
   * Open a device.
   * Errors: BAD_ARGUMENT; LIBRARY_NOT_FOUND and ABI_MISMATCH, which list every path tried; NO_DEVICE; OUT_OF_MEMORY.
   */
  static open(options: DeviceOptions = {}): Device {
    checkOptions("Device.open", options);
    const wanted = options.device ?? "auto";
    if (wanted === "cpu") return Device.#openOn(load("cpu", options), 0, options);
    if (wanted !== "auto") {
      return Device.#openOn(load("cuda", options), Number(wanted.split(":")[1] ?? 0), options);
    }
    if (options.libraryPath !== undefined) return Device.#openOn(open("cpu", options), 0, options);
    try {
      return Device.#openOn(load("cuda", options), 0, options);
    } catch (error) {
      if (!(error instanceof FreeKVError) || !noCuda.has(error.code)) throw error;
      return Device.#openOn(load("cpu", options), 0, options, error.message);
    }
  }

  static #openOn(opened: Opened, ordinal: number, options: DeviceOptions, fallback?: string): Device {
    const { library } = opened;
    const params = pack.fkv_device_params({
      ordinal,
      schedule_seed: options.scheduleSeed ?? 0,
      link_bytes_per_second: options.linkBytesPerSecond ?? 0,
      threads: options.threads ?? 0,
      plain: options.plain ? 1 : 0,
    });
    const n = deviceCount(library);
    if (ordinal >= n) {
      const there = n === 0 ? "there is no device" : `there are ${n} devices, numbered from 0`;
      throw new FreeKVError("NO_DEVICE", `no ${library.kind} device ${ordinal}: ${there}`, {
        detail: { ordinal, devices: n, libraryPath: library.path },
      });
    }
    const handle = new BigUint64Array(1);
    library.calls.fkv_device_open(handle, params);
    return new Device(opened, ordinal, Number(handle[0]), fallback);
  }

  /**
   * Every device that could be opened, GPUs first. A library that is searched for in vain has none.
   * Errors: BAD_ARGUMENT; LIBRARY_NOT_FOUND and ABI_MISMATCH for a library at `libraryPath`.
   */
  static list(options: LibraryChoice = {}): DeviceListing[] {
    checkOptions("Device.list", options);
    const given = options.libraryPath !== undefined;
    // A library at a path says itself what it is.
    const kinds: readonly LibraryKind[] = given ? ["cpu"] : ["cuda", "cpu"];
    return kinds.flatMap((kind) => {
      try {
        const { library } = open(kind, options);
        const name = (i: number): DeviceName => (library.kind === "cpu" ? "cpu" : `cuda:${i}`);
        return Array.from({ length: deviceCount(library) }, (_, i) => ({
          device: name(i),
          libraryPath: library.path,
        }));
      } catch (error) {
        const none = given ? noDevice : noCuda;
        if (error instanceof FreeKVError && none.has(error.code)) return [];
        throw error;
      }
    });
  }

  get handle(): number {
    return this.context.handle;
  }

  /** Every entry of the ABI, bound: a status that is not FKV_OK throws FreeKVError. Structs come from `pack`. */
  get lib(): Calls {
    return this.context.lib;
  }

  /** An entry by its name, for what a loop does not call. */
  call<N extends EntryName>(name: N, ...args: CallArgs<N>): ReturnType<Calls[N]> {
    const entry = this.context.lib[name] as (...args: CallArgs<N>) => ReturnType<Calls[N]>;
    if (typeof entry !== "function") throw badArgument("device.call", `the ABI has no ${name}`);
    return entry(...args);
  }

  /** Device memory. Errors: OUT_OF_MEMORY. */
  alloc(bytes: number): DeviceBuffer {
    return new DeviceBuffer(this.context, bytes);
  }

  /** Pinned host memory. Errors: OUT_OF_MEMORY. */
  pinned(bytes: number): PinnedBuffer {
    return new PinnedBuffer(this.context, bytes);
  }

  /** Address space for pinned host memory that grows beside other work. Errors: OUT_OF_MEMORY. */
  reserve(bytes: number, pieceBytes: number): PinnedReserve {
    return new PinnedReserve(this.context, bytes, pieceBytes);
  }

  stream(): Stream {
    return new Stream(this.context);
  }

  /**
   * The stream of kernels whose blocks wait for each other: one for everybody who uses this GPU in the process (the twin has one
   * for each device that is opened). Each call makes an object of its own for it.
   */
  computeStream(): Stream {
    return new Stream(this.context, "compute");
  }

  event(): Event {
    return new Event(this.context);
  }

  /** Block until all work of the device is done. Errors: DEVICE_FAILED. */
  synchronize(): void {
    this.lib.fkv_device_synchronize_sync(this.handle);
    this.context.launches.done();
  }

  info(): DeviceInfo {
    const bytes = new ArrayBuffer(size.fkv_device_info);
    const view = new DataView(bytes);
    view.setUint32(0, bytes.byteLength, true);
    this.lib.fkv_device_get_info(bytes, this.handle);
    const info = read.fkv_device_info(view, 0);
    return {
      model: info.name,
      computeCapability: this.backend === "cpu" ? null : `${info.compute_major}.${info.compute_minor}`,
      multiprocessors: info.multiprocessors,
      maxThreadsPerBlock: info.max_threads_per_block,
      sharedBytesPerBlock: info.shared_bytes_per_block,
      warpSize: info.warp_size,
      l2Bytes: info.l2_bytes,
      totalBytes: info.total_bytes,
      freeBytes: info.free_bytes,
      allocatedBytes: info.allocated_bytes,
      pinnedBytes: info.pinned_bytes,
    };
  }

  memory(): DeviceMemory {
    const { totalBytes, freeBytes, allocatedBytes, pinnedBytes } = this.info();
    return { totalBytes, freeBytes, allocatedBytes, pinnedBytes };
  }

  /** Waits for the device's work and closes it. What still lives on it is invalid afterwards: its use is DISPOSED. */
  [Symbol.dispose](): void {
    this.context.close();
  }
}

const noDevice: ReadonlySet<string> = new Set(["NO_DEVICE"]);
/** What "auto" takes as "no GPU here". */
const noCuda: ReadonlySet<string> = new Set(["LIBRARY_NOT_FOUND", "ABI_MISMATCH", ...noDevice]);

/** A failed device names no kernel: those of the caller's that may have run are told with it. */
function errorOf({ code, message, call, detail }: Failure, launches: Launches): FreeKVError {
  const kernels = code === "DEVICE_FAILED" ? launches.names() : [];
  if (kernels.length === 0) return new FreeKVError(code, message, { call, detail });
  const which =
    kernels.length === 1
      ? `kernel ${kernels[0]} was running`
      : `one of these kernels was running: ${kernels.join(", ")}`;
  const exact = kernels.length === 1 ? "" : "; open the device with debug: true to learn which";
  return new FreeKVError(code, `${message} (${which}${exact})`, { call, detail: { ...detail, kernels } });
}

function open(kind: LibraryKind, { libraryPath, debug }: LibraryChoice): Opened {
  const launches = new Launches();
  const toError = (failure: Failure): FreeKVError => errorOf(failure, launches);
  return { library: openLibrary(kind, { libraryPath, debug, toError }), launches };
}

/** `open`, and refuse the other kind of library at an explicit path. */
function load(kind: LibraryKind, options: LibraryChoice): Opened {
  const opened = open(kind, options);
  const found = opened.library.kind;
  if (found === kind) return opened;
  throw badArgument("Device.open", `libraryPath is the ${found} library, but device asks for ${kind}`);
}

function deviceCount(library: Library): number {
  const n = new Int32Array(1);
  library.calls.fkv_device_count(n);
  return n[0] as number;
}

const checks: { readonly [K in keyof DeviceOptions]-?: readonly [(value: unknown) => boolean, string] } = {
  device: [
    (value) => typeof value === "string" && /^(auto|cpu|cuda(:\d{1,3})?)$/.test(value),
    `"auto", "cpu", "cuda" or "cuda:N"`,
  ],
  libraryPath: [(value) => typeof value === "string" || value instanceof URL, "a path or a file URL"],
  debug: [(value) => typeof value === "boolean", "true or false"],
  plain: [(value) => typeof value === "boolean", "true or false"],
  scheduleSeed: [
    (value) =>
      typeof value === "bigint"
        ? value === BigInt.asUintN(64, value)
        : Number.isSafeInteger(value) && (value as number) >= 0,
    "an integer from 0 to 2^53 − 1, or a bigint below 2^64",
  ],
  linkBytesPerSecond: [
    (value) => Number.isFinite(value) && (value as number) >= 0,
    "a number of bytes a second, or 0",
  ],
  threads: [
    (value) => Number.isInteger(value) && (value as number) >= 0 && (value as number) <= 1024,
    "0 to 1024",
  ],
};

function checkOptions(call: string, options: DeviceOptions): void {
  for (const [name, value] of Object.entries(options)) {
    const check = checks[name as keyof DeviceOptions];
    if (check === undefined) throw badArgument(call, `there is no option ${name}`);
    const [test, wanted] = check;
    if (value !== undefined && !test(value)) {
      throw badArgument(call, `${name} must be ${wanted}, got ${String(value)}`);
    }
  }
}
