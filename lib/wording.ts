// What a schema wants of a value, in our words: zod's own are for whoever wrote the schema.
import type { z } from "zod";

type Raw = z.core.$ZodRawIssue;

const kinds: Readonly<Record<string, string>> = {
  int: "a whole number",
  number: "a number",
  string: "a text",
  boolean: "true or false",
  array: "a list",
  tuple: "a list",
  object: "an object",
  record: "an object",
};

/** The `error` of a parse. A message that the schema has of its own comes first. */
export function wording(issue: Raw): string {
  if (issue.code === "unrecognized_keys") return `there is no ${quoted(issue.keys as readonly string[])}`;
  const { input } = issue;
  if (input === undefined) return `is missing; it must be ${wanted(issue)}`;
  return `must be ${wanted(issue)}, not ${shown(input)}`;
}

function wanted(issue: Raw): string {
  switch (issue.code) {
    case "invalid_type":
      return kinds[issue.expected as string] ?? `of type ${issue.expected}`;
    case "invalid_value":
      return alternatives((issue.values as readonly unknown[]).map((value) => JSON.stringify(value)));
    case "too_small":
      if (issue.origin === "array" || issue.origin === "string") return `of length ${issue.minimum} or more`;
      return issue.inclusive ? `${issue.minimum} or more` : `above ${issue.minimum}`;
    case "too_big":
      if (issue.origin === "array" || issue.origin === "string") return `of length ${issue.maximum} or less`;
      return issue.inclusive ? `at most ${issue.maximum}` : `below ${issue.maximum}`;
    case "invalid_union": {
      const each = (issue.errors as readonly (readonly Raw[])[]).flatMap((tried) => tried.slice(0, 1));
      return each.length > 0 ? alternatives([...new Set(each.map(wanted))]) : "of a known kind";
    }
    default:
      return "of another form";
  }
}

/** ["a", "b", "c"] → "a, b or c". */
function alternatives(all: readonly string[]): string {
  return all.length < 2 ? (all[0] ?? "something else") : `${all.slice(0, -1).join(", ")} or ${all.at(-1)}`;
}

function shown(value: unknown): string {
  if (Array.isArray(value)) return value.length === 0 ? "an empty list" : "a list";
  if (typeof value === "object" && value !== null) return "an object";
  if (typeof value === "function") return "a function";
  const text = typeof value === "string" ? JSON.stringify(value) : String(value);
  return text.length > 40 ? `${text.slice(0, 39)}…` : text;
}

const quoted = (names: readonly string[]): string => names.map((name) => JSON.stringify(name)).join(", ");

/** What is wrong, with the key that it is about: "tau" and "must be a number, not …" make one sentence. */
export function about(key: string, text: string): string {
  if (key === "" || text.startsWith(key)) return text;
  return /^(must|is) /.test(text) ? `${key} ${text}` : `${key}: ${text}`;
}
