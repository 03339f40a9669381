/// <reference lib="esnext.disposable" preserve="true" />
// Order of work on a device: streams, events that join them, graphs that replay them.

import { setImmediate } from "node:timers";
import type { JsMemory } from "../ffi/symbols.ts";
import { badArgument, count, type DeviceContext, Handle } from "./context.ts";
import { type Launched, requireLoaded } from "./launches.ts";
import { addressOf, bytesOf, type Memory, sourceOf } from "./memory.ts";

/** Long enough that waiting burns no core, short enough that the event loop stays responsive. */
const pollUs = 200;

/** A point in a stream's work. */
export class Event extends Handle {
  /** Device.event makes them. */
  constructor(context: DeviceContext) {
    context.lib.fkv_event_create(context.u64, context.handle);
    super(context, "event", Number(context.u64[0]));
  }

  get handle(): number {
    return this.live;
  }

  /** Whether the work before its latest record is done. Errors, here and below: BAD_ARGUMENT if it was never recorded. */
  query(): boolean {
    const { context } = this;
    context.lib.fkv_event_query(context.i32, this.live);
    return this.#told(context.i32[0] !== 0);
  }

  /** Block until it is done or `timeoutUs` microseconds have passed; whether it is done. */
  wait(timeoutUs: number): boolean {
    const { context } = this;
    count("event.wait", "timeoutUs", timeoutUs);
    context.lib.fkv_event_wait_sync(context.i32, this.live, timeoutUs);
    return this.#told(context.i32[0] !== 0);
  }

  /** Block until it is done. */
  synchronize(): void {
    while (!this.wait(1_000_000));
  }

  /** Resolves when it is done; other work of the event loop gets its turn in between. */
  async done(): Promise<void> {
    while (!this.wait(pollUs)) await new Promise<void>((resolve) => setImmediate(resolve));
  }

  /** Milliseconds of the device's clock from one event to another, both of them done. */
  static elapsedMs(start: Event, end: Event): number {
    const { context } = start;
    context.lib.fkv_event_elapsed_ms(context.f32, start.live, end.live);
    return context.f32[0] as number;
  }

  #told(done: boolean): boolean {
    if (done) this.context.launches.reached(this.live);
    return done;
  }

  protected override free(handle: number): void {
    this.context.lib.fkv_event_destroy(handle);
    this.context.launches.forget(handle);
  }
}

/** Work that was captured once and is launched as one. Stream.capture makes them. */
export class Graph extends Handle {
  /** The kernels of yours in it. */
  readonly kernels: ReadonlySet<string>;
  readonly #launched: ReadonlySet<Launched>;

  constructor(context: DeviceContext, handle: number, launched: ReadonlySet<Launched>) {
    super(context, "graph", handle);
    this.kernels = new Set([...launched].map(({ name }) => name));
    this.#launched = launched;
  }

  /** For Stream.launch: what runs with it. Errors: DISPOSED if its code was unloaded. */
  get launched(): ReadonlySet<Launched> {
    requireLoaded(this.#launched);
    return this.#launched;
  }

  get handle(): number {
    return this.live;
  }

  protected override free(handle: number): void {
    this.context.lib.fkv_graph_destroy(handle);
  }
}

/** A queue of work; everything below returns before it has run, unless it says that it blocks. No bytes are no work. */
export class Stream extends Handle {
  /** Device.stream and Device.computeStream make them. */
  constructor(context: DeviceContext, which?: "compute") {
    if (which === "compute") context.lib.fkv_stream_compute(context.u64, context.handle);
    else context.lib.fkv_stream_create(context.u64, context.handle);
    super(context, "stream", Number(context.u64[0]));
  }

  get handle(): number {
    return this.live;
  }

  /**
   * Copy `bytes` (all of src if absent) between device and pinned memory, or from JavaScript memory to the device, which
   * is read before this returns and is refused during capture.
   */
  copy(dst: Memory, src: Memory | JsMemory, bytes?: number): void {
    const n = bytes ?? bytesOf(src) ?? bytesOf(dst);
    if (n === undefined) throw badArgument("stream.copy", "bytes must be given between two addresses");
    count("stream.copy", "bytes", n);
    checkFits("stream.copy", "dst", dst, n);
    checkFits("stream.copy", "src", src, n);
    const stream = this.live;
    if (n === 0) return;
    const to = addressOf("stream.copy", "dst", dst);
    this.context.lib.fkv_memcpy_async(to, sourceOf("stream.copy", src), n, stream);
  }

  /** Copy `height` rows of `width` bytes, which lie `dstPitch` and `srcPitch` bytes apart. */
  copy2d(
    dst: Memory,
    dstPitch: number,
    src: Memory | JsMemory,
    srcPitch: number,
    width: number,
    height: number,
  ): void {
    const stream = this.live;
    count("stream.copy2d", "dstPitch", dstPitch);
    count("stream.copy2d", "srcPitch", srcPitch);
    count("stream.copy2d", "width", width);
    count("stream.copy2d", "height", height);
    if (width === 0 || height === 0) return;
    checkFits("stream.copy2d", "dst", dst, dstPitch * (height - 1) + width);
    checkFits("stream.copy2d", "src", src, srcPitch * (height - 1) + width);
    const to = addressOf("stream.copy2d", "dst", dst);
    const from = sourceOf("stream.copy2d", src);
    this.context.lib.fkv_memcpy_2d_async(to, dstPitch, from, srcPitch, width, height, stream);
  }

  /** Set `bytes` bytes (all of dst if absent) to the low byte of `value`, an int32. */
  memset(dst: Memory, value: number, bytes?: number): void {
    const n = bytes ?? bytesOf(dst);
    if (n === undefined) throw badArgument("stream.memset", "bytes must be given for an address");
    count("stream.memset", "bytes", n);
    checkInt32("stream.memset", value);
    checkFits("stream.memset", "dst", dst, n);
    const stream = this.live;
    if (n === 0) return;
    this.context.lib.fkv_memset_async(addressOf("stream.memset", "dst", dst), value, n, stream);
  }

  /** The same for `height` rows of `width` bytes, which lie `pitch` bytes apart; what lies between them stays. */
  memset2d(dst: Memory, pitch: number, value: number, width: number, height: number): void {
    const stream = this.live;
    count("stream.memset2d", "pitch", pitch);
    checkInt32("stream.memset2d", value);
    count("stream.memset2d", "width", width);
    count("stream.memset2d", "height", height);
    if (width === 0 || height === 0) return;
    checkFits("stream.memset2d", "dst", dst, pitch * (height - 1) + width);
    const to = addressOf("stream.memset2d", "dst", dst);
    this.context.lib.fkv_memset_2d_async(to, pitch, value, width, height, stream);
  }

  /** Write up to 3072 bytes, taken from `src` now, to device memory when the stream gets there. */
  write(dst: Memory, src: JsMemory): void {
    const from = sourceOf("stream.write", src);
    if (typeof from === "number") throw badArgument("stream.write", "src must be JavaScript memory");
    const bytes = from.byteLength;
    checkFits("stream.write", "dst", dst, bytes);
    const stream = this.live;
    if (bytes === 0) return;
    this.context.lib.fkv_write_async(addressOf("stream.write", "dst", dst), from, bytes, stream);
  }

  /** Later work of this stream waits for `event`. Errors: BAD_ARGUMENT if it was never recorded. */
  wait(event: Event): void {
    this.context.lib.fkv_stream_wait_event(event.handle, this.live);
    this.context.launches.wait(this.live, event.handle);
  }

  record(event: Event): void {
    this.context.lib.fkv_event_record(event.handle, this.live);
    this.context.launches.record(event.handle, this.live);
  }

  /** Block until all work of this stream is done. */
  synchronize(): void {
    const stream = this.live;
    this.context.lib.fkv_stream_synchronize_sync(stream);
    this.context.launches.done(stream);
  }

  /**
   * A graph of what `issue` gives to this stream, and to streams that fork from it through events and join it again.
   * Nothing of it runs. Errors: BAD_ARGUMENT for what a capture cannot hold, which is also what waits for the device, such as
   * the disposal of memory or of a stream; the capture is over then.
   */
  capture(issue: () => void): Graph {
    const stream = this.live;
    this.context.lib.fkv_capture_begin(stream);
    let kernels: ReadonlySet<Launched>;
    try {
      kernels = this.context.launches.capture(stream, () => {
        const result: unknown = issue();
        if (result instanceof Promise)
          throw badArgument("stream.capture", "takes a function that is not async");
      });
    } catch (error) {
      try {
        this.#endCapture(stream, new Set())[Symbol.dispose]();
      } catch {
        // A capture that failed half-way need not end well; what made it fail is the error to see.
      }
      throw error;
    }
    return this.#endCapture(stream, kernels);
  }

  launch(graph: Graph): void {
    const stream = this.live;
    const { launched } = graph;
    this.context.lib.fkv_graph_launch(graph.handle, stream);
    if (launched.size > 0) this.context.launches.add(stream, launched);
  }

  #endCapture(stream: number, kernels: ReadonlySet<Launched>): Graph {
    const { context } = this;
    context.lib.fkv_capture_end(context.u64, stream);
    return new Graph(context, Number(context.u64[0]), kernels);
  }

  protected override free(handle: number): void {
    this.context.lib.fkv_stream_destroy_sync(handle);
    this.context.launches.done(handle);
  }
}

function checkInt32(call: string, value: number): void {
  // What is no number at all is no integer; the operators would throw for a bigint.
  if (Number.isInteger(value) && value === (value | 0)) return;
  throw badArgument(call, `value must be an int32, got ${String(value)}`);
}

function checkFits(call: string, name: string, memory: Memory | JsMemory, bytes: number): void {
  const has = bytesOf(memory);
  if (has !== undefined && bytes > has) throw badArgument(call, `${bytes} bytes, but ${name} has ${has}`);
}
