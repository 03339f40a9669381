/// <reference lib="esnext.disposable" preserve="true" />
// Prefill attention: against float64, and what must not change a bit of it.

import { test } from "node:test";
import { assert, assertEquals, assertNotEquals } from "@std/assert";
import { FKV_FAST, FKV_PREFILL } from "../ffi/constants.ts";
import type { Dtype } from "../lib/checkpoint.ts";
import { pack } from "../lib/device.ts";
import { assertClose, bits, named, shapes } from "./attention/compare.ts";
import { Rig, type RigOptions, type Story } from "./attention/rig.ts";
import { Random } from "./retrieval/random.ts";
import { onTwin } from "./target.ts";

const families = [FKV_PREFILL, FKV_FAST];
/** How far outputs may be from float64: the twin and f32 round nothing; else q and weights are two values of the type, or one. */
function within(dtype: Dtype, family: number): number {
  if (onTwin || dtype === "f32") return 5e-6;
  const [precise, fast] = dtype === "bf16" ? [2e-5, 2e-2] : [5e-6, 2.5e-3];
  return family === FKV_FAST ? fast : precise;
}

/** A prompt in chunks of these sizes: append, then attend. Returns [token][qHeads·d]. */
function prefill(
  rig: Rig,
  qkv: Float32Array,
  chunks: readonly number[],
  family: number = FKV_PREFILL,
): Float32Array {
  const tokens = chunks.reduce((sum, n) => sum + n, 0);
  const width = rig.qHeads * rig.headDim;
  const layer = rig.layers - 1;
  const layerBytes = Math.ceil(tokens / rig.pageSize) * rig.frameBytes;
  const frames = rig.frames(rig.alloc(rig.layers * layerBytes), layerBytes);
  const out = rig.alloc(4 * tokens * width);
  const input = rig.upload(qkv);
  let start = 0;
  for (const n of chunks) {
    const params = pack.fkv_prefill_params({
      layer,
      start,
      n,
      family,
      frames,
      qkv: input.address + 4 * start * rig.qkvWidth,
      out: out.address + 4 * start * width,
    });
    rig.device.call("fkv_prefill_append", rig.cache(), params, rig.stream.handle);
    rig.device.call("fkv_prefill_attend", rig.cache(), params, rig.stream.handle);
    start += n;
  }
  return rig.floats(out);
}
/** qkv whose K and V are a story's, so that they are exact in the rig's dtype. */
function prompt(rig: Rig, random: Random, tokens: number): { qkv: Float32Array; story: Story } {
  const story = rig.story(random, tokens);
  const qkv = random.normals(tokens * rig.qkvWidth);
  for (let t = 0; t < tokens; t++) {
    for (let i = 0; i < 2 * rig.kvHeads; i++) {
      const row = rig.rowOf(story, Math.floor(i / rig.kvHeads), t, i % rig.kvHeads);
      qkv.set(row, t * rig.qkvWidth + (rig.qHeads + i) * rig.headDim);
    }
  }
  return { qkv, story };
}

test("prefill attention agrees with float64 over head groups, sizes, dtypes and layouts", {
  timeout: 120_000,
}, () => {
  const wide: RigOptions[] = [
    { group: 4, headDim: 128, dtype: "bf16", pageSize: 32 },
    { group: 2, headDim: 128, dtype: "f16", layout: "nhd" },
    { group: 16, kvHeads: 1, headDim: 256, dtype: "bf16" },
  ];
  for (const shape of [...shapes, ...wide]) {
    using rig = new Rig({ ...shape, layers: 2 });
    const random = new Random(21);
    const tokens = 150;
    const { qkv, story } = prompt(rig, random, tokens);
    const width = rig.qHeads * rig.headDim;
    const everything = { sinkPages: 0, windowPages: 1, attendAll: true };
    const outputs = families.map((family) => prefill(rig, qkv, [tokens], family));
    for (const t of [0, 1, 15, 63, 64, 65, 127, 128, 149]) {
      const q = qkv.slice(t * rig.qkvWidth, t * rig.qkvWidth + width);
      const expected = rig.expected(story, everything, t, q);
      for (const [i, family] of families.entries()) {
        assertClose(
          outputs[i]!.slice(t * width, (t + 1) * width),
          expected,
          `${named(shape)}, family ${family}, token ${t}`,
          within(rig.dtype, family),
        );
      }
    }
  }
});

test("a token's bits do not depend on where chunks begin, on the layout or on threads", {
  timeout: 120_000,
}, () => {
  for (const shape of [
    { group: 1, headDim: 96 },
    { group: 4, headDim: 64, dtype: "bf16" },
    { group: 7, headDim: 24, dtype: "f16" },
    { group: 4, headDim: 128, dtype: "bf16", family: FKV_FAST },
    { group: 3, headDim: 256, dtype: "f16", family: FKV_FAST },
  ] as const) {
    const run = (chunks: number[], options: RigOptions = {}): Uint32Array => {
      using rig = new Rig({ ...shape, ...options });
      const { qkv } = prompt(rig, new Random(22), 300);
      return bits(prefill(rig, qkv, chunks, "family" in shape ? shape.family : FKV_PREFILL));
    };
    const whole = run([300]);
    assertNotEquals(whole, new Uint32Array(whole.length));
    assertEquals(run([64, 64, 172]), whole, "at the blocks' edges");
    assertEquals(run([1, 2, 60, 37, 1, 199]), whole, "anywhere");
    assertEquals(run(Array.from({ length: 300 }, () => 1)), whole, "one by one");
    assertEquals(run([300], { threads: 1 }), whole, "on one thread");
    assertEquals(run([300], { layout: "nhd" }), whole, "in the other layout");
    assertEquals(run([150, 150], { pageSize: 64 }), whole, "in pages of another size");
  }
});

test("a token never sees what follows it, not even NaN", { timeout: 60_000 }, () => {
  for (const [headDim, family] of [
    [64, FKV_PREFILL],
    [128, FKV_FAST],
  ] as const) {
    using rig = new Rig({ group: 4, headDim, dtype: "bf16" });
    const { qkv } = prompt(rig, new Random(23), 100);
    const clean = prefill(rig, qkv, [100], family);
    assert(clean.every(Number.isFinite));
    const width = rig.qHeads * rig.headDim;
    for (const bad of [69, 70, 71]) {
      const spoilt = qkv.slice();
      spoilt.fill(Number.NaN, bad * rig.qkvWidth + width, (bad + 1) * rig.qkvWidth); // its K and V
      const out = prefill(rig, spoilt, [100], family);
      assertEquals(bits(out.slice(0, bad * width)), bits(clean.slice(0, bad * width)));
      assert(out.slice(bad * width).every(Number.isNaN));
    }
  }
});

test("one NaN of V spoils its channel alone, for every token that sees it", { timeout: 60_000 }, () => {
  using rig = new Rig({ group: 2, headDim: 128, dtype: "f16" });
  const { qkv } = prompt(rig, new Random(26), 270);
  const clean = prefill(rig, qkv, [270]);
  const width = rig.qHeads * rig.headDim;
  const [token, channel] = [130, 77]; // in the second block of keys, of V's first head
  qkv[token * rig.qkvWidth + width + rig.kvHeads * rig.headDim + channel] = Number.NaN;
  for (const chunks of [[270], [128, 4, 138]]) {
    const out = prefill(rig, qkv, chunks);
    for (const [i, value] of out.entries()) {
      const spoilt = i >= token * width && i % width < rig.group * rig.headDim && i % rig.headDim === channel;
      if (spoilt) assert(Number.isNaN(value), `element ${i}`);
      else if (value !== clean[i]) assertEquals(value, clean[i], `element ${i}`);
    }
  }
});

test("prefill and decode attention of the same token agree", () => {
  using rig = new Rig({ group: 4, headDim: 64, dtype: "bf16" });
  const { qkv, story } = prompt(rig, new Random(24), 333);
  const width = rig.qHeads * rig.headDim;
  const lane = rig.lane({ sinkPages: 0, windowPages: 1, attendAll: true }, story);
  const q = qkv.slice(332 * rig.qkvWidth, 332 * rig.qkvWidth + width);
  assertClose(
    rig.attend([{ lane, position: 332 }], q),
    prefill(rig, qkv, [333]).slice(332 * width),
    "token 332",
    2 * within(rig.dtype, FKV_PREFILL),
  );
});
