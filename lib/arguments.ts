// What kernels that are not ours take: the types of arguments, and their bytes in the block that a launch hands over.

import { type Codec, type Pointer, scalars } from "../ffi/structs.ts";
import type { JsMemory } from "../ffi/symbols.ts";

interface Values {
  /** A buffer of the device, an address, or null. */
  ptr: Pointer;
  i8: number;
  u8: number;
  i16: number;
  u16: number;
  i32: number;
  u32: number;
  i64: number | bigint;
  u64: number | bigint;
  f32: number;
  f64: number;
}

/**
 * C's `T*`; signed and unsigned char, short, int and long long; float and double. `bytesN`: N bytes by value, as JavaScript
 * memory of that length, laid out as C lays out the struct or the vector ("bytes16" for a float4). A half or a bfloat16 is given
 * as its bits, a u16; a bool is a u8.
 */
export type ArgumentType = keyof Values | `bytes${number}`;

type ValueOf<T> = T extends keyof Values ? Values[T] : JsMemory;

/** The arguments of a kernel with these types. */
export type Arguments<T extends readonly ArgumentType[]> = { readonly [I in keyof T]: ValueOf<T[I]> };

type Argument = Pick<Codec, "size" | "write">;

function small(size: 1 | 2, least: number, wanted: string): Argument {
  const most = least + 256 ** size - 1;
  return {
    size,
    write(view, at, value, path) {
      if (typeof value !== "number" || !Number.isInteger(value) || value < least || value > most)
        throw new RangeError(`${path} must be ${wanted}, got ${String(value)}`);
      // Two's complement: the bits of a negative one are those of its remainder.
      if (size === 1) view.setUint8(at, value);
      else view.setUint16(at, value, true);
    },
  };
}

function block(size: number): Argument {
  return {
    size,
    write(view, at, value, path) {
      const memory = value as JsMemory | null | undefined;
      const isMemory = memory instanceof ArrayBuffer || ArrayBuffer.isView(memory);
      if (!isMemory || memory.byteLength !== size) {
        const got = isMemory ? `${memory.byteLength} bytes` : typeof value;
        throw new RangeError(`${path} must be JavaScript memory of ${size} bytes, got ${got}`);
      }
      const given =
        memory instanceof ArrayBuffer
          ? new Uint8Array(memory)
          : new Uint8Array(memory.buffer, memory.byteOffset, size);
      new Uint8Array(view.buffer, view.byteOffset + at, size).set(given);
    },
  };
}

const { ptr, i32, u32, i64, u64, f32, f64 } = scalars as Readonly<Record<keyof Values, Codec>>;
const known: Readonly<Record<keyof Values, Argument>> = {
  ptr,
  i8: small(1, -128, "an int8"),
  u8: small(1, 0, "a uint8"),
  i16: small(2, -32768, "an int16"),
  u16: small(2, 0, "a uint16"),
  ...{ i32, u32, i64, u64, f32, f64 },
};

function argumentOf(type: string): Argument {
  if (Object.hasOwn(known, type)) return known[type as keyof Values];
  const bytes = Number(/^bytes([1-9]\d{0,4})$/.exec(type)?.[1]);
  if (bytes > 0) return block(bytes);
  throw new RangeError(`${type} is none of ${Object.keys(known).join(", ")}, bytes1, bytes2, …`);
}

/** The bytes of each argument, as fkv_module_kernel takes them. Errors: RangeError for what is no type. */
export function argumentSizes(types: readonly string[]): number[] {
  return types.map((type) => argumentOf(type).size);
}

/** The block of a kernel's arguments: kept, and written anew at each launch, which copies it. */
export class ArgumentBlock {
  readonly #types: readonly string[];
  readonly #arguments: readonly (Argument & { readonly path: string; readonly at: number })[];
  readonly #bytes: DataView<ArrayBuffer>;

  constructor(types: readonly string[]) {
    this.#types = types;
    let end = 0;
    this.#arguments = types.map((type, i) => {
      const { size, write } = argumentOf(type);
      const at = end;
      end += Math.ceil(size / 8) * 8;
      return { size, write, at, path: `argument ${i} (${type})` };
    });
    this.#bytes = new DataView(new ArrayBuffer(Math.max(8, end)));
  }

  /** The block with these values. Errors: RangeError for a count or a value that does not fit. */
  with(values: readonly unknown[]): DataView<ArrayBuffer> {
    const takes = this.#types;
    if (values.length !== takes.length) {
      throw new RangeError(`takes ${takes.length} arguments (${takes.join(", ")}), got ${values.length}`);
    }
    for (const [i, { write, at, path }] of this.#arguments.entries()) write(this.#bytes, at, values[i], path);
    return this.#bytes;
  }
}
