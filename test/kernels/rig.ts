/// <reference lib="esnext.disposable" preserve="true" />
// What the tests of kernels of one's own share: the GPU, if there is one, and the PTX that they load.

import { existsSync } from "node:fs";
import { join } from "node:path";
import { assertEquals, assertThrows } from "@std/assert";
import { packageRoot } from "../../ffi/root.ts";
import { Device, type ErrorCode, FreeKVError } from "../../lib/device.ts";
import { target } from "../target.ts";

export const root: string = packageRoot();
const gpu = Device.list().find(({ device }) => device !== "cpu");
const ptx = (name: string): string => join(root, ".cache", "ptx", `${name}.ptx`);
export const examples: string = ptx("kernels");
export const probe: string = ptx("probe");
export const without: string | undefined =
  gpu === undefined
    ? "no GPU, or no CUDA library"
    : existsSync(probe)
      ? undefined
      : "no nvcc to make PTX with";
if (target === "cuda" && without !== undefined) throw new Error(without);
export const skip: string | false = without ?? false;
export const timeout: number = 60_000;

export const open = (debug = false): Device => Device.open({ ...gpu, debug });

export function thrown(code: ErrorCode, fn: () => unknown): FreeKVError {
  const error = assertThrows(fn, FreeKVError);
  assertEquals(error.code, code, error.message);
  return error;
}
