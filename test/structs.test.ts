// Packing and reading the ABI's structs. Their sizes and offsets are abi.test.ts's claim.

import { test } from "node:test";
import { assertEquals, assertInstanceOf, assertMatch, assertThrows } from "@std/assert";
import { pack, read, size, write } from "../ffi/structs.ts";

test("structs survive a round trip, at any place of a ring", () => {
  const values = {
    seed: 2n ** 64n - 1n,
    sequence: -1,
    position: 7,
    token: -1,
    target: 5,
    block: 2 ** 31 - 1,
    correction: 2,
    speculation: 1,
    prefetch: 3,
    top_k: 0,
    n_top: 20,
    temperature: 0.5,
    top_p: 0.25,
  };
  const ring = new ArrayBuffer(3 * size.fkv_row);
  write.fkv_row(new DataView(ring), size.fkv_row, values);
  const expected = { ...values, seed: 2 ** 64 };
  assertEquals(read.fkv_row(new DataView(ring), size.fkv_row), expected);
  const zero = Object.fromEntries(Object.keys(values).map((key) => [key, 0]));
  for (const i of [0, 2])
    assertEquals(read.fkv_row(new DataView(ring), i * size.fkv_row), zero as typeof expected);
  pack.fkv_row({ ...values, seed: 1 }, { into: ring, at: 2 * size.fkv_row });
  assertEquals(read.fkv_row(new DataView(ring), 2 * size.fkv_row).seed, 1);

  const frames = {
    base: 2 ** 52 + 1,
    chunks: { address: 4096 },
    layer: -16,
    frame: 2 ** 40,
    head: 1,
    kv: 2,
    row: 3,
    shift: 4,
  };
  const packed = pack.fkv_prefill_params({ layer: 1, start: 2, n: 3, family: 2, qkv: 16, out: null, frames });
  const back = read.fkv_prefill_params(new DataView(packed), 0);
  assertEquals(back, {
    layer: 1,
    start: 2,
    n: 3,
    family: 2,
    qkv: 16,
    out: 0,
    frames: { ...frames, chunks: 4096 },
  });
  assertEquals(new Uint32Array(packed)[0], size.fkv_prefill_params); // struct_bytes
  const named = pack.fkv_device_info({
    compute_major: 9,
    compute_minor: 0,
    multiprocessors: 1,
    total_bytes: 1,
    free_bytes: 1,
    allocated_bytes: 0,
    pinned_bytes: 0,
    shared_bytes_per_block: 232448,
    l2_bytes: 50 * 2 ** 20,
    max_threads_per_block: 1024,
    warp_size: 32,
    name: "GPU µ",
  });
  assertEquals(read.fkv_device_info(new DataView(named), 0).name, "GPU µ");
});

test("a value that its field cannot hold is refused by name", () => {
  const miss = { page: 0, slot: 0, block: 0, frame: 0 };
  const bad: [RegExp, () => unknown][] = [
    [/fkv_miss\.slot must be an int32, got 2147483648/, () => pack.fkv_miss({ ...miss, slot: 2 ** 31 })],
    [/fkv_miss\.block must be an int32, got 0\.5/, () => pack.fkv_miss({ ...miss, block: 0.5 })],
    [
      /fkv_miss\.frame must be an int32, got undefined/,
      () => pack.fkv_miss({ page: 0, slot: 0, block: 0 } as typeof miss),
    ],
    [
      /fkv_workspace\.scores must be an address.*, got -8/,
      () => pack.fkv_workspace({ scores: -8, raw: 0, n_misses: 0, misses: 0 }),
    ],
  ];
  for (const [text, use] of bad) assertMatch(assertThrows(use, RangeError).message, text);
  assertThrows(() => pack.fkv_miss(miss, { into: new ArrayBuffer(8) }), RangeError);
  assertInstanceOf(pack.fkv_miss(miss), ArrayBuffer);
});
