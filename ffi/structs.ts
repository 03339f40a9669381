// Packs and reads the structs of cuda/freekv.h: sizes and offsets by C's rules from the fields in layouts.ts.

import { type Layout, layouts, type StructName } from "./layouts.ts";

/** An address, or what has one (a buffer); null is the null pointer. */
export type Pointer = number | { readonly address: number } | null;

type Value<F> = F extends StructName
  ? Values<F> | null
  : F extends `char[${string}]`
    ? string
    : F extends `${string}[${string}]`
      ? ArrayLike<number>
      : F extends "ptr"
        ? Pointer
        : F extends "u64" | "i64"
          ? number | bigint
          : number;

/**
 * A struct's fields by the header's names. `struct_bytes` is filled in; `reserved` is zero, whatever is given.
 * A nested struct may be null: all zero. A list may be shorter than its field: the rest is zero.
 */
export type Values<N extends StructName> = {
  readonly [F in Exclude<keyof Layout<N>, "struct_bytes" | "reserved">]: Value<Layout<N>[F]>;
} & { readonly reserved?: number };

type ReadValue<F> = F extends StructName
  ? Read<F>
  : F extends `char[${string}]`
    ? string
    : F extends `${string}[${string}]`
      ? number[]
      : number;

/** A struct as read: pointers and 64-bit integers are numbers, the nearest where they exceed 2^53. */
export type Read<N extends StructName> = {
  -readonly [F in Exclude<keyof Layout<N>, "struct_bytes" | "reserved">]: ReadValue<Layout<N>[F]>;
};

/** How one kind of field, or of a kernel's argument, is laid out; `path` names the field in errors. */
export interface Codec {
  size: number;
  align: number;
  write(view: DataView, at: number, value: unknown, path: string): void;
  read(view: DataView, at: number): unknown;
}

function refuse(path: string, wanted: string, value: unknown): never {
  const shown = typeof value === "object" && value !== null ? "an object" : String(value);
  throw new RangeError(`${path} must be ${wanted}, got ${shown}`);
}

function integer(value: unknown, low: number, high: number, wanted: string, path: string): number {
  if (typeof value === "number" && Number.isInteger(value) && value >= low && value <= high) return value;
  return refuse(path, wanted, value);
}

function float(value: unknown, path: string): number {
  return typeof value === "number" ? value : refuse(path, "a number", value);
}

// Two 32-bit halves: a bigint would be allocated for each field.
function write64(view: DataView, at: number, value: number): void {
  view.setUint32(at, value % 2 ** 32, true);
  view.setInt32(at + 4, Math.floor(value / 2 ** 32), true);
}
function readU64(view: DataView, at: number): number {
  return view.getUint32(at, true) + view.getUint32(at + 4, true) * 2 ** 32;
}

const maxSafe = Number.MAX_SAFE_INTEGER;
/** The scalars of C by their names in layouts.ts. */
export const scalars: Readonly<Record<string, Codec>> = {
  u32: {
    size: 4,
    align: 4,
    write: (view, at, value, path) =>
      view.setUint32(at, integer(value, 0, 2 ** 32 - 1, "a uint32", path), true),
    read: (view, at) => view.getUint32(at, true),
  },
  i32: {
    size: 4,
    align: 4,
    write: (view, at, value, path) =>
      view.setInt32(at, integer(value, -(2 ** 31), 2 ** 31 - 1, "an int32", path), true),
    read: (view, at) => view.getInt32(at, true),
  },
  u64: {
    size: 8,
    align: 8,
    write(view, at, value, path) {
      if (typeof value !== "bigint") write64(view, at, integer(value, 0, maxSafe, "a uint64", path));
      else if (value === BigInt.asUintN(64, value)) view.setBigUint64(at, value, true);
      else refuse(path, "a uint64", value);
    },
    read: readU64,
  },
  i64: {
    size: 8,
    align: 8,
    write(view, at, value, path) {
      if (typeof value !== "bigint") write64(view, at, integer(value, -maxSafe, maxSafe, "an int64", path));
      else if (value === BigInt.asIntN(64, value)) view.setBigInt64(at, value, true);
      else refuse(path, "an int64", value);
    },
    read: (view, at) => view.getUint32(at, true) + view.getInt32(at + 4, true) * 2 ** 32,
  },
  f32: {
    size: 4,
    align: 4,
    write: (view, at, value, path) => view.setFloat32(at, float(value, path), true),
    read: (view, at) => view.getFloat32(at, true),
  },
  f64: {
    size: 8,
    align: 8,
    write: (view, at, value, path) => view.setFloat64(at, float(value, path), true),
    read: (view, at) => view.getFloat64(at, true),
  },
  ptr: {
    size: 8,
    align: 8,
    write(view, at, value, path) {
      const holder =
        typeof value === "object" && value !== null ? (value as { address: unknown }).address : value;
      write64(
        view,
        at,
        holder === null ? 0 : integer(holder, 0, maxSafe, "an address, a buffer or null", path),
      );
    },
    read: readU64,
  },
};

function numbers(element: Codec, length: number): Codec {
  return {
    size: element.size * length,
    align: element.align,
    write(view, at, value, path) {
      const list = value as ArrayLike<number> | null | undefined;
      if (typeof list?.length !== "number" || list.length > length) {
        return refuse(path, `a list of at most ${length}`, value);
      }
      for (let i = 0; i < length; i++) {
        element.write(view, at + i * element.size, i < list.length ? list[i] : 0, `${path}[${i}]`);
      }
    },
    read: (view, at) => Array.from({ length }, (_, i) => element.read(view, at + i * element.size)),
  };
}

/** UTF-8, ended by a zero byte. */
function text(length: number): Codec {
  const bytes = (view: DataView, at: number): Uint8Array =>
    new Uint8Array(view.buffer, view.byteOffset + at, length);
  return {
    size: length,
    align: 1,
    write(view, at, value, path) {
      const encoded = new TextEncoder().encode(
        typeof value === "string" ? value : refuse(path, "a string", value),
      );
      if (encoded.length >= length) refuse(path, `a string of at most ${length - 1} bytes`, value);
      const target = bytes(view, at);
      target.fill(0);
      target.set(encoded);
    },
    read(view, at) {
      const all = bytes(view, at);
      const end = all.indexOf(0);
      return new TextDecoder().decode(all.slice(0, end < 0 ? length : end));
    },
  };
}

function codecOf(field: string): Codec {
  const [, element, length] = /^(\w+)\[(\d+)\]$/.exec(field) ?? [];
  if (element === "char") return text(Number(length));
  const scalar = scalars[element ?? field];
  if (scalar === undefined) return record(field as StructName).codec;
  return element === undefined ? scalar : numbers(scalar, Number(length));
}

function record(name: StructName): { codec: Codec; offsets: Record<string, number> } {
  let end = 0;
  let align = 1;
  const fields = Object.entries(layouts[name]).map(([field, kind]) => {
    const codec = codecOf(kind);
    const offset = Math.ceil(end / codec.align) * codec.align;
    end = offset + codec.size;
    align = Math.max(align, codec.align);
    return { field, path: `${name}.${field}`, offset, codec };
  });
  const size = Math.ceil(end / align) * align;
  const codec: Codec = {
    size,
    align,
    write(view, at, value, path) {
      if (value === null) {
        new Uint8Array(view.buffer, view.byteOffset + at, size).fill(0);
        return;
      }
      if (typeof value !== "object") return refuse(path, `the fields of ${name}`, value);
      const values = value as Record<string, unknown>;
      for (const { field, path, offset, codec } of fields) {
        if (field === "struct_bytes") view.setUint32(at + offset, size, true);
        else if (field === "reserved")
          new Uint8Array(view.buffer, view.byteOffset + at + offset, codec.size).fill(0);
        else codec.write(view, at + offset, values[field], path);
      }
    },
    read(view, at) {
      const shown = fields.filter(({ field }) => field !== "struct_bytes" && field !== "reserved");
      return Object.fromEntries(
        shown.map(({ field, offset, codec }) => [field, codec.read(view, at + offset)]),
      );
    },
  };
  return { codec, offsets: Object.fromEntries(fields.map(({ field, offset }) => [field, offset])) };
}

export const structNames: readonly StructName[] = Object.keys(layouts) as StructName[];

function each<T>(make: (name: StructName) => T): Record<StructName, T> {
  return Object.fromEntries(structNames.map((name) => [name, make(name)])) as Record<StructName, T>;
}

const records = each(record);

/** sizeof */
export const size: { readonly [N in StructName]: number } = each((name) => records[name].codec.size);

/** offsetof each field; for a field of a nested struct, add the nested struct's own. */
export const offsets: { readonly [N in StructName]: { readonly [F in keyof Layout<N>]: number } } = each(
  (name) => records[name].offsets,
) as { [N in StructName]: { [F in keyof Layout<N>]: number } };

export interface PackInto {
  into: ArrayBuffer;
  /** Byte offset in `into`; 0 if absent. */
  at?: number;
}

/**
 * `pack.fkv_lane({ … })`: the struct as C wants it, in an ArrayBuffer of its size, or in `into`.
 * Throws RangeError for a value that its field cannot hold.
 */
export const pack: { readonly [N in StructName]: (values: Values<N>, where?: PackInto) => ArrayBuffer } =
  each((name) => (values: unknown, where?: PackInto) => {
    const into = where?.into ?? new ArrayBuffer(size[name]);
    records[name].codec.write(new DataView(into), where?.at ?? 0, values, name);
    return into;
  });

/** `write.fkv_row(view, byteOffset, { … })`: the same through a DataView that the caller keeps, e.g. of a pinned ring. */
export const write: { readonly [N in StructName]: (view: DataView, at: number, values: Values<N>) => void } =
  each(
    (name) => (view: DataView, at: number, values: unknown) =>
      records[name].codec.write(view, at, values, name),
  );

/** `read.fkv_result(view, byteOffset)`: every field, for what is not read often. */
export const read: { readonly [N in StructName]: (view: DataView, at: number) => Read<N> } = each(
  (name) => records[name].codec.read,
) as { [N in StructName]: (view: DataView, at: number) => Read<N> };
