// Pools of pages for tests: the host's blocks, device frames and digests, and the calls that move pages between them.

import { assert } from "@std/assert";
import type { Values } from "../../ffi/structs.ts";
import { type DeviceBuffer, type PinnedBuffer, pack } from "../../lib/device.ts";
import { toFloat32 } from "../../lib/float.ts";
import { type PageLayout, stridesOf } from "../retrieval/images.ts";
import type { Rig, Story } from "./rig.ts";

export type Frames = Values<"fkv_frames">;
export const untouched = 0xff; // what the twin fills device memory with

/** The host pool: blocks of all layers in chunks of four. */
export interface Pool {
  frames: Frames;
  chunks: PinnedBuffer[];
}
export function hostPool(rig: Rig, blocks: number, layout: PageLayout): Pool {
  const blockBytes = rig.layers * rig.frameBytes;
  const chunks = Array.from({ length: Math.ceil(blocks / 4) }, () => rig.pinned(4 * blockBytes));
  const bases = rig.upload(BigUint64Array.from(chunks, (chunk) => BigInt(chunk.address)));
  return {
    chunks,
    frames: { ...rig.frames(0, rig.frameBytes, layout), chunks: bases, frame: blockBytes, shift: 2 },
  };
}
export const blockBytes = (rig: Rig, pool: Pool, block: number): Uint8Array =>
  (pool.chunks[block >> 2] as PinnedBuffer).view(
    Uint8Array,
    (block & 3) * rig.layers * rig.frameBytes,
    rig.layers * rig.frameBytes,
  );

export interface Copy {
  src: Frames;
  dst: Frames;
  from: number[];
  to: number[];
  srcLayer?: number;
  dstLayer?: number;
  layers?: number;
  tokens?: number;
}
export function pagesParams(rig: Rig, copy: Omit<Copy, "dst"> & { dst?: Frames }): ArrayBuffer {
  return pack.fkv_pages_params({
    n: copy.from.length,
    src_layer0: copy.srcLayer ?? 0,
    dst_layer0: copy.dstLayer ?? 0,
    n_layers: copy.layers ?? rig.layers,
    n_tokens: copy.tokens ?? rig.pageSize,
    src: copy.src,
    dst: copy.dst ?? null,
    from: listed(rig, copy.from),
    to: listed(rig, copy.to),
  });
}
/** A list where a struct can point to it. */
export function listed(rig: Rig, list: readonly number[]): PinnedBuffer {
  const pinned = rig.pinned(4 * list.length);
  pinned.view(Int32Array).set(list);
  return pinned;
}
export function copyPages(rig: Rig, copy: Copy): void {
  rig.device.call("fkv_pages_copy", rig.cache(), pagesParams(rig, copy), rig.stream.handle);
}

/** Device frames of a story, every layer the same but for the first byte of V. */
export function framesOf(
  rig: Rig,
  story: Story,
  layout: PageLayout,
): { buffer: DeviceBuffer; frames: Frames } {
  const pages = Math.ceil(story.tokens / rig.pageSize);
  const buffer = rig.alloc(rig.layers * pages * rig.frameBytes);
  for (let layer = 0; layer < rig.layers; layer++) {
    for (let page = 0; page < pages; page++) {
      const bytes = rig.framePage(story, page, layout);
      bytes[stridesOf(rig, layout).kv] = layer;
      rig.stream.copy(buffer.address + (layer * pages + page) * rig.frameBytes, bytes);
    }
  }
  return { buffer, frames: rig.frames(buffer, pages * rig.frameBytes, layout) };
}

/** Digest of one page of each head, [head][low, high][d], by fkv_pages_digest. */
export function digests(rig: Rig, src: Frames, kind: number, page: number): Float32Array {
  const { headDim, kvHeads, elementBytes, layers } = rig;
  const pool = rig.alloc(3 * layers * kvHeads * 2 * headDim * elementBytes);
  const cache = rig.cache({ digests: digestFrames(rig, pool) });
  const params = pagesParams(rig, { src, from: [page], to: [2], layers: 1 });
  rig.device.call("fkv_pages_digest", cache, params, kind, rig.stream.handle);
  const bytes = rig.download(pool);
  const blockBytes = bytes.length / 3;
  assert(
    bytes.subarray(0, 2 * blockBytes).every((byte) => byte === untouched),
    "other blocks' digests are left alone",
  );
  return toFloat32(bytes.subarray(2 * blockBytes, 2 * blockBytes + blockBytes / layers), rig.dtype);
}
export function digestFrames(rig: Rig, pool: DeviceBuffer): Frames {
  const kv = rig.headDim * rig.elementBytes;
  const layer = rig.kvHeads * 2 * kv;
  return {
    base: pool.address,
    chunks: null,
    layer,
    frame: rig.layers * layer,
    head: 2 * kv,
    kv,
    row: 0,
    shift: 0,
  };
}
export const keysOf = (rig: Rig, story: Story, page: number, head: number): Float32Array[] =>
  Array.from({ length: rig.pageSize }, (_, row) => rig.rowOf(story, 0, page * rig.pageSize + row, head));
