// The whole model in float64, as its formulas read: every position, no cache, full attention unless told otherwise.
// It shares with the engine only what reads the checkpoint.

import type { ModelConfig } from "../../lib/checkpoint.ts";
import { toFloat32 } from "../../lib/float.ts";
import type { Checkpoint, WeightTensor } from "../../lib/weights.ts";
import { openCheckpoint } from "../../lib/weights.ts";

/** [rows][columns], row-major. */
interface Matrix {
  rows: number;
  columns: number;
  values: Float64Array;
}

/**
 * Log-probabilities [tokens.length][vocab], row-major: row p is of the token after tokens 0..p. Natural log.
 */
export function referenceLogprobs(dir: string, tokens: ArrayLike<number>, visible?: Visible): Float64Array {
  using checkpoint = openCheckpoint(dir);
  const logits = new ReferenceModel(checkpoint).logits(Array.from(tokens), visible);
  for (let row = 0; row < logits.rows; row++) logSoftmax(rowOf(logits, row));
  return logits.values;
}

/** What one KV head attends from one position: q of its query heads, q at the position before, K of every position. */
export interface View {
  layer: number;
  kvHead: number;
  position: number;
  queries: Float64Array[];
  before: Float64Array[];
  key(position: number): Float64Array;
}
/** Which positions up to its own that is; undefined: all. */
export type Visible = (view: View) => ((position: number) => boolean) | undefined;

/** All weights, widened from what the checkpoint stores. */
export class ReferenceModel {
  readonly config: ModelConfig;
  readonly #weights: Map<string, Matrix>;

  constructor(checkpoint: Checkpoint) {
    this.config = checkpoint.config;
    this.#weights = new Map(checkpoint.tensors.map((tensor) => [tensor.name, readMatrix(tensor)]));
  }

  /** [tokens.length][vocab]. */
  logits(tokens: readonly number[], visible?: Visible): Matrix {
    const { config } = this;
    const embed = this.#matrix("embed");
    const x = zeros(tokens.length, config.hidden);
    for (const [row, token] of tokens.entries()) rowOf(x, row).set(rowOf(embed, token));

    for (let layer = 0; layer < config.layers; layer++) {
      const name = (weight: string): string => `layers.${layer}.${weight}`;
      const qkv = this.#linear(this.#norm(x, name("attnNorm")), name("qkv"), name("qkvBias"));
      this.#rotate(qkv, name("qNorm"), name("kNorm"));
      add(x, this.#linear(this.#attend(qkv, layer, visible), name("o"), name("oBias")));
      const gateUp = this.#linear(this.#norm(x, name("mlpNorm")), name("gateUp"), name("gateUpBias"));
      add(x, this.#linear(swiglu(gateUp), name("down"), name("downBias")));
    }
    return this.#linear(this.#norm(x, "norm"), config.tied ? "embed" : "lmHead");
  }

  #matrix(name: string): Matrix {
    const matrix = this.#weights.get(name);
    if (matrix === undefined) throw new Error(`no weight ${name}`);
    return matrix;
  }

  #linear(x: Matrix, weight: string, bias?: string): Matrix {
    const w = this.#matrix(weight);
    const b = bias === undefined ? undefined : this.#weights.get(bias)?.values;
    const y = zeros(x.rows, w.rows);
    for (let row = 0; row < x.rows; row++) {
      for (let i = 0; i < w.rows; i++) {
        y.values[row * w.rows + i] = dot(rowOf(x, row), rowOf(w, i)) + (b?.[i] ?? 0);
      }
    }
    return y;
  }

  #norm(x: Matrix, weight: string): Matrix {
    const y = { ...x, values: x.values.slice() };
    for (let row = 0; row < y.rows; row++)
      rmsNorm(rowOf(y, row), this.#matrix(weight).values, this.config.eps);
    return y;
  }

  /** QK-norm where the model has it, then rotary embedding, of the q and k heads of every row, in place. */
  #rotate(qkv: Matrix, qNorm: string, kNorm: string): void {
    const { heads, kvHeads, headDim, qkNorm, rope, eps } = this.config;
    for (let position = 0; position < qkv.rows; position++) {
      for (let head = 0; head < heads + kvHeads; head++) {
        const start = head * headDim;
        const x = rowOf(qkv, position).subarray(start, start + headDim);
        if (qkNorm) rmsNorm(x, this.#matrix(head < heads ? qNorm : kNorm).values, eps);
        for (const [i, frequency] of rope.invFreq.entries()) {
          const cos = Math.cos(position * frequency) * rope.scale;
          const sin = Math.sin(position * frequency) * rope.scale;
          const [a, b] = [x[i] ?? NaN, x[i + headDim / 2] ?? NaN];
          x[i] = a * cos - b * sin;
          x[i + headDim / 2] = b * cos + a * sin;
        }
      }
    }
  }

  /** [tokens][heads · headDim]: causal attention of every token. */
  #attend(qkv: Matrix, layer: number, visible?: Visible): Matrix {
    const { heads, kvHeads, headDim } = this.config;
    const out = zeros(qkv.rows, heads * headDim);
    const part = (row: number, head: number): Float64Array =>
      rowOf(qkv, row).subarray(head * headDim, (head + 1) * headDim);
    const group = heads / kvHeads;
    for (let position = 0; position < qkv.rows; position++) {
      for (let kvHead = 0; kvHead < kvHeads; kvHead++) {
        const queries = (at: number): Float64Array[] =>
          Array.from({ length: at < 0 ? 0 : group }, (_, i) => part(at, kvHead * group + i));
        const key = (at: number): Float64Array => part(at, heads + kvHead);
        const view = {
          layer,
          kvHead,
          position,
          queries: queries(position),
          before: queries(position - 1),
          key,
        };
        const sees = visible?.(view) ?? (() => true);
        const keys = Array.from({ length: position + 1 }, (_, at) => at).filter(sees);
        for (const [i, q] of view.queries.entries()) {
          const scores = Float64Array.from(keys, (at) => dot(q, key(at)) / Math.sqrt(headDim));
          logSoftmax(scores);
          const head = kvHead * group + i;
          const sum = rowOf(out, position).subarray(head * headDim, (head + 1) * headDim);
          for (const [j, at] of keys.entries()) {
            const weight = Math.exp(scores[j] ?? NaN);
            const value = part(at, heads + kvHeads + kvHead);
            for (const [c, v] of value.entries()) sum[c] = (sum[c] ?? NaN) + weight * v;
          }
        }
      }
    }
    return out;
  }
}

function readMatrix(tensor: WeightTensor): Matrix {
  const bytes = new Uint8Array(tensor.bytes);
  tensor.read(bytes);
  const [rows = 0, columns = 1] = tensor.shape;
  return { rows, columns, values: Float64Array.from(toFloat32(bytes, tensor.dtype)) };
}

function zeros(rows: number, columns: number): Matrix {
  return { rows, columns, values: new Float64Array(rows * columns) };
}

function rowOf(matrix: Matrix, row: number): Float64Array {
  return matrix.values.subarray(row * matrix.columns, (row + 1) * matrix.columns);
}

function dot(a: Float64Array, b: Float64Array): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += (a[i] ?? NaN) * (b[i] ?? NaN);
  return sum;
}

function add(x: Matrix, y: Matrix): void {
  for (const [i, value] of y.values.entries()) x.values[i] = (x.values[i] ?? NaN) + value;
}

function rmsNorm(x: Float64Array, weight: Float64Array, eps: number): void {
  const scale = 1 / Math.sqrt(dot(x, x) / x.length + eps);
  for (const [i, w] of weight.entries()) x[i] = (x[i] ?? NaN) * scale * w;
}

/** Columns are gate 0, up 0, gate 1, up 1 …; result [rows][columns / 2] = silu(gate) · up. */
function swiglu(x: Matrix): Matrix {
  const y = zeros(x.rows, x.columns / 2);
  for (let i = 0; i < y.values.length; i++) {
    const gate = x.values[2 * i] ?? NaN;
    y.values[i] = (gate / (1 + Math.exp(-gate))) * (x.values[2 * i + 1] ?? NaN);
  }
  return y;
}

function logSoftmax(x: Float64Array): void {
  const max = x.reduce((a, b) => Math.max(a, b), -Infinity);
  const total = max + Math.log(x.reduce((sum, value) => sum + Math.exp(value - max), 0));
  for (let i = 0; i < x.length; i++) x[i] = (x[i] ?? NaN) - total;
}
