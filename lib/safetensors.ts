/// <reference lib="esnext.disposable" preserve="true" />
import { closeSync, existsSync, fstatSync, openSync, readSync } from "node:fs";
import { basename, join } from "node:path";
import { z } from "zod";
import { badFile, check, isMissing, readJson } from "./json.ts";

/** One tensor as a file holds it. */
export interface StoredTensor {
  readonly name: string;
  /** As the format spells it: "F32", "BF16", "F16", "I64" … */
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly bytes: number;
  /** Of the file that holds it. */
  readonly path: string;
}
interface Located extends StoredTensor {
  readonly fd: number;
  /** First byte, from the start of the file. */
  readonly start: number;
}

/** Header bytes beyond which the format itself refuses a file. */
const MAX_HEADER = 100_000_000;
/** Bytes of one read call; the runtimes' own limit is 2 GiB − 1. */
const MAX_READ = 1 << 30;
const BITS: Record<string, number> = {
  ...{ F64: 64, I64: 64, U64: 64, C64: 64, F32: 32, I32: 32, U32: 32, F16: 16, BF16: 16, I16: 16, U16: 16 },
  ...{ I8: 8, U8: 8, BOOL: 8, F8_E4M3: 8, F8_E5M2: 8, F8_E8M0: 8, F8_E4M3FNUZ: 8, F8_E5M2FNUZ: 8 },
  ...{ F6_E2M3: 6, F6_E3M2: 6, F4: 4 },
};

const count = z.int().nonnegative();
const entry = z.object({
  dtype: z.string(),
  shape: z.array(count),
  data_offsets: z.tuple([count, count]),
});
const header = z.record(z.string(), z.unknown());
const indexFile = z.object({ weight_map: z.record(z.string(), z.string()) });

/**
 * The tensors of a checkpoint folder: of model.safetensors, or of the shards in model.safetensors.index.json.
 * Opening reads headers only and checks them against the files' sizes; the files stay open until disposal.
 * Errors: BAD_CHECKPOINT, naming the file, for what is missing, cut short or malformed.
 */
export class Safetensors implements Disposable {
  readonly #fds: number[] = [];
  readonly #tensors: Map<string, Located> = new Map();
  #open = true;

  constructor(dir: string) {
    try {
      this.#openAll(dir);
    } catch (error) {
      this[Symbol.dispose]();
      throw error;
    }
  }

  get(name: string): StoredTensor | undefined {
    return this.#tensors.get(name);
  }

  names(): Iterable<string> {
    return this.#tensors.keys();
  }

  /** Fill `into` with the tensor's bytes from byte `offset` on. */
  read(name: string, offset: number, into: Uint8Array): void {
    const tensor = this.#tensors.get(name);
    if (!this.#open || tensor === undefined) throw new Error(`no open tensor ${name}`);
    if (offset < 0 || offset + into.byteLength > tensor.bytes) {
      throw new RangeError(
        `bytes ${offset}..${offset + into.byteLength} of ${name}, which has ${tensor.bytes}`,
      );
    }
    readFully(tensor.fd, tensor.start + offset, into, tensor.path);
  }

  [Symbol.dispose](): void {
    this.#open = false;
    for (const fd of this.#fds.splice(0)) closeSync(fd);
  }

  #openAll(dir: string): void {
    const whole = join(dir, "model.safetensors");
    const indexPath = join(dir, "model.safetensors.index.json");
    if (existsSync(whole)) {
      for (const tensor of this.#openFile(whole)) this.#tensors.set(tensor.name, tensor);
      return;
    }
    const index = readJson(indexPath, indexFile);
    if (index === undefined) {
      throw badFile(dir, "has neither model.safetensors nor model.safetensors.index.json");
    }
    const shards = new Map<string, Map<string, Located>>();
    for (const file of new Set(Object.values(index.weight_map))) {
      if (file !== basename(file) || !file.endsWith(".safetensors")) {
        throw badFile(indexPath, `names "${file}", which is not a .safetensors file of the same folder`);
      }
      const tensors = this.#openFile(join(dir, file));
      shards.set(file, new Map(tensors.map((tensor) => [tensor.name, tensor])));
    }
    for (const [name, file] of Object.entries(index.weight_map)) {
      const tensor = shards.get(file)?.get(name);
      if (tensor === undefined)
        throw badFile(join(dir, file), `lacks ${name}, which the index says it holds`);
      this.#tensors.set(name, tensor);
    }
  }

  #openFile(path: string): Located[] {
    let fd: number;
    try {
      fd = openSync(path, "r");
    } catch (error) {
      throw badFile(path, isMissing(error) ? "is missing" : "cannot be opened", error);
    }
    this.#fds.push(fd);
    return readHeader(fd, path);
  }
}

/** File: u64 header length, header (JSON), data; tensors cover the data without holes or overlaps. */
function readHeader(fd: number, path: string): Located[] {
  const fileBytes = fstatSync(fd).size;
  if (fileBytes < 8) throw badFile(path, `has ${fileBytes} bytes, too few for a safetensors header`);
  const prefix = new Uint8Array(8);
  readFully(fd, 0, prefix, path);
  const headerBytes = Number(new DataView(prefix.buffer).getBigUint64(0, true));
  if (headerBytes > MAX_HEADER) throw badFile(path, "is no safetensors file: its header length is absurd");
  const dataStart = 8 + headerBytes;
  if (dataStart > fileBytes) {
    throw badFile(path, `is cut short: a header of ${headerBytes} bytes in a file of ${fileBytes}`);
  }
  const text = new Uint8Array(headerBytes);
  readFully(fd, 8, text, path);
  const tensors = parseHeader(text, path).map((each) => ({
    ...each,
    path,
    fd,
    start: each.start + dataStart,
  }));

  let end = dataStart;
  for (const tensor of tensors.toSorted((a, b) => a.start - b.start || a.bytes - b.bytes)) {
    if (tensor.start !== end) throw badFile(path, `${tensor.name} leaves a hole or overlaps another tensor`);
    end += tensor.bytes;
  }
  if (end > fileBytes) {
    throw badFile(path, `is cut short: it has ${fileBytes} bytes of ${end}; fetch it again`);
  }
  if (end < fileBytes) throw badFile(path, `has ${fileBytes - end} bytes beyond its last tensor`);
  return tensors;
}

function parseHeader(text: Uint8Array, path: string): Omit<Located, "fd" | "path">[] {
  let json: unknown;
  try {
    json = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(text));
  } catch (error) {
    throw badFile(path, "has a header that is not JSON", error);
  }
  const entries = Object.entries(check(header, json, `${path}: header`));
  return entries
    .filter(([name]) => name !== "__metadata__")
    .map(([name, value]) => {
      const { dtype, shape, data_offsets } = check(entry, value, `${path}: ${name}`);
      const [start, end] = data_offsets;
      if (end < start) throw badFile(path, `${name} ends before it starts`);
      const bits = BITS[dtype];
      const values = shape.reduce((product, n) => product * n, 1);
      if (bits !== undefined && values * bits !== (end - start) * 8) {
        throw badFile(
          path,
          `${name}: ${end - start} bytes cannot hold ${dtype} of shape [${shape.join(", ")}]`,
        );
      }
      return { name, dtype, shape, start, bytes: end - start };
    });
}

function readFully(fd: number, position: number, into: Uint8Array, path: string): void {
  let done = 0;
  while (done < into.byteLength) {
    let n: number;
    try {
      n = readSync(fd, into, done, Math.min(into.byteLength - done, MAX_READ), position + done);
    } catch (error) {
      throw badFile(path, "cannot be read", error);
    }
    if (n === 0) throw badFile(path, `ended at byte ${position + done} while it was read`);
    done += n;
  }
}
