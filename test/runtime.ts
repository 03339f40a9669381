// What the tests of a device's runtime share.

import { assertEquals, assertThrows } from "@std/assert";
import { type Device, type DeviceOptions, FreeKVError, type Graph, type Stream } from "../lib/device.ts";
import { openTarget } from "./target.ts";

export const timeout = 20_000;

export const open = (options: DeviceOptions = {}): Device => openTarget({ debug: true, ...options });

/** C's text of what `fn` throws, which must be a refusal with this C status. */
export function refused(status: string, fn: () => unknown): string {
  const error = assertThrows(fn, FreeKVError);
  assertEquals(error.detail.status, status, error.message);
  return String(error.detail.text);
}

/** Milliseconds that `fn` takes. */
export function elapsed(fn: () => void): number {
  const start = performance.now();
  fn();
  return performance.now() - start;
}

/** The shortest of three: what other processes take is not what is measured. */
export const quickest = (fn: () => void): number => Math.min(elapsed(fn), elapsed(fn), elapsed(fn));

/** `stream` captures by raw calls, so that a test sees how each of them ends. */
export function beginCapture(device: Device, stream: Stream): () => void {
  device.call("fkv_capture_begin", stream.handle);
  return () => {
    const graph = new BigUint64Array(1);
    device.call("fkv_capture_end", graph, stream.handle);
    device.call("fkv_graph_destroy", Number(graph[0]));
  };
}

/** A fork and a join: stream sets a, other copies it to b, stream then copies b to c. */
export function captureFork(device: Device, stream: Stream, other: Stream, base: number): Graph {
  using forked = device.event();
  using joined = device.event();
  return stream.capture(() => {
    stream.copy(base + 1, base, 1);
    stream.record(forked);
    other.wait(forked);
    other.copy(base + 2, base + 1, 1);
    other.record(joined);
    stream.memset(base + 5, 9, 1);
    stream.wait(joined);
    stream.copy(base + 3, base + 2, 1);
  });
}
