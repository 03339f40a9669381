/// <reference lib="esnext.disposable" preserve="true" />
// Whole pages between frames, lanes and host blocks, any number of them.
import { pack } from "../ffi/structs.ts";
import type { Cache } from "./cache.ts";
import type { Device, PinnedBuffer, Stream } from "./device.ts";
import type { Frames } from "./geometry.ts";

const mostPairs = 256; // that one call takes

/** Pages of `frames`. */
export interface Pages {
  readonly frames: Frames;
  readonly pages: readonly number[];
}
/** Which layers (all), how many tokens of each page (all). */
export interface Extent {
  readonly layer?: number;
  readonly layers: number;
  readonly tokens?: number;
}

export class PageCopier implements Disposable {
  readonly #device: Device;
  readonly #cache: Cache;
  /** Page indices of one call, which copies them: [from, to][mostPairs]. Memory that C may be given an address of. */
  readonly #lists: PinnedBuffer;
  readonly #view: Int32Array;

  constructor(device: Device, cache: Cache) {
    this.#device = device;
    this.#cache = cache;
    this.#lists = device.pinned(2 * 4 * mostPairs);
    this.#view = this.#lists.view(Int32Array);
  }

  /** Page i of `src` → page i of `dst`, the same layers of both. */
  copy(src: Pages, dst: Pages, extent: Extent, stream: Stream): void {
    this.#calls(src, dst, extent, (params) =>
      this.#device.lib.fkv_pages_copy(this.#cache.packed, params, stream.handle),
    );
  }

  /** Digests of complete pages of `src` → those of the blocks. */
  digest(src: Pages, blocks: readonly number[], kind: number, extent: Extent, stream: Stream): void {
    this.#calls(src, { frames: src.frames, pages: blocks }, extent, (params) =>
      this.#device.lib.fkv_pages_digest(this.#cache.packed, params, kind, stream.handle),
    );
  }

  #calls(src: Pages, dst: Pages, extent: Extent, call: (params: ArrayBuffer) => void): void {
    for (let i = 0; i < src.pages.length; i += mostPairs) {
      const n = Math.min(mostPairs, src.pages.length - i);
      this.#view.set(src.pages.slice(i, i + n), 0);
      this.#view.set(dst.pages.slice(i, i + n), mostPairs);
      call(
        pack.fkv_pages_params({
          n,
          src_layer0: extent.layer ?? 0,
          dst_layer0: extent.layer ?? 0,
          n_layers: extent.layers,
          n_tokens: extent.tokens ?? this.#cache.geometry.pageSize,
          src: src.frames,
          dst: dst.frames,
          from: this.#lists.address,
          to: this.#lists.address + 4 * mostPairs,
        }),
      );
    }
  }

  [Symbol.dispose](): void {
    this.#lists[Symbol.dispose]();
  }
}

/** first, first + 1 … end − 1. */
export const range = (first: number, end: number): number[] =>
  Array.from({ length: Math.max(0, end - first) }, (_, i) => first + i);
