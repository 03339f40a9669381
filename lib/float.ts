import type { Dtype } from "./checkpoint.ts";

/** The storage dtypes: bytes to numbers and back. Little endian, as the platforms that we run on are. */

export function dtypeBytes(dtype: Dtype): number {
  return dtype === "f32" ? 4 : 2;
}

const scratch = new DataView(new ArrayBuffer(4));

/** `bytes` hold values of `dtype`; any alignment. Exact. */
export function toFloat32(bytes: Uint8Array, dtype: Dtype): Float32Array {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const out = new Float32Array(bytes.byteLength / dtypeBytes(dtype));
  for (let i = 0; i < out.length; i++) {
    if (dtype === "f32") out[i] = view.getFloat32(4 * i, true);
    else
      out[i] =
        dtype === "bf16" ? fromBf16(view.getUint16(2 * i, true)) : fromF16(view.getUint16(2 * i, true));
  }
  return out;
}

/** To nearest, ties to even; what is too large becomes infinite; NaN stays NaN. */
export function fromFloat32(values: Float32Array, dtype: Dtype): Uint8Array {
  const out = new Uint8Array(values.length * dtypeBytes(dtype));
  const view = new DataView(out.buffer);
  for (const [i, value] of values.entries()) {
    if (dtype === "f32") view.setFloat32(4 * i, value, true);
    else view.setUint16(2 * i, dtype === "bf16" ? toBf16(value) : toF16(value), true);
  }
  return out;
}

/** `bytes` of `from` as bytes of `to`; undefined where a finite value does not fit. */
export function convert(bytes: Uint8Array, from: Dtype, to: Dtype): Uint8Array | undefined {
  if (from === to) return bytes;
  const values = toFloat32(bytes, from);
  const out = fromFloat32(values, to);
  if (to === "f32") return out;
  const back = toFloat32(out, to);
  return values.some((value, i) => Number.isFinite(value) && !Number.isFinite(back[i])) ? undefined : out;
}

function bitsOf(value: number): number {
  scratch.setFloat32(0, value);
  return scratch.getUint32(0);
}

function fromBf16(bits: number): number {
  scratch.setUint32(0, bits << 16);
  return scratch.getFloat32(0);
}

function toBf16(value: number): number {
  const bits = bitsOf(value);
  if (Number.isNaN(value)) return (bits >>> 16) | 0x40;
  return (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16;
}

function fromF16(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >>> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 31) return fraction === 0 ? sign * Infinity : NaN;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return sign * (1024 + fraction) * 2 ** (exponent - 25);
}

function toF16(value: number): number {
  const sign = (bitsOf(value) >>> 16) & 0x8000;
  const size = Math.abs(value);
  if (Number.isNaN(value)) return sign | 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  // In steps of its binade's (or the subnormals') last place; a carry into the next binade adds up by itself.
  const exponent = Math.max(((bitsOf(value) >>> 23) & 0xff) - 127, -14);
  return sign | (((exponent + 14) << 10) + roundEven(size * 2 ** (10 - exponent)));
}

function roundEven(value: number): number {
  const below = Math.floor(value);
  const rest = value - below;
  return rest > 0.5 || (rest === 0.5 && below % 2 === 1) ? below + 1 : below;
}
