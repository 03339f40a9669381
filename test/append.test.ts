/// <reference lib="esnext.disposable" preserve="true" />
// New tokens on the twin: where their K and V go, and how they are rounded.

import { test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { pack } from "../lib/device.ts";
import { fromFloat32 } from "../lib/float.ts";
import { Rig, type Story } from "./attention/rig.ts";
import { headPageOf } from "./retrieval/images.ts";
import { Random } from "./retrieval/random.ts";

/** One row's qkv from K and V of every head. */
function qkvOf(rig: Rig, k: Float32Array, v: Float32Array): Float32Array {
  const qkv = new Float32Array(rig.qkvWidth).fill(Number.NaN);
  qkv.set(k, rig.qHeads * rig.headDim);
  qkv.set(v, (rig.qHeads + rig.kvHeads) * rig.headDim);
  return qkv;
}

test("append writes each row's token into its lane's frame of that page, rounded to nearest even, and nothing else", {
  timeout: 30_000,
}, () => {
  for (const dtype of ["f32", "bf16", "f16"] as const) {
    for (const layout of ["hnd", "nhd"] as const) {
      using rig = new Rig({ dtype, layout, headDim: 24, layers: 2, maxRows: 8 });
      const random = new Random(1);
      const empty: Story = rig.story(random, 0);
      const view = { sinkPages: 1, windowPages: 2, nSlots: 1 };
      const lanes = [0, 1, 2, 3]
        .map(() => rig.lane(view, empty))
        .concat(rig.lane({ ...view, resident: true }, { ...empty, tokens: 1 }));
      const rows = [5, 16, 16 * 3 + 15, 16 * 7 + 2, 15].map((position, i) => ({
        lane: lanes[i] as number,
        position,
      }));
      const frameOfRow = [0, 1 + 1, 1 + 0, 1 + 1, 0]; // sink; window pages 1, 3, 7 in a ring of 3; resident
      const width = rig.kvHeads * rig.headDim;
      const edge = [
        1 + 2 ** -8,
        1 + 3 * 2 ** -8,
        1 + 2 ** -11,
        1 + 3 * 2 ** -11,
        65520,
        2 ** -25,
        -0,
        1e-41,
        Number.NaN,
        -Number.POSITIVE_INFINITY,
      ];
      const values = rows.map(() =>
        [0, 1].map(() => Float32Array.from([...edge, ...random.normals(width - edge.length)])),
      );
      const before = rig.lanes.map((lane) => rig.download(lane.frames));
      rig.setRows([...rows, undefined]);
      const qkv = rig.upload(
        Float32Array.from([
          ...values.flatMap(([k, v]) => [...qkvOf(rig, k!, v!)]),
          ...new Float32Array(rig.qkvWidth),
        ]),
      );
      rig.device.call("fkv_append", rig.cache(), qkv.address, 1, rows.length + 1, rig.stream.handle);
      for (const [r, { lane, position }] of rows.entries()) {
        const frames = rig.download(rig.lanes[lane]!.frames);
        const at = (rig.lanes[lane]!.nFrames + frameOfRow[r]!) * rig.frameBytes;
        const rowBytes = rig.headDim * rig.elementBytes;
        for (let head = 0; head < rig.kvHeads; head++) {
          const page = headPageOf(rig, layout, frames.subarray(at, at + rig.frameBytes), head);
          for (let kv = 0; kv < 2; kv++) {
            const row = (kv * rig.pageSize + (position % rig.pageSize)) * rowBytes;
            const expected = fromFloat32(
              values[r]![kv]!.subarray(head * rig.headDim, (head + 1) * rig.headDim),
              dtype,
            );
            assertEquals(
              page.subarray(row, row + rowBytes),
              expected,
              `${dtype} ${layout} row ${r} head ${head}`,
            );
          }
        }
        const changed = frames.reduce((n, byte, i) => n + (byte !== before[lane]![i] ? 1 : 0), 0);
        assert(changed > 0 && changed <= 2 * rig.kvHeads * rowBytes, `${changed} bytes changed`);
      }
    }
  }
});

test("a chunk of a prompt is appended as its tokens one by one are", { timeout: 30_000 }, () => {
  using rig = new Rig({ dtype: "bf16", layout: "nhd", headDim: 40, layers: 2, group: 1 });
  const [start, n] = [13, 40];
  const qkv = new Random(2).normals(n * rig.qkvWidth);
  const lane = rig.lane(
    { sinkPages: 0, windowPages: 1, resident: true },
    { ...rig.story(new Random(3), 0), tokens: 64 },
  );
  const input = rig.upload(qkv);
  for (let i = 0; i < n; i++) {
    rig.setRows([{ lane, position: start + i }]);
    rig.device.call("fkv_append", rig.cache(), input.address + 4 * i * rig.qkvWidth, 1, 1, rig.stream.handle);
  }
  const pages = rig.lanes[lane]!.nFrames;
  const chunk = rig.upload(new Uint8Array(2 * pages * rig.frameBytes));
  const params = pack.fkv_prefill_params({
    layer: 1,
    start,
    n,
    family: 0,
    qkv: input,
    out: null,
    frames: rig.frames(chunk, pages * rig.frameBytes),
  });
  rig.device.call("fkv_prefill_append", rig.cache(), params, rig.stream.handle);
  const [one, all] = [rig.download(rig.lanes[lane]!.frames), rig.download(chunk)];
  const rowBytes = rig.headDim * rig.elementBytes;
  let compared = 0;
  for (let page = 0; page < pages; page++) {
    const at = (pages + page) * rig.frameBytes;
    for (let head = 0; head < rig.kvHeads; head++) {
      const [a, b] = [one, all].map((bytes) =>
        headPageOf(rig, "nhd", bytes.subarray(at, at + rig.frameBytes), head),
      ) as Uint8Array[];
      for (let row = 0; row < 2 * rig.pageSize; row++) {
        const token = page * rig.pageSize + (row % rig.pageSize);
        const [x, y] = [a, b].map((bytes) =>
          bytes!.subarray(row * rowBytes, (row + 1) * rowBytes),
        ) as Uint8Array[];
        if (token < start || token >= start + n) assertEquals(y, new Uint8Array(rowBytes));
        else assertEquals(y, x);
        compared += token < start || token >= start + n ? 0 : 1;
      }
    }
  }
  assertEquals(compared, n * 2 * rig.kvHeads);
  assert(
    all.subarray(0, pages * rig.frameBytes).every((byte) => byte === 0),
    "the other layer is left alone",
  );
});
