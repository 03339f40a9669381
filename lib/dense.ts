/// <reference lib="esnext.disposable" preserve="true" />
// The dense part of a model as phases: queued where a layer names them, launched together when a stage needs the result.
import { FKV_ADD, FKV_STORE, FKV_SWIGLU } from "../ffi/constants.ts";
import { pack, size } from "../ffi/structs.ts";
import type { Device, DeviceBuffer, Stream } from "./device.ts";

/** A matrix on the device, with what its phase fuses in. */
export interface Linear {
  readonly weight: number;
  readonly bias: number;
  /** RMSNorm weight of the prologue, or 0. */
  readonly norm: number;
  readonly nOut: number;
  readonly k: number;
}
export const epilogue: Readonly<Record<"store" | "add" | "swiglu", number>> = {
  store: FKV_STORE,
  add: FKV_ADD,
  swiglu: FKV_SWIGLU,
};

const maxQueued = 8;

export class DenseQueue implements Disposable {
  readonly #device: Device;
  readonly #stream: Stream;
  readonly #dtype: number;
  readonly #eps: number;
  readonly #split: boolean;
  readonly #family: number;
  readonly #scratch: DeviceBuffer;
  readonly #phases: ArrayBuffer = new ArrayBuffer(maxQueued * size.fkv_phase);
  #queued = 0;
  #rows = 0;

  /**
   * `split`: every phase is a launch of its own. `family`: whose sums, FKV_DECODE, FKV_PREFILL or FKV_FAST. Scratch serves up to
   * maxRows rows of the widest shapes.
   */
  constructor(
    device: Device,
    stream: Stream,
    o: {
      dtype: number;
      eps: number;
      split: boolean;
      family: number;
      maxRows: number;
      maxK: number;
      maxOut: number;
    },
  ) {
    this.#device = device;
    this.#stream = stream;
    this.#dtype = o.dtype;
    this.#eps = o.eps;
    this.#split = o.split;
    this.#family = o.family;
    const bytes = new BigUint64Array(1);
    device.lib.fkv_chain_scratch_bytes(bytes, o.maxRows, o.maxK, o.maxOut);
    this.#scratch = device.alloc(Math.max(256, Number(bytes[0])));
    stream.memset(this.#scratch, 0); // a chain finds its counters at zero, and leaves them so
  }

  /** Queues y = epilogue(linear(x)) for `rows` rows; strides in floats. */
  add(
    linear: Linear,
    kind: number,
    x: number,
    xStride: number,
    y: number,
    yStride: number,
    rows: number,
  ): void {
    if (this.#queued && this.#rows !== rows) this.run();
    this.#rows = rows;
    pack.fkv_phase(
      {
        weight: linear.weight,
        bias: linear.bias,
        norm: linear.norm,
        x,
        y,
        x_stride: xStride,
        y_stride: yStride,
        n_out: linear.nOut,
        k: linear.k,
        dtype: this.#dtype,
        epilogue: kind,
        eps: this.#eps,
      },
      { into: this.#phases, at: this.#queued * size.fkv_phase },
    );
    this.#queued++;
    if (this.#split || this.#queued === maxQueued) this.run();
  }

  /** Launches what is queued. */
  run(): void {
    if (this.#queued === 0) return;
    this.#device.lib.fkv_dense_chain(
      this.#phases,
      this.#queued,
      this.#rows,
      this.#family,
      this.#scratch.address,
      this.#stream.handle,
    );
    this.#queued = 0;
  }

  [Symbol.dispose](): void {
    this.#scratch[Symbol.dispose]();
  }
}
