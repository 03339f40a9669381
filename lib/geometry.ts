// Shapes and strides of one engine's KV cache: pure arithmetic that every stage shares.
import { FKV_BF16, FKV_F16, FKV_F32 } from "../ffi/constants.ts";
import type { Dtype } from "./checkpoint.ts";
import { dtypeBytes } from "./float.ts";

export const dtypeCode: Readonly<Record<Dtype, number>> = { f32: FKV_F32, bf16: FKV_BF16, f16: FKV_F16 };

/** Byte strides of `fkv_frames` in the header's terms. */
export interface Strides {
  readonly layer: number;
  readonly frame: number;
  readonly head: number;
  readonly kv: number;
  readonly row: number;
}

/** Fields of `fkv_frames`. */
export interface Frames extends Strides {
  readonly base: number;
  readonly chunks: number;
  readonly shift: number;
}

export interface Geometry {
  readonly layers: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly pageSize: number;
  readonly dtype: Dtype;
  readonly maxPages: number;
  /** K and V of one page of one KV head of one layer: the unit of recall. */
  readonly headPageBytes: number;
  /** One page of one layer, all KV heads. */
  readonly frameBytes: number;
  /** One page of all layers: a host block. */
  readonly blockBytes: number;
  /** A block's digests. */
  readonly digestBytes: number;
  readonly device: Strides;
  readonly host: Strides;
}

export interface GeometryOptions {
  layers: number;
  heads: number;
  kvHeads: number;
  headDim: number;
  pageSize: number;
  dtype: Dtype;
  maxContext: number;
  layout: "hnd" | "nhd";
  hostLayout: "hnd" | "nhd";
}

export function geometryOf(o: GeometryOptions): Geometry {
  const es = dtypeBytes(o.dtype);
  const rowBytes = o.headDim * es;
  const headPageBytes = 2 * o.pageSize * rowBytes;
  const frameBytes = o.kvHeads * headPageBytes;
  const inFrame = (layout: "hnd" | "nhd") =>
    layout === "hnd"
      ? { head: headPageBytes, kv: o.pageSize * rowBytes, row: rowBytes }
      : { head: rowBytes, kv: o.pageSize * o.kvHeads * rowBytes, row: o.kvHeads * rowBytes };
  const digestBytes = o.layers * o.kvHeads * 2 * rowBytes;
  return {
    layers: o.layers,
    heads: o.heads,
    kvHeads: o.kvHeads,
    headDim: o.headDim,
    pageSize: o.pageSize,
    dtype: o.dtype,
    maxPages: Math.ceil(o.maxContext / o.pageSize),
    headPageBytes,
    frameBytes,
    blockBytes: o.layers * frameBytes,
    digestBytes,
    device: { layer: 0, frame: frameBytes, ...inFrame(o.layout) },
    host: { layer: frameBytes, frame: o.layers * frameBytes, ...inFrame(o.hostLayout) },
  };
}

/** Of `blocks` blocks' digests that lie together, [layer][KV head][block][min, max]: scoring reads one head's, one after the other. */
export function digestStrides({ layers, kvHeads, digestBytes }: Geometry, blocks: number): Strides {
  const frame = digestBytes / (layers * kvHeads);
  const head = blocks * frame;
  return { layer: kvHeads * head, head, frame, kv: frame / 2, row: 0 };
}
