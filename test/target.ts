/// <reference lib="esnext.disposable" preserve="true" />
// Which device this run of the tests is for: the CPU twin, or the GPU that `npm test -- --device cuda` names. The tests are the
// same; what only the twin has (a seeded schedule, a simulated link, threads that can be counted) is left out on a GPU.

import { Device, type DeviceOptions } from "../lib/device.ts";
import type { EngineOptions } from "../lib/types.ts";

/** Set by scripts/test.ts for its test processes; nothing else reads it. */
const asked = process.env.FREEKV_TEST_DEVICE ?? "cpu";
/** "cuda-plain" is the GPU with the launches of older chips. */
const plain = asked === "cuda-plain";
export const target: "cpu" | "cuda" = asked === "cpu" ? "cpu" : "cuda";
export const onTwin: boolean = target === "cpu";

/** For a test's `skip`, where it is about what only the twin has. */
export const twinOnly: string | false = onTwin ? false : "of the CPU twin alone";

/** Seeds of schedules to go through: 1..n on the twin; a GPU has an order of its own, which one run shows as well as many. */
export const seeds = (n: number): number[] => Array.from({ length: onTwin ? n : 1 }, (_, i) => i + 1);

/**
 * A device of the run's target. The twin's own options do nothing on a GPU. Memory of either starts as NaN (bytes 0xFF), so that
 * what was not written shows: the twin's does so itself, a GPU's is filled here.
 */
export function openTarget(options: DeviceOptions = {}): Device {
  if (onTwin) return Device.open({ device: "cpu", ...options });
  const { libraryPath, debug } = options;
  const device = Device.open({ device: target, libraryPath, debug, plain });
  const stream = device.stream();
  const alloc = device.alloc.bind(device);
  device.alloc = (bytes) => {
    const buffer = alloc(bytes);
    stream.memset(buffer, 0xff);
    stream.synchronize();
    return buffer;
  };
  return device;
}

/** The same for an engine's options: with the twin's chunks, and the numerics that claims of equal bits rest on. */
export function onTarget(options: EngineOptions): EngineOptions {
  if (onTwin) return { device: "cpu", ...options };
  return {
    ...{ device: target, plain, numerics: "invariant", prefillChunk: 512 },
    ...options,
    twin: undefined,
  };
}
