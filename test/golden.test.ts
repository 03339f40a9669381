// The float64 reference against transformers. Whatever is tested against the reference stands on this.

import { test } from "node:test";
import { assert, assertEquals, assertGreater, assertLess } from "@std/assert";
import { readConfig } from "../lib/checkpoint.ts";
import { goldens } from "./golden.ts";
import { referenceLogprobs } from "./reference/model.ts";

const cases = goldens();

/** Largest distance; infinite where either has something that is no finite number. */
function distance(a: ArrayLike<number>, b: ArrayLike<number>): number {
  let most = a.length === b.length ? 0 : Infinity;
  for (let i = 0; i < a.length; i++) {
    const d = Math.abs((a[i] ?? NaN) - (b[i] ?? NaN));
    most = Number.isNaN(d) ? Infinity : Math.max(most, d);
  }
  return most;
}

test("there is a golden checkpoint of each kind", () => {
  assertEquals(
    cases.map((each) => each.name),
    ["linear-bf16", "llama", "llama3-rope", "qwen2", "qwen3", "yarn"],
  );
});

for (const golden of cases) {
  test(`${golden.name}: log-probabilities are transformers'`, { timeout: 30_000 }, () => {
    const ours = referenceLogprobs(golden.dir, golden.tokens);
    assertLess(distance(ours, golden.logprobs), 1e-5);

    const argmaxes = new Set<number>();
    for (let row = 0; row < golden.tokens.length; row++) {
      const values = golden.logprobs.subarray(row * golden.vocab, (row + 1) * golden.vocab);
      argmaxes.add(values.indexOf(Math.max(...values)));
      assertLess(Math.abs(values.reduce((sum, value) => sum + Math.exp(value), 0) - 1), 1e-4);
    }
    assertGreater(argmaxes.size, 5, "one token wins nearly everywhere: the checkpoint proves little");
  });

  test(`${golden.name}: rope frequencies and scale are transformers'`, () => {
    const { rope } = readConfig(golden.dir);
    const relative = rope.invFreq.map((value, i) => value / (golden.rope.invFreq[i] ?? NaN) - 1);
    assertEquals(rope.invFreq.length, golden.rope.invFreq.length);
    assert(relative.every((error) => Math.abs(error) < 1e-12));
    assertLess(Math.abs(rope.scale - golden.rope.scale), 1e-12);
  });
}
