/// <reference lib="esnext.disposable" preserve="true" />
// Decode attention of the twin: against float64, and what must not change a bit of it.

import { test } from "node:test";
import { assert, assertEquals, assertLess, assertNotEquals, assertThrows } from "@std/assert";
import { FreeKVError, pack } from "../lib/device.ts";
import { assertClose, bits, named, shapes, worst } from "./attention/compare.ts";
import { type LaneSpec, Rig, type RigOptions, type Selected, type Story } from "./attention/rig.ts";
import { Random } from "./retrieval/random.ts";

/** Sink, window and a selection of every third candidate, placed in slots by `order`. */
function sparse(rig: Rig, tokens: number, order: (slots: number[], head: number) => number[]): LaneSpec {
  const [sinkPages, windowPages] = [1, 2];
  const candidates = Math.max(0, Math.floor(tokens / rig.pageSize) - windowPages - sinkPages);
  const selected = Array.from({ length: rig.kvHeads }, (_, head): Selected[] => {
    const pages = Array.from({ length: candidates }, (_, i) => sinkPages + i).filter(
      (page) => page % 3 === head % 3,
    );
    const slots = order(
      Array.from({ length: candidates + 2 }, (_, i) => i),
      head,
    );
    return pages.map((page, i) => ({ page, slot: slots[i] as number }));
  });
  return { sinkPages, windowPages, nSlots: candidates + 2, selected };
}
const inOrder = (slots: number[]): number[] => slots;

test("decode attention agrees with float64 over head groups, sizes, dtypes and layouts", {
  timeout: 60_000,
}, () => {
  for (const shape of shapes) {
    using rig = new Rig(shape);
    const random = new Random(11);
    const tokens = 13 * rig.pageSize + 5; // two splits, the last page ragged
    const story = rig.story(random, tokens);
    const specs: LaneSpec[] = [
      { sinkPages: 0, windowPages: 1, attendAll: true },
      sparse(rig, tokens, inOrder),
    ];
    for (const spec of specs) rig.lane(spec, story);
    const width = rig.qHeads * rig.headDim;
    const q = random.normals(2 * width);
    const out = rig.attend(
      [
        { lane: 0, position: tokens - 1 },
        { lane: 1, position: tokens - 1 },
      ],
      q,
    );
    for (const [r, spec] of specs.entries()) {
      const row = (values: Float32Array): Float32Array => values.subarray(r * width, (r + 1) * width);
      assertClose(row(out), rig.expected(story, spec, tokens - 1, row(q)), `${named(shape)}, row ${r}`);
    }
    assert(worst(out.subarray(0, width), out.subarray(width)) > 1e-3, "dropping pages changes the result");
  }
});

test("decode attention is the same bits in both device layouts, on any number of threads, and wherever pages sit", {
  timeout: 60_000,
}, () => {
  const run = (options: RigOptions, order: (slots: number[], head: number) => number[]): Uint32Array => {
    using rig = new Rig({ group: 5, headDim: 24, dtype: "bf16", ...options });
    const random = new Random(12);
    const tokens = 31 * rig.pageSize + 7;
    const story = rig.story(random, tokens);
    rig.lane(sparse(rig, tokens, order), story);
    return bits(rig.attend([{ lane: 0, position: tokens - 1 }], random.normals(rig.qHeads * rig.headDim)));
  };
  const first = run({}, inOrder);
  assertNotEquals(first, new Uint32Array(first.length));
  assertEquals(run({ layout: "nhd" }, inOrder), first);
  for (const seed of [1, 2, 3])
    assertEquals(
      run({}, (slots, head) => new Random(seed + 10 * head).shuffled(slots)),
      first,
    );
  for (const threads of [1, 2, 3]) assertEquals(run({ threads }, inOrder), first);
  assertEquals(run({ scheduleSeed: 5 }, inOrder), first);
});

test("a budget of all pages attends as attending everything does, bit for bit", { timeout: 30_000 }, () => {
  for (const dtype of ["f32", "bf16", "f16"] as const) {
    using rig = new Rig({ group: 4, headDim: 64, dtype });
    const random = new Random(13);
    for (const tokens of [1, 16, 17, 21 * 16, 21 * 16 + 9]) {
      const story = rig.story(random, tokens);
      const candidates = Math.max(0, Math.floor(tokens / 16) - 3);
      const slots = [0, 1].map((head) =>
        new Random(head).shuffled(Array.from({ length: candidates }, (_, i) => i)),
      );
      const selected = slots.map((list) => list.map((slot, i): Selected => ({ page: 1 + i, slot })));
      const view = { sinkPages: 1, windowPages: 2 };
      const lanes = [
        rig.lane({ ...view, attendAll: true }, story),
        rig.lane({ ...view, nSlots: candidates, selected }, story),
        rig.lane({ ...view, resident: true, selected }, story),
      ].map((lane) => ({ lane, position: tokens - 1 }));
      const width = rig.qHeads * rig.headDim;
      const q = random.normals(width);
      const out = rig.attend(lanes, Float32Array.from([...q, ...q, ...q]));
      const [all, slotted, resident] = [0, 1, 2].map((r) => bits(out.slice(r * width, (r + 1) * width)));
      assertEquals(slotted, all, `${tokens} tokens, ${dtype}`);
      assertEquals(resident, all, `${tokens} tokens, ${dtype}`);
      rig.lanes.length = 0;
    }
  }
});

test("one token is attended with weight one", () => {
  using rig = new Rig({ group: 3, headDim: 24, dtype: "bf16" });
  const random = new Random(14);
  const story = rig.story(random, 1);
  for (const sinkPages of [0, 2]) {
    const lane = rig.lane({ sinkPages, windowPages: 1 }, story);
    const out = rig.attend([{ lane, position: 0 }], random.normals(rig.qHeads * rig.headDim));
    const value = (h: number): number[] => [...rig.rowOf(story, 1, 0, Math.floor(h / rig.group))];
    assertEquals([...out], Array.from({ length: rig.qHeads }, (_, h) => value(h)).flat());
  }
});

test("an empty row gives zeros and leaves every lane alone; a row's result does not depend on its neighbours", () => {
  using rig = new Rig({ group: 2, headDim: 32 });
  const random = new Random(15);
  const [long, short] = [rig.story(random, 300), rig.story(random, 20)];
  rig.lane({ sinkPages: 1, windowPages: 1, attendAll: true }, long);
  rig.lane({ sinkPages: 1, windowPages: 1 }, short);
  const width = rig.qHeads * rig.headDim;
  const q = random.normals(3 * width);
  const rows = [{ lane: 0, position: 299 }, undefined, { lane: 1, position: 19 }];
  const out = rig.attend(rows, q);
  assertEquals(out.slice(width, 2 * width), new Float32Array(width));
  for (const r of [0, 2]) {
    const alone = rig.attend([rows[r]], q.slice(r * width, (r + 1) * width));
    assertEquals(bits(out.slice(r * width, (r + 1) * width)), bits(alone));
    assert(alone.some((x) => x !== 0));
  }
  const before = rig.floats(rig.lanes[1]!.qPrev);
  rig.attend([undefined, undefined], random.normals(2 * width));
  assertEquals(bits(rig.floats(rig.lanes[1]!.qPrev)), bits(before));
});

test("attention leaves the step's q behind, in its layer alone", () => {
  using rig = new Rig({ layers: 3 });
  const random = new Random(16);
  rig.lane({ sinkPages: 0, windowPages: 2 }, rig.story(random, 10));
  const width = rig.qHeads * rig.headDim;
  const q = random.normals(width);
  rig.attend([{ lane: 0, position: 9 }], q, 1);
  const kept = rig.floats(rig.lanes[0]!.qPrev);
  assertEquals(kept.slice(width, 2 * width), q);
  assert(
    [...kept.slice(0, width), ...kept.slice(2 * width)].every(Number.isNaN),
    "other layers keep what they had",
  );
});

test("NaN in a page that is not selected does not leak, in one that is it shows", () => {
  using rig = new Rig({ headDim: 16 });
  const random = new Random(17);
  const story = rig.story(random, 12 * 16);
  const spoilt: Story = { ...story, kv: [story.kv[0].slice(), story.kv[1]] };
  rig.rowOf(spoilt, 0, 5 * 16 + 3, 0)[2] = Number.NaN; // page 5, KV head 0
  const at = (pages: number[]): Selected[] => pages.map((page, slot) => ({ page, slot }));
  const view = { sinkPages: 1, windowPages: 2, resident: true };
  const clean = { ...view, selected: [at([3, 7]), at([5, 7])] };
  const rows = [
    rig.lane(clean, story),
    rig.lane(clean, spoilt),
    rig.lane({ ...view, selected: [at([5]), at([7])] }, spoilt),
  ];
  const q = random.normals(rig.qHeads * rig.headDim);
  const [expected, unselected, selected] = rows.map((lane) =>
    rig.attend([{ lane, position: 191 }], q),
  ) as Float32Array[];
  assert(expected!.every(Number.isFinite));
  assertEquals(bits(unselected!), bits(expected!));
  const half = rig.group * rig.headDim;
  assert(selected!.slice(0, half).every(Number.isNaN), "the head that attends it is NaN");
  assert(selected!.slice(half).every(Number.isFinite), "the other head is not");
});

test("scores far beyond exp's range neither overflow nor vanish", () => {
  using rig = new Rig({ headDim: 64, group: 4 });
  const random = new Random(18);
  const story = rig.story(random, 9 * 16 + 1);
  const spec = { sinkPages: 1, windowPages: 1, attendAll: true };
  rig.lane(spec, story);
  const q = random.normals(rig.qHeads * 64).map((x) => 300 * x);
  const out = rig.attend([{ lane: 0, position: 144 }], q);
  assertLess(worst(out, rig.expected(story, spec, 144, q)), 2e-3); // scores near 1000 carry f32's 6e-5
});

test("a context of thousands of tokens agrees with float64, and its bits do not depend on the batch", {
  timeout: 30_000,
}, () => {
  for (const dtype of ["bf16", "f32"] as const) {
    using rig = new Rig({ kvHeads: 8, group: 1, headDim: 8, dtype });
    const random = new Random(26);
    const tokens = 5003; // more splits than strands, on CUDA, and some strands of two
    const spec = { sinkPages: 0, windowPages: 1, attendAll: true };
    const story = rig.story(random, tokens);
    const lane = rig.lane(spec, story);
    const width = rig.qHeads * rig.headDim;
    const q = random.normals(width);
    const row = { lane, position: tokens - 1 };
    const alone = rig.attend([row], q);
    assert(worst(alone, rig.expected(story, spec, tokens - 1, q)) < 5e-6, dtype);
    assert(alone.some((x) => Math.abs(x) > 0.01));
    const together = rig.attend([row, row, row, row], Float32Array.from([...q, ...q, ...q, ...q]));
    for (let r = 0; r < 4; r++)
      assertEquals(bits(together.slice(r * width, (r + 1) * width)), bits(alone), `row ${r}, ${dtype}`);
  }
});

test("one captured attention serves every length", () => {
  using rig = new Rig({ headDim: 32, group: 2 });
  const random = new Random(19);
  const story = rig.story(random, 400);
  const spec = { sinkPages: 1, windowPages: 1, attendAll: true };
  rig.lane(spec, story);
  const width = rig.qHeads * rig.headDim;
  const qkv = rig.upload(random.normals(rig.qkvWidth));
  const q = rig.floats(qkv).slice(0, width);
  const out = rig.alloc(4 * width);
  using graph = rig.stream.capture(() => {
    rig.device.call("fkv_attend", out.address, rig.cache(), qkv.address, 0, 1, rig.stream.handle);
  });
  for (const position of [3, 399, 150]) {
    rig.setRows([{ lane: 0, position }]);
    rig.stream.launch(graph);
    assertClose(rig.floats(out), rig.expected(story, spec, position, q), `position ${position}`);
  }
});

test("what attention cannot run on is refused at the call, in words", () => {
  using rig = new Rig();
  rig.lane({ sinkPages: 0, windowPages: 1 }, rig.story(new Random(25), 4));
  const memory = rig.alloc(4096).address;
  const decode = (changes: Parameters<Rig["cache"]>[0], layer = 0, nRows = 1): unknown =>
    rig.device.call("fkv_attend", memory, rig.cache(changes), memory, layer, nRows, rig.stream.handle);
  const refused = (fn: () => unknown, text: string): unknown => assertThrows(fn, FreeKVError, text);
  refused(() => decode({}, 1), "layer 1 of 1");
  refused(() => decode({}, 0, 5), "5 rows, the cache's tables hold 4");
  refused(() => decode({ n_q_heads: 3 }), "3 query heads are no multiple of 2 KV heads");
  refused(() => decode({ head_dim: 12 }), "head_dim is 12");
  refused(() => decode({ page_size: 8 }), "page_size is 8");
  refused(() => decode({ frame_bytes: 64 }), "frame_bytes is 64");
  refused(() => decode({ lanes: null }), "cache.lanes is null");
  refused(() => decode({ device: { ...rig.frames(0), row: 8 } }), "multiples of 16 bytes");
  const chunk = { layer: 0, start: 0, n: 1, family: 0, qkv: memory, out: memory, frames: rig.frames(memory) };
  const attend = (changes: Partial<typeof chunk> | { out: null } | { frames: null }): unknown =>
    rig.device.call(
      "fkv_prefill_attend",
      rig.cache(),
      pack.fkv_prefill_params({ ...chunk, ...changes }),
      rig.stream.handle,
    );
  refused(() => attend({ start: -1 }), "1 tokens from position -1");
  refused(() => attend({ out: null }), "params.out is null");
  refused(() => attend({ frames: null }), "params.frames has neither base nor chunks");
  const wrong = pack.fkv_prefill_params(chunk);
  new DataView(wrong).setUint32(0, 8, true);
  refused(
    () => rig.device.call("fkv_prefill_attend", rig.cache(), wrong, rig.stream.handle),
    "struct_bytes is 8",
  );
});
