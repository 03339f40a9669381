/// <reference lib="esnext.disposable" preserve="true" />
// Host blocks and their digests: one logical page of all layers each, pinned, reference-counted, shared by forks.
// The pool grows by chunks and never moves: block id → address goes through a device table of chunk bases.
import type { Device, DeviceBuffer, PinnedBuffer, Stream } from "./device.ts";
import { FreeKVError } from "./errors.ts";
import type { Geometry } from "./geometry.ts";

const chunkBytesAimedAt = 16 * 2 ** 20; // pinning a larger piece at once holds up a running device for longer

export class HostPool implements Disposable {
  readonly #device: Device;
  readonly #geometry: Geometry;
  readonly #maxBlocks: number;
  readonly #chunks: PinnedBuffer[] = [];
  readonly #digests: DeviceBuffer[] = [];
  readonly #free: number[] = [];
  readonly #references: number[] = [];
  /** Blocks a chunk are 1 << shift. */
  readonly shift: number;
  /** Device u64 arrays of chunk addresses. */
  readonly hostTable: DeviceBuffer;
  readonly digestTable: DeviceBuffer;

  constructor(device: Device, geometry: Geometry, hostBytes: number) {
    this.#device = device;
    this.#geometry = geometry;
    this.shift = Math.max(0, Math.floor(Math.log2(chunkBytesAimedAt / geometry.blockBytes)));
    this.#maxBlocks = Math.floor(hostBytes / geometry.blockBytes);
    const tableBytes = 8 * (Math.ceil(this.#maxBlocks / 2 ** this.shift) + 1);
    this.hostTable = device.alloc(tableBytes);
    this.digestTable = device.alloc(tableBytes);
  }

  /** Blocks in use. */
  get used(): number {
    return this.#references.length - this.#free.length;
  }
  /** Pinned bytes, in use or not. */
  get bytes(): number {
    return this.#chunks.reduce((n, c) => n + c.bytes, 0);
  }

  /**
   * Takes `n` blocks, or none: on OUT_OF_MEMORY nothing has changed. `stream` is where a new chunk's address is written:
   * the one that all later users of the block are ordered after.
   */
  reserve(n: number, stream: Stream): number[] {
    const short = this.used + n - this.#maxBlocks;
    if (short > 0)
      throw new FreeKVError(
        "OUT_OF_MEMORY",
        `host pool exhausted at ${this.used.toLocaleString("en")} of ${this.#maxBlocks.toLocaleString("en")} pages; ` +
          "raise --host-bytes or shorten the context",
        { detail: { used: this.used, limit: this.#maxBlocks, wanted: n } },
      );
    while (this.#free.length < n) this.#grow(stream);
    const ids = this.#free.splice(this.#free.length - n, n).reverse();
    for (const id of ids) this.#references[id] = 1;
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
      if (left === 0) this.#free.push(id);
    }
  }

  /** Host address of a block. */
  address(id: number): number {
    const chunk = this.#chunks[id >> this.shift] as PinnedBuffer;
    return chunk.address + (id & (2 ** this.shift - 1)) * this.#geometry.blockBytes;
  }

  #grow(stream: Stream): void {
    const blocks = Math.min(2 ** this.shift, this.#maxBlocks - this.#references.length);
    const index = this.#chunks.length;
    const chunk = this.#device.pinned(blocks * this.#geometry.blockBytes);
    this.#chunks.push(chunk);
    const digests = this.#device.alloc(blocks * this.#geometry.digestBytes);
    this.#digests.push(digests);
    stream.write(this.hostTable.address + 8 * index, new BigUint64Array([BigInt(chunk.address)]));
    stream.write(this.digestTable.address + 8 * index, new BigUint64Array([BigInt(digests.address)]));
    const first = this.#references.length;
    for (let i = blocks - 1; i >= 0; i--) this.#free.push(first + i);
    for (let i = 0; i < blocks; i++) this.#references.push(0);
  }

  [Symbol.dispose](): void {
    for (const buffer of [...this.#chunks, ...this.#digests, this.hostTable, this.digestTable])
      buffer[Symbol.dispose]();
  }
}
