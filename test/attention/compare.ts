// What the tests of attention share: how outputs are compared, and over which shapes.

import { assert, assertEquals } from "@std/assert";
import type { RigOptions } from "./rig.ts";

export const bits = (values: Float32Array): Uint32Array =>
  new Uint32Array(values.buffer, values.byteOffset, values.length);

/** Largest difference; NaN where either has a value that is not finite. */
export function worst(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  assertEquals(actual.length, expected.length);
  let most = 0;
  for (let i = 0; i < actual.length; i++)
    most = Math.max(most, Math.abs((actual[i] as number) - (expected[i] as number)));
  return most;
}
/** Against float64: outputs are averages of unit normals; in f32 they come as close as `within` is by default. */
export function assertClose(
  actual: ArrayLike<number>,
  expected: ArrayLike<number>,
  what: string,
  within = 5e-6,
): void {
  assert(Math.max(...Array.from(expected, Math.abs)) > 0.05, `${what}: the expected output is trivial`);
  assert(worst(actual, expected) < within, `${what}: differs by ${worst(actual, expected)}`);
}

export const shapes: RigOptions[] = [
  ...[1, 4, 5, 7, 8].map((group) => ({ group, headDim: 64, dtype: "bf16" }) as const),
  ...[8, 24, 64, 96, 128, 256].map((headDim) => ({ group: 4, headDim, dtype: "f32" }) as const),
  ...[8, 96].map((headDim) => ({ group: 3, headDim, dtype: "f16" }) as const),
  { group: 6, kvHeads: 1, headDim: 40, pageSize: 32, dtype: "bf16", layout: "nhd" },
  { group: 2, kvHeads: 3, headDim: 16, pageSize: 64, dtype: "f16", layout: "nhd" },
];
export const named = (shape: RigOptions): string =>
  Object.entries(shape)
    .map(([name, value]) => `${name} ${value}`)
    .join(", ");
