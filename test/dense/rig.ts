/// <reference lib="esnext.disposable" preserve="true" />
// Runs the dense calls over plain arrays. Device memory starts as NaN, so what was not written shows.

import type { Dtype } from "../../lib/checkpoint.ts";
import {
  type Device,
  type DeviceBuffer,
  FKV_ADD,
  FKV_DECODE,
  FKV_STORE,
  FKV_SWIGLU,
  pack,
  type Stream,
  size,
} from "../../lib/device.ts";
import { fromFloat32, toFloat32 } from "../../lib/float.ts";
import { dtypeCode } from "../../lib/geometry.ts";
import type { Epilogue } from "../reference/dense.ts";
import { openTarget } from "../target.ts";

export const epilogueCodes: Readonly<Record<Epilogue, number>> = {
  store: FKV_STORE,
  add: FKV_ADD,
  swiglu: FKV_SWIGLU,
};

/** What a value becomes when it is stored. */
export function rounded(values: Float32Array, dtype: Dtype): Float32Array {
  return toFloat32(fromFloat32(values, dtype), dtype);
}

/** Views the same bits as integers: equality that tells NaN from NaN and 0 from −0. */
export function bits(values: Float32Array): Uint32Array {
  return new Uint32Array(values.slice().buffer);
}

export interface Phase {
  weight: DeviceBuffer;
  bias?: DeviceBuffer | undefined;
  norm?: DeviceBuffer | undefined;
  x: DeviceBuffer | number;
  y: DeviceBuffer | number;
  xStride?: number;
  yStride?: number;
  nOut: number;
  k: number;
  dtype: Dtype;
  epilogue: Epilogue;
  eps?: number;
}

export class DenseRig implements Disposable {
  readonly device: Device;
  readonly stream: Stream;
  readonly #kept: DeviceBuffer[] = [];

  constructor(options: { threads?: number; scheduleSeed?: number } = {}) {
    this.device = openTarget({ debug: true, ...options });
    this.stream = this.device.stream();
  }

  alloc(bytes: number): DeviceBuffer {
    const buffer = this.device.alloc(bytes);
    this.#kept.push(buffer);
    return buffer;
  }
  upload(data: ArrayBufferView): DeviceBuffer {
    const buffer = this.alloc(data.byteLength);
    this.stream.copy(buffer, data);
    return buffer;
  }
  stored(values: Float32Array, dtype: Dtype): DeviceBuffer {
    return this.upload(fromFloat32(values, dtype));
  }
  /** Device memory, once everything issued has run. */
  download(memory: DeviceBuffer): ArrayBuffer {
    using pinned = this.device.pinned(memory.bytes);
    this.stream.copy(pinned, memory, memory.bytes);
    this.stream.synchronize();
    return pinned.buffer.slice(0);
  }
  floats(memory: DeviceBuffer): Float32Array {
    return new Float32Array(this.download(memory));
  }

  /** What a chain of these widths asks for. */
  scratch(rows: number, maxK: number, maxOut: number): DeviceBuffer {
    const bytes = new BigUint64Array(1);
    this.device.call("fkv_chain_scratch_bytes", bytes, rows, maxK, maxOut);
    const scratch = this.alloc(Number(bytes[0]));
    this.stream.memset(scratch, 0);
    return scratch;
  }

  /** Issues the phases as one chain, with the sums of `family`. */
  chain(phases: readonly Phase[], rows: number, family: number = FKV_DECODE): void {
    const all = new ArrayBuffer(phases.length * size.fkv_phase);
    for (const [i, phase] of phases.entries()) {
      const width = phase.epilogue === "swiglu" ? phase.nOut / 2 : phase.nOut;
      const values = {
        weight: phase.weight,
        bias: phase.bias ?? null,
        norm: phase.norm ?? null,
        x: phase.x,
        y: phase.y,
        x_stride: phase.xStride ?? phase.k,
        y_stride: phase.yStride ?? width,
        n_out: phase.nOut,
        k: phase.k,
        dtype: dtypeCode[phase.dtype],
        epilogue: epilogueCodes[phase.epilogue],
        eps: phase.eps ?? 0,
      };
      pack.fkv_phase(values, { into: all, at: i * size.fkv_phase });
    }
    const maxK = Math.max(...phases.map((phase) => phase.k));
    const maxOut = Math.max(...phases.map((phase) => phase.nOut));
    const scratch = this.scratch(rows, maxK, maxOut);
    this.device.call(
      "fkv_dense_chain",
      all,
      phases.length,
      rows,
      family,
      scratch.address,
      this.stream.handle,
    );
  }

  [Symbol.dispose](): void {
    this.device[Symbol.dispose]();
  }
}
