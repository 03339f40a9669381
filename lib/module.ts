/// <reference lib="esnext.disposable" preserve="true" />
/**
 * Kernels of your own: a module of GPU code, and typed launches of its kernels.
 *
 * Add two vectors. `add.ptx` comes from `nvcc -ptx -arch=compute_80 add.cu`; a kernel is found by its plain name when it is
 * declared `extern "C" __global__ void add(const float* a, const float* b, float* sum, int n)`.
 * ```ts
 * import * as cuda from "freekv/cuda";
 *
 * using device = cuda.Device.open({ device: "cuda" });
 * using stream = device.stream();
 * using module = cuda.Module.load(device, "add.ptx");
 * const add = module.kernel("add", ["ptr", "ptr", "ptr", "i32"]);
 *
 * const n = 1 << 20;
 * using a = device.alloc(4 * n);
 * using b = device.alloc(4 * n);
 * using sum = device.pinned(4 * n); // kernels write pinned memory, and JavaScript reads it, at the same address
 * stream.copy(a, new Float32Array(n).fill(1));
 * stream.copy(b, new Float32Array(n).fill(2));
 * add.launch({ grid: Math.ceil(n / 256), block: 256, stream }, a, b, sum, n);
 * stream.synchronize();
 * console.log(sum.view(Float32Array)[0]); // 3
 * ```
 *
 * Copy the next chunk while the one before is computed: two streams, two buffers, two events of each.
 * ```ts
 * using copies = device.stream();
 * const slots = [0, 1].map(() => ({ memory: device.alloc(bytes), here: device.event(), done: device.event() }));
 * for (const [i, chunk] of chunks.entries()) { // pinned memory: other copies would wait
 *   const { memory, here, done } = slots[i % 2]!;
 *   if (i >= 2) copies.wait(done); // the kernel has read what lies there
 *   copies.copy(memory, chunk);
 *   copies.record(here);
 *   stream.wait(here);
 *   work.launch({ grid, block, stream }, memory, bytes / 4);
 *   stream.record(done);
 * }
 * ```
 *
 * Capture launches once, then start all of them with one call. Argument values are those of the capture; what pointers point
 * to is read when the graph runs. The graph needs its kernels' modules: once one is disposed, its launch is DISPOSED.
 * ```ts
 * using graph = stream.capture(() => {
 *   add.launch({ grid, block, stream }, a, b, sum, n);
 *   add.launch({ grid, block, stream }, sum, b, sum, n);
 * });
 * for (let step = 0; step < 100; step++) stream.launch(graph);
 * ```
 *
 * Errors are FreeKVError. BAD_ARGUMENT: an image, a name, a list of types or a launch that cannot be, when it is given. What
 * goes wrong inside a kernel shows at a later call, as DEVICE_FAILED with the names of the kernels that may have done it
 * (`detail.kernels`); with `debug: true` it shows at the launch. The CPU twin runs no modules and says so.
 *
 * @packageDocumentation
 */

import { readFileSync } from "node:fs";
import { pack, size } from "../ffi/structs.ts";
import type { JsMemory } from "../ffi/symbols.ts";
import { ArgumentBlock, type Arguments, type ArgumentType, argumentSizes } from "./arguments.ts";
import { badArgument, type DeviceContext, Handle, type OnDevice } from "./context.ts";
import { FreeKVError } from "./errors.ts";

export type { Arguments, ArgumentType } from "./arguments.ts";

/** x alone, or x, y and z; what is absent is 1. */
export type Dimensions = number | readonly [x: number, y?: number, z?: number];

export interface LaunchOptions {
  /** Blocks. */
  readonly grid: Dimensions;
  /** Threads of a block. */
  readonly block: Dimensions;
  readonly stream: OnDevice & { readonly handle: number; synchronize(): void };
  /** Dynamic shared memory of a block; 0 by default. */
  readonly sharedBytes?: number | undefined;
  /** Blocks of a cluster, from compute capability 9.0 on; none by default. */
  readonly cluster?: Dimensions | undefined;
}

export interface CompileOptions {
  /** Of the source, in messages; "kernel.cu" by default. */
  readonly name?: string | undefined;
  /** NVRTC's, e.g. "--use_fast_math"; where none names an architecture, the device's is compiled for. */
  readonly options?: readonly string[] | undefined;
  /** NVRTC's library, instead of the system's. */
  readonly nvrtcPath?: string | undefined;
}

/** A kernel of a module; valid as long as that is. Module.kernel makes them. */
export class Kernel<const T extends readonly ArgumentType[]> {
  readonly name: string;
  readonly types: T;
  readonly module: Module;
  readonly #handle: number;
  readonly #arguments: ArgumentBlock;
  readonly #params = new ArrayBuffer(size.fkv_launch_params);

  constructor(module: Module, name: string, types: T, handle: number) {
    this.name = name;
    this.types = types;
    this.module = module;
    this.#handle = handle;
    this.#arguments = new ArgumentBlock(types);
  }

  /**
   * Launch it with these arguments, in the order and of the types that the kernel was found with.
   * Errors: BAD_ARGUMENT for a count or a value that does not fit, and for a shape that the kernel or the device cannot run;
   * DISPOSED.
   */
  launch({ grid, block, stream, sharedBytes = 0, cluster }: LaunchOptions, ...args: Arguments<T>): void {
    const { context } = this.module;
    void this.module.handle; // DISPOSED, if it was
    const what = `launch of kernel ${this.name}`;
    const values = within(what, () => this.#arguments.with(args));
    const params = within(what, () =>
      pack.fkv_launch_params(
        {
          grid: dimensions(what, "grid", grid),
          block: dimensions(what, "block", block),
          cluster: cluster === undefined ? [0, 0, 0] : dimensions(what, "cluster", cluster),
          shared_bytes: sharedBytes,
        },
        { into: this.#params },
      ),
    );
    const { handle } = stream;
    if (stream.context !== context) throw badArgument(what, "the stream belongs to another device");
    context.lib.fkv_kernel_launch(this.#handle, params, values, handle);
    context.launches.add(handle, [this]);
    if (context.library.debug && !context.launches.captures(handle)) stream.synchronize();
  }
}

/** GPU code on a device. Once disposed, which waits for the device's work, its kernels and graphs of them are DISPOSED. */
export class Module extends Handle implements OnDevice {
  /** What it was loaded from: write it to a file, and `load` takes it. */
  readonly image: Uint8Array;
  /** What the compiler said; empty if it said nothing, or if there was none. */
  readonly log: string;

  private constructor(context: DeviceContext, image: Uint8Array, log: string) {
    context.lib.fkv_module_load(context.u64, image, image.byteLength, context.handle);
    super(context, "module", Number(context.u64[0]));
    this.image = image;
    this.log = log;
  }

  /**
   * Load a cubin, a fatbin or PTX: the bytes, or a file's path. PTX is compiled for the device now.
   * Errors: BAD_ARGUMENT for what cannot be read or loaded, with the driver's log, and on the CPU twin.
   */
  static load(device: OnDevice, image: JsMemory | string | URL): Module {
    const bytes = typeof image === "string" || image instanceof URL ? readImage(image) : bytesIn(image);
    if (bytes.byteLength === 0) throw badArgument("Module.load", "the image is empty");
    return new Module(device.context, bytes, "");
  }

  /**
   * Compile CUDA C++ and load the result. Needs NVRTC, which is part of the CUDA toolkit.
   * Errors: BAD_ARGUMENT for a source that does not compile (`detail.log` is all that the compiler said), where there is no
   * NVRTC, and on the CPU twin.
   */
  static compile(
    device: OnDevice,
    source: string,
    { name = "kernel.cu", options = [], nvrtcPath = "" }: CompileOptions = {},
  ): Module {
    const { context } = device;
    const { lib, u64 } = context;
    const words = options.filter((option) => option !== "");
    lib.fkv_program_compile_sync(
      u64,
      terminated("source", [source]),
      terminated("name", [name]),
      terminated("options", [...words, ""]),
      terminated("nvrtcPath", [nvrtcPath]),
      context.handle,
    );
    const program = Number(u64[0]);
    try {
      const logBytes = new BigUint64Array(1);
      lib.fkv_program_sizes(u64, logBytes, program);
      const imageBytes = Number(u64[0]);
      // One byte more: what is empty is no memory to an FFI.
      const [image, log] = [new Uint8Array(imageBytes + 1), new Uint8Array(Number(logBytes[0]) + 1)];
      lib.fkv_program_read(image, log, program);
      const said = new TextDecoder().decode(log.subarray(0, -1)).trim();
      if (imageBytes === 0) {
        const message = `${name} does not compile:\n${said}`;
        throw new FreeKVError("BAD_ARGUMENT", message, { call: "Module.compile", detail: { log: said } });
      }
      return new Module(context, image.slice(0, imageBytes), said);
    } finally {
      lib.fkv_program_destroy(program);
    }
  }

  get handle(): number {
    return this.live;
  }

  /**
   * The kernel of this name (in C++ the mangled one, unless it is declared `extern "C"`), which takes arguments of these types.
   * Errors: BAD_ARGUMENT if there is none (the message lists those there are), or its arguments have other sizes.
   */
  kernel<const T extends readonly ArgumentType[]>(name: string, types: T): Kernel<T> {
    const { context } = this;
    const sizes = within("module.kernel", () => argumentSizes(types));
    // A list of none is no memory to an FFI.
    const bytes = types.length === 0 ? new Int32Array(1) : Int32Array.from(sizes);
    context.lib.fkv_module_kernel(context.u64, terminated("name", [name]), bytes, types.length, this.live);
    return new Kernel(this, name, types, Number(context.u64[0]));
  }

  protected override free(handle: number): void {
    this.context.lib.fkv_module_unload_sync(handle);
    this.context.launches.done();
  }
}

function bytesIn(memory: JsMemory): Uint8Array {
  return memory instanceof ArrayBuffer
    ? new Uint8Array(memory.slice(0))
    : new Uint8Array(memory.buffer, memory.byteOffset, memory.byteLength).slice();
}

function readImage(path: string | URL): Uint8Array {
  try {
    return new Uint8Array(readFileSync(path));
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    throw new FreeKVError("BAD_ARGUMENT", `Module.load: ${reason}`, { call: "Module.load", cause: error });
  }
}

/** These texts for C, each ended by a zero byte. */
function terminated(what: string, texts: readonly string[]): Uint8Array {
  for (const text of texts) {
    if (typeof text !== "string" || text.includes("\0")) {
      throw badArgument("module", `${what} must be text without zero bytes, got ${typeof text}`);
    }
  }
  return new TextEncoder().encode(texts.map((text) => `${text}\0`).join(""));
}

function dimensions(call: string, name: string, given: Dimensions): readonly [number, number, number] {
  const [x, y = 1, z = 1] = typeof given === "number" ? [given] : given;
  for (const each of [x, y, z]) {
    if (!Number.isInteger(each) || each < 1 || each >= 2 ** 32) {
      throw badArgument(call, `${name} must have integers of at least 1, got ${String(given)}`);
    }
  }
  return [x, y, z];
}

/** What `work` returns; a value that its field cannot hold is BAD_ARGUMENT. */
function within<R>(call: string, work: () => R): R {
  try {
    return work();
  } catch (error) {
    if (error instanceof RangeError) throw badArgument(call, error.message);
    throw error;
  }
}
