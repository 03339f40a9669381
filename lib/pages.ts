/// <reference lib="esnext.disposable" preserve="true" />
// Host blocks and their digests: one logical page of all layers each, pinned, reference-counted, shared by forks. The pool lies in
// one stretch of address space, so that it grows without moving, and a thread pins it ahead of those who take blocks.
import type { Device, DeviceBuffer, PinnedReserve, Stream } from "./device.ts";
import { FreeKVError } from "./errors.ts";
import { digestStrides, type Frames, type Geometry } from "./geometry.ts";

const mib = 2 ** 20;
/** Pinned at once. A launch meanwhile waits for it, and must not wait for longer than the step that runs ahead of it lasts. */
const pieceBytesAimedAt = 8 * mib;
/** Pinned before anybody asks: of one full context, at most. */
const firstBytes = 1024 * mib;
/** Of so many blocks the digests are allocated together; an allocation takes the host a tenth of a millisecond. */
const digestedBytes = 512 * mib;
const pageBytes = 4096;
/** Free blocks, the first to be pinned, that prompts leave to decode steps: these take one at a time and wait for no growth. */
const leftToSteps = 64;

const clamp = (value: number, least: number, most: number): number => Math.min(most, Math.max(least, value));
const gcd = (a: number, b: number): number => (b === 0 ? a : gcd(b, a % b));

export class HostPool implements Disposable {
  readonly #device: Device;
  readonly #geometry: Geometry;
  readonly #memory: PinnedReserve;
  readonly #digests: DeviceBuffer[] = [];
  readonly #references: number[] = [];
  #free: number[] = [];
  #limit: number;
  #used = 0;
  /** Blocks from the first to the last that was ever taken. */
  #reached = 0;
  /** Bytes that were asked for, and of them those known to be pinned. */
  #asked = 0;
  #pinned = 0;
  /** The digests of 1 << shift blocks lie together; a device u64 array tells where. */
  readonly #shift: number;
  readonly #digestTable: DeviceBuffer;

  constructor(device: Device, geometry: Geometry, hostBytes: number) {
    const { blockBytes, maxPages } = geometry;
    this.#device = device;
    this.#geometry = geometry;
    this.#limit = Math.floor(hostBytes / blockBytes);
    this.#shift = Math.max(0, Math.floor(Math.log2(Math.min(digestedBytes / blockBytes, 2 * maxPages))));
    this.#digestTable = device.alloc(8 * (Math.ceil(this.#limit / 2 ** this.#shift) + 1));
    // No block lies across the end of a piece, since no copy could.
    const unit = pageBytes / gcd(pageBytes, blockBytes);
    const piece = Math.max(unit, Math.floor(pieceBytesAimedAt / blockBytes / unit) * unit) * blockBytes;
    try {
      this.#memory = device.reserve(Math.max(1, this.#limit) * blockBytes, piece);
    } catch (error) {
      this.#digestTable[Symbol.dispose]();
      throw error;
    }
    this.#ask(Math.min(firstBytes, maxPages * blockBytes));
  }

  /** Blocks in use. */
  get used(): number {
    return this.#used;
  }
  /** Pinned bytes, in use or not. */
  get bytes(): number {
    return this.#memory.progress().bytes;
  }
  /** Host address of block 0; block i begins i·blockBytes behind it. */
  get base(): number {
    return this.#memory.address;
  }

  /**
   * Takes `n` blocks, or none: on OUT_OF_MEMORY nothing has changed. `stream` is where the address of new digests is written:
   * the one that all later users of the block are ordered after. Whoever has the device read or write a block looks first
   * whether it is ready.
   */
  reserve(n: number, stream: Stream): number[] {
    if (this.#used + n > this.#limit) throw this.#exhausted(n);
    const left = n > 1 ? Math.min(leftToSteps, this.#limit - this.#used - n) : 0;
    while (this.#free.length < n + left) this.#extend(stream);
    const ids = this.#free.splice(this.#free.length - n - left, n).reverse();
    for (const id of ids) {
      this.#references[id] = 1;
      this.#reached = Math.max(this.#reached, id + 1);
    }
    this.#used += n;
    this.#keepAhead();
    return ids;
  }

  retain(ids: readonly number[]): void {
    for (const id of ids) this.#references[id] = (this.#references[id] ?? 0) + 1;
  }

  isShared(id: number): boolean {
    return (this.#references[id] ?? 0) > 1;
  }

  release(ids: readonly number[]): void {
    for (const id of ids) {
      const left = (this.#references[id] ?? 0) - 1;
      this.#references[id] = left;
      if (left > 0) continue;
      this.#used--;
      if (id < this.#limit) this.#free.push(id);
    }
  }

  /** Whether these blocks are pinned. Errors: OUT_OF_MEMORY where the system pins no more. */
  ready(ids: readonly number[]): boolean {
    const end = (ids.reduce((last, id) => Math.max(last, id), -1) + 1) * this.#geometry.blockBytes;
    if (end <= this.#pinned) return true;
    const { bytes, failure } = this.#memory.progress();
    this.#pinned = bytes;
    if (end <= bytes) return true;
    if (failure) throw this.#refused(failure);
    return false;
  }

  /** Resolves when these blocks are ready; rejects where they will never be. */
  async whenReady(ids: readonly number[]): Promise<void> {
    while (!this.ready(ids)) await new Promise((resolve) => setTimeout(resolve, 1));
  }

  /** Blocks until these blocks are ready. */
  awaitReady(ids: readonly number[]): void {
    const sleep = new Int32Array(new SharedArrayBuffer(4));
    while (!this.ready(ids)) Atomics.wait(sleep, 0, 0, 1);
  }

  /** Where digests lie, as `fkv_frames`: page index = block id. */
  get digestFrames(): Frames {
    const shift = this.#shift;
    return {
      base: 0,
      chunks: this.#digestTable.address,
      shift,
      ...digestStrides(this.#geometry, 2 ** shift),
    };
  }

  /** Host address of a block. */
  address(id: number): number {
    return this.base + id * this.#geometry.blockBytes;
  }

  /** New block ids, and memory for their digests. */
  #extend(stream: Stream): void {
    const first = this.#references.length;
    const blocks = Math.min(2 ** this.#shift, this.#limit - first);
    const digests = this.#device.alloc(2 ** this.#shift * this.#geometry.digestBytes);
    stream.write(
      this.#digestTable.address + 8 * this.#digests.length,
      new BigUint64Array([BigInt(digests.address)]),
    );
    this.#digests.push(digests);
    const ids = Array.from({ length: blocks }, (_, i) => first + blocks - 1 - i);
    this.#free = [...ids, ...this.#free]; // those that were used before come first: they are pinned
    for (let i = 0; i < blocks; i++) this.#references.push(0);
  }

  /** More is pinned before it is needed: a share of what is in use, so that the steps grow with the pool. */
  #keepAhead(): void {
    const reached = this.#reached * this.#geometry.blockBytes;
    const ahead = clamp(reached / 2, 64 * mib, 512 * mib);
    if (this.#asked < reached + ahead) this.#ask(reached + 2 * ahead);
  }

  #ask(bytes: number): void {
    const most = this.#limit * this.#geometry.blockBytes;
    this.#asked = bytes;
    this.#memory.grow(Math.min(bytes, most));
  }

  #exhausted(wanted: number): FreeKVError {
    const [used, limit] = [this.#used, this.#limit];
    return new FreeKVError(
      "OUT_OF_MEMORY",
      `host pool exhausted at ${used.toLocaleString("en")} of ${limit.toLocaleString("en")} pages; ` +
        "raise --host-bytes or shorten the context",
      { detail: { used, limit, wanted } },
    );
  }

  /** What is pinned is all there will be. */
  #refused(failure: FreeKVError): FreeKVError {
    if (failure.code !== "OUT_OF_MEMORY") return failure;
    this.#limit = Math.floor(this.#pinned / this.#geometry.blockBytes);
    this.#free = this.#free.filter((id) => id < this.#limit);
    return new FreeKVError(
      "OUT_OF_MEMORY",
      `the system pins no more host memory than ${this.#limit.toLocaleString("en")} pages: ${failure.message}; ` +
        "lower --host-bytes or shorten the context",
      { call: failure.call, detail: failure.detail },
    );
  }

  [Symbol.dispose](): void {
    for (const buffer of [this.#memory, ...this.#digests, this.#digestTable]) buffer[Symbol.dispose]();
  }
}
