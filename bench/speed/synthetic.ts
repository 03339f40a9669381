/// <reference lib="esnext.disposable" preserve="true" />
// A checkpoint without files: random weights as large as trained ones, made of one block that every tensor repeats.

import type { ModelConfig } from "../../lib/checkpoint.ts";
import { dtypeBytes } from "../../lib/float.ts";
import type { Checkpoint, WeightTensor } from "../../lib/weights.ts";

const deviation = 0.02; // of trained matrices
const blockValues = 2 ** 22;
const bf16One = 0x3f80;

/** Uniform values in bf16, either sign, of this standard deviation; the same each time (xorshift32). */
function randomBlock(values: number): Uint16Array {
  let state = 0x9e3779b9;
  const bound = deviation * Math.sqrt(3);
  const f32 = new Float32Array(1);
  const bits = new Uint32Array(f32.buffer);
  return Uint16Array.from({ length: values }, () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    f32[0] = (state / 2 ** 31) * bound;
    return (bits[0] as number) >>> 16;
  });
}

/** Weights of `config`, which must be in bf16, without biases or QK-norm; tensors as openCheckpoint names them. */
export function syntheticCheckpoint(config: ModelConfig): Checkpoint {
  if (config.dtype !== "bf16" || config.qkvBias || config.oBias || config.mlpBias || config.qkNorm)
    throw new Error("synthetic weights are those of a Llama in bf16");
  const block = new Uint8Array(randomBlock(blockValues).buffer);
  /** Memory whose beginning holds random values up to there, because it was filled here before: an upload reuses its buffers. */
  const filled = new WeakMap<ArrayBufferLike, number>();
  const random = (into: Uint8Array): void => {
    if (into.byteOffset === 0 && (filled.get(into.buffer) ?? 0) >= into.byteLength) return;
    for (let at = 0; at < into.byteLength; at += block.byteLength)
      into.set(block.subarray(0, Math.min(block.byteLength, into.byteLength - at)), at);
    if (into.byteOffset === 0) filled.set(into.buffer, into.byteLength);
  };
  const ones = (into: Uint8Array): void => {
    filled.delete(into.buffer);
    new Uint16Array(into.buffer, into.byteOffset, into.byteLength / 2).fill(bf16One);
  };
  const tensor = (name: string, ...shape: number[]): WeightTensor => ({
    name,
    dtype: config.dtype,
    shape,
    bytes: shape.reduce((a, b) => a * b, dtypeBytes(config.dtype)),
    read: shape.length === 1 ? ones : random, // vectors are norms
  });
  const { hidden, heads, kvHeads, headDim, intermediate, vocab } = config;
  const tensors = [tensor("embed", vocab, hidden)];
  for (let l = 0; l < config.layers; l++)
    tensors.push(
      tensor(`layers.${l}.attnNorm`, hidden),
      tensor(`layers.${l}.qkv`, (heads + 2 * kvHeads) * headDim, hidden),
      tensor(`layers.${l}.o`, hidden, heads * headDim),
      tensor(`layers.${l}.mlpNorm`, hidden),
      tensor(`layers.${l}.gateUp`, 2 * intermediate, hidden),
      tensor(`layers.${l}.down`, hidden, intermediate),
    );
  tensors.push(tensor("norm", hidden));
  if (!config.tied) tensors.push(tensor("lmHead", vocab, hidden));
  const bytes = tensors.reduce((sum, each) => sum + each.bytes, 0);
  return { config, tensors, bytes, [Symbol.dispose]() {} };
}
