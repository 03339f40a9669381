// The tests rest on these assertions, so that they fail when they should is itself tested.

import { test } from "node:test";
import * as a from "@std/assert";

const fails = (fn: () => unknown, text?: string): void => {
  let error: unknown;
  try {
    fn();
  } catch (thrown) {
    error = thrown;
  }
  if (!(error instanceof a.AssertionError)) throw new Error(`this did not fail: ${fn}`);
  if (text !== undefined && !error.message.includes(text))
    throw new Error(`"${error.message}" lacks "${text}"`);
};

test("assertEquals compares deeply and names the first difference", () => {
  const made = { rows: [1, Number.NaN, new Float32Array([1, 2])], by: new Map([["k", new Set([{ x: 1 }])]]) };
  a.assertEquals(made, structuredClone(made));
  a.assertEquals<unknown>(0, -0);
  a.assertEquals(new Error("x"), new Error("x"));
  fails(() => a.assertEquals<unknown>(made, { ...made, rows: [1, 2, 3] }), "at .rows[1]");
  fails(() => a.assertEquals(new Float32Array([1, 2]), new Float32Array([1, 3])), "at [1]");
  fails(() => a.assertEquals<unknown>(new Float32Array([1]), new Float64Array([1])));
  fails(() => a.assertEquals<unknown>([1], [1, undefined]), "at .length");
  fails(() => a.assertEquals<unknown>({}, { x: undefined }), "at .x");
  fails(() => a.assertEquals<unknown>({}, []));
  fails(() => a.assertEquals(new Map([[1, 2]]), new Map([[1, 3]])));
  fails(() => a.assertEquals(new Set([1]), new Set([2])));
  fails(() => a.assertEquals(new Error("x"), new Error("y")));
  fails(() => a.assertEquals<unknown>("1", 1));
  fails(() => a.assertNotEquals({ x: [1] }, { x: [1] }));
});

test("comparisons of numbers fail on NaN", () => {
  a.assertAlmostEquals(1, 1.05, 0.1);
  fails(() => a.assertAlmostEquals(1, 1.2, 0.1));
  fails(() => a.assertAlmostEquals(1, 1 + 1e-6));
  for (const compare of [a.assertAlmostEquals, a.assertLess<number>, a.assertGreater<number>]) {
    fails(() => compare(Number.NaN, 1));
  }
  fails(() => a.assertStrictEquals(0, -0));
  fails(() => a.assertGreaterOrEqual(1, 2));
});

test("assertThrows and assertRejects want the right error", async () => {
  const boom = (): never => {
    throw new TypeError("boom at 3");
  };
  a.assertStrictEquals(a.assertThrows(boom, TypeError, "boom").message, "boom at 3");
  fails(() => a.assertThrows(() => 1));
  fails(() => a.assertThrows(boom, RangeError));
  fails(() => a.assertThrows(boom, TypeError, "bang"));
  await a.assertRejects(async () => boom(), TypeError, "boom");
  await a.assertRejects(() => a.assertRejects(async () => 1), a.AssertionError);
  await a.assertRejects(() => a.assertRejects(boom), a.AssertionError, "but the function threw");
});

test("the small assertions fail when they should", () => {
  fails(() => a.assert(0, "why"), "why");
  fails(() => a.assertFalse(1));
  fails(() => a.assertExists(null));
  fails(() => a.assertMatch("abc", /d/));
  fails(() => a.assertNotMatch("abc", /b/));
  fails(() => a.assertStringIncludes("abc", "d"));
  fails(() => a.assertArrayIncludes([{ x: 1 }], [{ x: 2 }]));
  fails(() => a.assertInstanceOf(1, Error));
  fails(() => a.fail("here"), "here");
});
