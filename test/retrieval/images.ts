// Head pages as bytes, and how a frame of either layout holds them. A head page here is K then V, token rows contiguous.

export type PageLayout = "hnd" | "nhd";

export interface PageShape {
  readonly kvHeads: number;
  readonly pageSize: number;
  readonly headDim: number;
  readonly elementBytes: number;
}

/** Bytes between heads, between K and V, and between token rows of one frame. */
export function stridesOf(shape: PageShape, layout: PageLayout): { head: number; kv: number; row: number } {
  const { kvHeads, pageSize } = shape;
  const row = shape.headDim * shape.elementBytes;
  if (layout === "hnd") return { head: 2 * pageSize * row, kv: pageSize * row, row };
  return { head: row, kv: pageSize * kvHeads * row, row: kvHeads * row };
}

/** One head's page out of a frame. */
export function headPageOf(
  shape: PageShape,
  layout: PageLayout,
  frame: Uint8Array,
  head: number,
): Uint8Array {
  const out = new Uint8Array(2 * shape.pageSize * shape.headDim * shape.elementBytes);
  forRows(shape, layout, head, (at, inPage, bytes) => out.set(frame.subarray(at, at + bytes), inPage));
  return out;
}

/** A frame made of one page a head. */
export function frameOf(shape: PageShape, layout: PageLayout, heads: readonly Uint8Array[]): Uint8Array {
  const frame = new Uint8Array(shape.kvHeads * 2 * shape.pageSize * shape.headDim * shape.elementBytes);
  for (const [head, page] of heads.entries()) {
    forRows(shape, layout, head, (at, inPage, bytes) => frame.set(page.subarray(inPage, inPage + bytes), at));
  }
  return frame;
}

function forRows(
  shape: PageShape,
  layout: PageLayout,
  head: number,
  each: (inFrame: number, inPage: number, bytes: number) => void,
): void {
  const strides = stridesOf(shape, layout);
  const bytes = shape.headDim * shape.elementBytes;
  for (let kv = 0; kv < 2; kv++) {
    for (let row = 0; row < shape.pageSize; row++) {
      each(
        head * strides.head + kv * strides.kv + row * strides.row,
        (kv * shape.pageSize + row) * bytes,
        bytes,
      );
    }
  }
}
