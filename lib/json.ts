import { readFileSync, statSync } from "node:fs";
import { basename, dirname } from "node:path";
import type { z } from "zod";
import { FreeKVError } from "./errors.ts";
import { about, wording } from "./wording.ts";

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
  const result = schema.safeParse(value, { error: wording });
  if (result.success) return result.data;
  const issue = result.error.issues[0];
  const problem = about(issue?.path.join(".") ?? "", issue?.message ?? "is not as it must be");
  throw badFile(path, `${problem}; mend the file or fetch it again`, result.error);
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
  if (statSync(folder, { throwIfNoEntry: false })?.isFile())
    throw badFile(folder, `is a file; give the folder that it is in: ${dirname(folder)}`);
  throw badFile(folder, `has no ${basename(path)}; give a Hugging Face model folder`);
}
