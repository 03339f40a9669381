// A small subset of JSR's @std/assert, written for this repository's tests under that name, because the package is
// not on npm. What is here behaves as theirs does (numbers: NaN equals NaN, 0 equals -0; prototypes count); the
// text of a failure is our own, and names the first place that differs.

import { inspect } from "node:util";

export class AssertionError extends Error {
  constructor(message, options) {
    super(message, options);
    this.name = "AssertionError";
  }
}

const show = (value) => inspect(value, { depth: 6, maxArrayLength: 32, breakLength: 100 });

function raise(text, msg) {
  throw new AssertionError(msg === undefined ? text : `${text}: ${msg}`);
}

/** Where a and b first differ ("" for the values themselves, ".rows[3]" deeper), or undefined where they are equal. */
function difference(a, b, path = "", seen = new Map()) {
  if (Object.is(a, b) || a === b) return undefined;
  if (typeof a !== "object" || typeof b !== "object" || a === null || b === null) return path;
  if (Object.getPrototypeOf(a) !== Object.getPrototypeOf(b)) {
    // A null prototype passes for a plain object's.
    const plain = (x) => [null, Object.prototype].includes(Object.getPrototypeOf(x));
    if (!plain(a) || !plain(b)) return path;
  }
  if (seen.get(a) === b) return undefined;
  seen.set(a, b);
  if (a instanceof Date) return Object.is(a.getTime(), b.getTime()) ? undefined : path;
  if (a instanceof RegExp || a instanceof URL) return String(a) === String(b) ? undefined : path;
  if (a instanceof ArrayBuffer) return difference(new Uint8Array(a), new Uint8Array(b), path, seen);
  if (a instanceof DataView) return difference(bytesOf(a), bytesOf(b), path, seen);
  if (a instanceof Map) return difference([...a.entries()].sort(), [...b.entries()].sort(), path, seen);
  if (a instanceof Set) {
    const alike = (x) => [...b].some((y) => difference(x, y) === undefined);
    return a.size === b.size && [...a].every(alike) ? undefined : path;
  }
  if (Array.isArray(a) || ArrayBuffer.isView(a)) {
    if (a.length !== b.length) return `${path}.length`;
    for (let i = 0; i < a.length; i++) {
      if (Object.is(a[i], b[i])) continue; // tensors are long, and paths are strings
      const found = difference(a[i], b[i], `${path}[${i}]`, seen);
      if (found !== undefined) return found;
    }
    return undefined;
  }
  if (a instanceof Error && (a.message !== b.message || a.name !== b.name)) return `${path}.message`;
  const keysOf = (x) =>
    Reflect.ownKeys(x).filter((key) => Object.prototype.propertyIsEnumerable.call(x, key));
  for (const key of new Set([...keysOf(a), ...keysOf(b)])) {
    const here = typeof key === "symbol" ? `${path}[${String(key)}]` : `${path}.${key}`;
    // An absent key and an undefined value differ.
    if (Object.hasOwn(a, key) !== Object.hasOwn(b, key)) return here;
    const found = difference(a[key], b[key], here, seen);
    if (found !== undefined) return found;
  }
  return undefined;
}

const bytesOf = (view) => new Uint8Array(view.buffer, view.byteOffset, view.byteLength);

export const equal = (a, b) => difference(a, b) === undefined;

export function assert(expr, msg = "") {
  if (!expr) throw new AssertionError(msg);
}

export function assertFalse(expr, msg) {
  if (expr) raise(`expected a falsy value, got ${show(expr)}`, msg);
}

export function assertEquals(actual, expected, msg) {
  const where = difference(actual, expected);
  if (where === undefined) return;
  const place = where === "" ? "" : `, first at ${where}`;
  raise(`values are not equal${place}\nactual:   ${show(actual)}\nexpected: ${show(expected)}\n`, msg);
}

export function assertNotEquals(actual, expected, msg) {
  if (equal(actual, expected)) raise(`expected a value other than ${show(expected)}`, msg);
}

export function assertStrictEquals(actual, expected, msg) {
  if (!Object.is(actual, expected)) {
    raise(`values are not the same\nactual:   ${show(actual)}\nexpected: ${show(expected)}\n`, msg);
  }
}

export function assertNotStrictEquals(actual, expected, msg) {
  if (Object.is(actual, expected)) raise(`expected anything but ${show(expected)}`, msg);
}

export function assertAlmostEquals(actual, expected, tolerance, msg) {
  if (Object.is(actual, expected)) return;
  const within = tolerance ?? (Number.isFinite(expected) ? Math.abs(expected * 1e-7) : 1e-7);
  // Not `delta > within`: a NaN must fail.
  if (!(Math.abs(expected - actual) <= within)) {
    raise(`expected ${actual} to be within ${within} of ${expected}`, msg);
  }
}

export function assertExists(actual, msg) {
  if (actual === undefined || actual === null) raise(`expected a value, got ${actual}`, msg);
}

export function assertGreater(actual, expected, msg) {
  if (!(actual > expected)) raise(`expected ${show(actual)} > ${show(expected)}`, msg);
}

export function assertGreaterOrEqual(actual, expected, msg) {
  if (!(actual >= expected)) raise(`expected ${show(actual)} >= ${show(expected)}`, msg);
}

export function assertLess(actual, expected, msg) {
  if (!(actual < expected)) raise(`expected ${show(actual)} < ${show(expected)}`, msg);
}

export function assertLessOrEqual(actual, expected, msg) {
  if (!(actual <= expected)) raise(`expected ${show(actual)} <= ${show(expected)}`, msg);
}

export function assertStringIncludes(actual, expected, msg) {
  if (!actual.includes(expected)) raise(`expected ${show(actual)} to contain ${show(expected)}`, msg);
}

export function assertMatch(actual, expected, msg) {
  if (!expected.test(actual)) raise(`expected ${show(actual)} to match ${expected}`, msg);
}

export function assertNotMatch(actual, expected, msg) {
  if (expected.test(actual)) raise(`expected ${show(actual)} not to match ${expected}`, msg);
}

export function assertArrayIncludes(actual, expected, msg) {
  const absent = Array.from(expected).filter(
    (each) => !Array.from(actual).some((other) => equal(each, other)),
  );
  if (absent.length > 0) raise(`expected ${show(actual)} to include ${show(absent)}`, msg);
}

export function assertInstanceOf(actual, expected, msg) {
  if (!(actual instanceof expected))
    raise(`expected an instance of ${expected.name}, got ${show(actual)}`, msg);
}

export function assertIsError(error, ErrorClass = Error, msgMatches, msg) {
  assertInstanceOf(error, ErrorClass, msg);
  if (typeof msgMatches === "string") assertStringIncludes(error.message, msgMatches, msg);
  if (msgMatches instanceof RegExp) assertMatch(error.message, msgMatches, msg);
}

/** The trailing arguments of assertThrows and assertRejects: (ErrorClass?, msgIncludes?, msg?) or (msg?). */
function checkThrown(error, [first, msgIncludes, msg]) {
  if (typeof first === "function") assertIsError(error, first, msgIncludes, msg);
  return error;
}

const lastMessage = (rest) => (typeof rest[0] === "function" ? rest[2] : rest[0]);

export function assertThrows(fn, ...rest) {
  try {
    fn();
  } catch (error) {
    return checkThrown(error, rest);
  }
  return raise("expected the function to throw", lastMessage(rest));
}

export async function assertRejects(fn, ...rest) {
  let promise;
  try {
    promise = fn();
  } catch (error) {
    return raise(`expected a rejected promise, but the function threw ${show(error)}`, lastMessage(rest));
  }
  try {
    await promise;
  } catch (error) {
    return checkThrown(error, rest);
  }
  return raise("expected the promise to be rejected", lastMessage(rest));
}

export function fail(msg) {
  return raise("failed", msg);
}

export function unreachable(msg) {
  return raise("this was to be unreachable", msg);
}
