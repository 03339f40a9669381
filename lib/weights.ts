/// <reference lib="esnext.disposable" preserve="true" />
import { type Dtype, folderPath, type ModelConfig, readConfig } from "./checkpoint.ts";
import { FreeKVError } from "./errors.ts";
import { convert, dtypeBytes } from "./float.ts";
import { badFile } from "./json.ts";
import { Safetensors, type StoredTensor } from "./safetensors.ts";

/** A tensor as the device wants it. All of a checkpoint have the dtype of its matrices. */
export interface WeightTensor {
  /** "embed" · "layers.3.qkv" · "norm" · "lmHead"; see openCheckpoint. */
  readonly name: string;
  readonly dtype: Dtype;
  readonly shape: readonly number[];
  readonly bytes: number;
  /**
   * Fill `into` with the bytes from `offset` on, any range of whole values. Reads the files anew at each call
   * and holds little more than 1 MiB beside `into`. Errors: BAD_CHECKPOINT if a file cannot be read or a value
   * does not fit the dtype; BAD_ARGUMENT for another range.
   */
  read(into: Uint8Array, offset?: number): void;
}

/** An opened checkpoint: its files are checked, none of its weights is read yet. */
export interface Checkpoint extends Disposable {
  readonly config: ModelConfig;
  readonly tensors: readonly WeightTensor[];
  /** Of all tensors. */
  readonly bytes: number;
}

/** Rows of a stored tensor (a vector: rows of one value) that become rows first, first + step … of ours. */
interface Part {
  readonly source: string;
  readonly rows: number;
  readonly first: number;
  readonly step: number;
}
interface Plan {
  readonly name: string;
  readonly shape: readonly number[];
  readonly parts: readonly Part[];
}

const CHUNK_BYTES = 1 << 20;
const DTYPES: Record<string, Dtype> = { F32: "f32", BF16: "bf16", F16: "f16" };

/**
 * Open a Hugging Face folder. Tensors, in this order, Hq and Hkv heads of d values, all row-major:
 * `embed` [vocab][hidden]; per layer l, `layers.l.` + `attnNorm` [hidden], `qkv` [(Hq + 2·Hkv)·d][hidden]
 * (rows of q, k, v), `qkvBias` [(Hq + 2·Hkv)·d] if config.qkvBias, `qNorm` and `kNorm` [d] if config.qkNorm,
 * `o` [hidden][Hq·d], `oBias` [hidden] if config.oBias, `mlpNorm` [hidden], `gateUp` [2·intermediate][hidden]
 * (rows gate 0, up 0, gate 1, up 1 …), `gateUpBias` [2·intermediate] likewise and `downBias` [hidden] if
 * config.mlpBias, `down` [hidden][intermediate]; `norm` [hidden]; `lmHead` [vocab][hidden] unless
 * config.tied.
 *
 * The dtype of all is that of the first layer's q projection, which config.dtype then says; tensors stored in
 * another one are converted, to nearest, ties to even.
 * Errors: those of readConfig; BAD_CHECKPOINT naming a tensor that is missing or has another shape than the
 * config says; UNSUPPORTED_MODEL for one of another kind than f32, bf16, f16.
 */
export function openCheckpoint(dir: string | URL): Checkpoint {
  const stated = readConfig(dir);
  const files = new Safetensors(folderPath(dir));
  try {
    const place = folderPath(dir);
    const main = storedTensor(files, "model.layers.0.self_attn.q_proj.weight", place);
    const config = { ...stated, dtype: dtypeOf(main) };
    refuseMoreLayers(files, config.layers, place);
    const tensors = Array.from(plan(config), (each) => makeTensor(files, each, config.dtype, place));
    const bytes = tensors.reduce((sum, tensor) => sum + tensor.bytes, 0);
    return { config, tensors, bytes, [Symbol.dispose]: () => files[Symbol.dispose]() };
  } catch (error) {
    files[Symbol.dispose]();
    throw error;
  }
}

/** Fewer layers than the folder has make another model, which would answer something else without a word. */
function refuseMoreLayers(files: Safetensors, layers: number, place: string): void {
  for (const name of files.names()) {
    const layer = Number(/^model\.layers\.(\d+)\./.exec(name)?.[1] ?? -1);
    if (layer >= layers)
      throw badFile(
        place,
        `holds ${name}, but its config.json says num_hidden_layers ${layers}; mend config.json or fetch it again`,
      );
  }
}

/** What each device tensor is made of, one at a time: a config may call for more of them than memory can list. */
function* plan(config: ModelConfig): Generator<Plan> {
  const { hidden, heads, kvHeads, headDim, intermediate, vocab } = config;
  const q = heads * headDim;
  const kv = kvHeads * headDim;
  const whole = (name: string, source: string, shape: readonly number[]): Plan => ({
    name,
    shape,
    parts: [{ source, rows: shape[0] ?? 0, first: 0, step: 1 }],
  });
  const stacked = (name: string, sources: readonly [string, number][], tail: readonly number[]): Plan => {
    let first = 0;
    const parts = sources.map(([source, rows]) => {
      first += rows;
      return { source, rows, first: first - rows, step: 1 };
    });
    return { name, shape: [first, ...tail], parts };
  };
  const interleaved = (name: string, sources: readonly string[], tail: readonly number[]): Plan => {
    const step = sources.length;
    const parts = sources.map((source, first) => ({ source, rows: intermediate, first, step }));
    return { name, shape: [step * intermediate, ...tail], parts };
  };

  yield whole("embed", "model.embed_tokens.weight", [vocab, hidden]);
  for (let layer = 0; layer < config.layers; layer++) {
    const to = `layers.${layer}`;
    const from = `model.layers.${layer}`;
    const attention = `${from}.self_attn`;
    const qkv = (kind: string): [string, number][] => [
      [`${attention}.q_proj.${kind}`, q],
      [`${attention}.k_proj.${kind}`, kv],
      [`${attention}.v_proj.${kind}`, kv],
    ];
    const gateUp = (kind: string): string[] => [
      `${from}.mlp.gate_proj.${kind}`,
      `${from}.mlp.up_proj.${kind}`,
    ];
    yield whole(`${to}.attnNorm`, `${from}.input_layernorm.weight`, [hidden]);
    yield stacked(`${to}.qkv`, qkv("weight"), [hidden]);
    if (config.qkvBias) yield stacked(`${to}.qkvBias`, qkv("bias"), []);
    if (config.qkNorm) {
      yield whole(`${to}.qNorm`, `${attention}.q_norm.weight`, [headDim]);
      yield whole(`${to}.kNorm`, `${attention}.k_norm.weight`, [headDim]);
    }
    yield whole(`${to}.o`, `${attention}.o_proj.weight`, [hidden, q]);
    if (config.oBias) yield whole(`${to}.oBias`, `${attention}.o_proj.bias`, [hidden]);
    yield whole(`${to}.mlpNorm`, `${from}.post_attention_layernorm.weight`, [hidden]);
    yield interleaved(`${to}.gateUp`, gateUp("weight"), [hidden]);
    if (config.mlpBias) yield interleaved(`${to}.gateUpBias`, gateUp("bias"), []);
    yield whole(`${to}.down`, `${from}.mlp.down_proj.weight`, [hidden, intermediate]);
    if (config.mlpBias) yield whole(`${to}.downBias`, `${from}.mlp.down_proj.bias`, [hidden]);
  }
  yield whole("norm", "model.norm.weight", [hidden]);
  if (!config.tied) yield whole("lmHead", "lm_head.weight", [vocab, hidden]);
}

function storedTensor(files: Safetensors, name: string, place: string): StoredTensor {
  const stored = files.get(name);
  if (stored === undefined)
    throw badFile(
      place,
      `lacks the tensor ${name} that its config.json calls for; mend config.json or fetch it again`,
    );
  return stored;
}

function dtypeOf(stored: StoredTensor): Dtype {
  const dtype = DTYPES[stored.dtype];
  if (dtype !== undefined) return dtype;
  throw new FreeKVError(
    "UNSUPPORTED_MODEL",
    `${stored.path}: ${stored.name} is stored as ${stored.dtype}; supported: F32, BF16, F16`,
  );
}

function makeTensor(
  files: Safetensors,
  { name, shape, parts }: Plan,
  dtype: Dtype,
  place: string,
): WeightTensor {
  const tail = shape.slice(1);
  const rowValues = tail.reduce((product, n) => product * n, 1);
  const rowBytes = rowValues * dtypeBytes(dtype);
  const bytes = (shape[0] ?? 0) * rowBytes;
  for (const part of parts) {
    const stored = storedTensor(files, part.source, place);
    const expected = [part.rows, ...tail].join(", ");
    if (stored.shape.join(", ") !== expected) {
      const found = stored.shape.join(", ");
      throw badFile(
        stored.path,
        `${part.source} has shape [${found}], where config.json calls for [${expected}]`,
      );
    }
    dtypeOf(stored);
  }
  const read = (into: Uint8Array, offset = 0): void => {
    const fits = offset >= 0 && offset + into.byteLength <= bytes;
    if (!fits || offset % dtypeBytes(dtype) !== 0 || into.byteLength % dtypeBytes(dtype) !== 0) {
      throw new FreeKVError(
        "BAD_ARGUMENT",
        `bytes ${offset}..${offset + into.byteLength} of ${name}, which has ${bytes}; a range of whole values is wanted`,
      );
    }
    for (const part of parts) readPart(files, part, rowValues, dtype, into, offset);
  };
  return { name, dtype, shape, bytes, read };
}

/** Fill what `part` has of the device tensor's bytes offset .. offset + into.byteLength. */
function readPart(
  files: Safetensors,
  part: Part,
  rowValues: number,
  dtype: Dtype,
  into: Uint8Array,
  offset: number,
): void {
  const stored = storedTensor(files, part.source, part.source);
  const from = dtypeOf(stored);
  const rowBytes = rowValues * dtypeBytes(dtype);
  const storedRowBytes = rowValues * dtypeBytes(from);
  const end = offset + into.byteLength;
  const { first, step, rows, source } = part;

  if (step === 1 && from === dtype) {
    const start = Math.max(offset, first * rowBytes);
    const stop = Math.min(end, (first + rows) * rowBytes);
    if (start < stop)
      files.read(source, start - first * rowBytes, into.subarray(start - offset, stop - offset));
    return;
  }
  // Source row r is device row first + r·step. Those in the range, in pieces of CHUNK_BYTES or of one row.
  const begin = Math.max(0, Math.ceil((Math.floor(offset / rowBytes) - first) / step));
  const stop = Math.min(rows, Math.ceil((Math.ceil(end / rowBytes) - first) / step));
  const pieceRows = Math.max(1, Math.floor(CHUNK_BYTES / Math.max(rowBytes, storedRowBytes)));
  for (let row = begin; row < stop; row += pieceRows) {
    const n = Math.min(pieceRows, stop - row);
    const bytes = new Uint8Array(n * storedRowBytes);
    files.read(source, row * storedRowBytes, bytes);
    const converted = convert(bytes, from, dtype);
    if (converted === undefined) {
      throw badFile(stored.path, `${source} holds a value beyond the range of ${dtype}, the matrices' dtype`);
    }
    for (let i = 0; i < n; i++) {
      const rowStart = (first + (row + i) * step) * rowBytes;
      const a = Math.max(rowStart, offset);
      const b = Math.min(rowStart + rowBytes, end);
      into.set(converted.subarray(i * rowBytes + a - rowStart, i * rowBytes + b - rowStart), a - offset);
    }
  }
}
