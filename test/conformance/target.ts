/// <reference lib="esnext.disposable" preserve="true" />
// Which device this run of the conformance tests is for, as in test/target.ts, which knows the package by its files.

import * as cuda from "freekv/cuda";

/** Set by scripts/test.ts for its test processes; nothing else reads it. */
const asked = process.env.FREEKV_TEST_DEVICE ?? "cpu";
export const target: "cpu" | "cuda" = asked === "cpu" ? "cpu" : "cuda";
/** For a test's `skip`, where it is about what only the twin, or only a GPU, has. */
export const twinOnly: string | false = target === "cpu" ? false : "of the CPU twin alone";
export const gpuOnly: string | false = target === "cuda" ? false : "of a GPU alone";

/** A device of the run's target; the twin's own options do nothing on a GPU. */
export function open(options: cuda.DeviceOptions = {}): cuda.Device {
  if (target === "cpu") return cuda.Device.open({ device: "cpu", ...options });
  const { libraryPath, debug } = options;
  return cuda.Device.open({ device: target, libraryPath, debug, plain: asked === "cuda-plain" });
}
