/// <reference lib="esnext.disposable" preserve="true" />
// A device of one stream, whose memory tests fill and read.

import type { Device, DeviceBuffer, Stream } from "../../lib/device.ts";
import { openTarget } from "../target.ts";

export interface MemoryOptions {
  threads?: number | undefined;
  /** Of the simulated host link, each way; none if absent. */
  linkBytesPerSecond?: number | undefined;
}

export class Memory implements Disposable {
  readonly device: Device;
  readonly stream: Stream;

  constructor({ threads, linkBytesPerSecond }: MemoryOptions) {
    this.device = openTarget({ threads, linkBytesPerSecond });
    this.stream = this.device.stream();
  }

  zeroed(bytes: number): DeviceBuffer {
    const buffer = this.device.alloc(bytes);
    this.stream.memset(buffer, 0);
    return buffer;
  }

  /** Device memory, once everything issued has run. */
  read(address: number, bytes: number): ArrayBuffer {
    using pinned = this.device.pinned(bytes);
    this.stream.copy(pinned, address, bytes);
    this.stream.synchronize();
    return pinned.buffer.slice(0);
  }
  ints(address: number, n: number): Int32Array {
    return n === 0 ? new Int32Array() : new Int32Array(this.read(address, 4 * n));
  }
  floats(address: number, n: number): Float32Array {
    return new Float32Array(this.read(address, 4 * n));
  }
  bytes(address: number, n: number): Uint8Array {
    return new Uint8Array(this.read(address, n));
  }

  /** Everything ends with the device. */
  [Symbol.dispose](): void {
    this.device[Symbol.dispose]();
  }
}
