import { readFileSync } from "node:fs";
import { basename, dirname } from "node:path";
import type { z } from "zod";
import { FreeKVError } from "./errors.ts";

/** Whether `error` says that a file, or the folder it should be in, does not exist. */
export function isMissing(error: unknown): boolean {
  const code = error instanceof Error && "code" in error ? error.code : undefined;
  return code === "ENOENT" || code === "ENOTDIR";
}

/** A file of a checkpoint that is not as it must be. */
export function badFile(path: string, problem: string, cause?: unknown): FreeKVError {
  return new FreeKVError("BAD_CHECKPOINT", `${path}: ${problem}`, { detail: { path }, cause });
}

/** `value`, or BAD_CHECKPOINT that names the first key that is not as `schema` says. */
export function check<S extends z.ZodType>(schema: S, value: unknown, path: string): z.output<S> {
  const result = schema.safeParse(value);
  if (result.success) return result.data;
  const issue = result.error.issues[0];
  const key = issue?.path.join(".") ?? "";
  throw badFile(path, `${key === "" ? "" : `${key}: `}${issue?.message ?? "not as expected"}`, result.error);
}

/** The JSON file at `path` as `schema` has it; undefined where there is no such file. */
export function readJson<S extends z.ZodType>(path: string, schema: S): z.output<S> | undefined {
  let text: string;
  try {
    text = readFileSync(path, "utf8");
  } catch (error) {
    if (isMissing(error)) return undefined;
    throw badFile(path, "cannot be read", error);
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw badFile(path, "is not JSON; it may be cut short", error);
  }
  return check(schema, value, path);
}

/** The same, of a file without which the folder is no checkpoint. */
export function readJsonRequired<S extends z.ZodType>(path: string, schema: S): z.output<S> {
  const value = readJson(path, schema);
  if (value !== undefined) return value;
  const folder = dirname(path);
  throw badFile(folder, `has no ${basename(path)}; give a Hugging Face model folder`);
}
