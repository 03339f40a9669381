// Options at the edge: validated with zod, unknown keys refused by name, defaults filled in, before anything is loaded.
import { z } from "zod";
import { FreeKVError } from "./errors.ts";
import type { EngineOptions, GenerateOptions, PolicyOptions, TaskOptions } from "./types.ts";
import { about, wording } from "./wording.ts";

const whole = (what: string, least: number, most = 2 ** 31 - 1) =>
  z
    .int(`${what} must be a whole number`)
    .min(least, `${what} must be ${least} or more`)
    .max(most, `${what} must be at most ${most}`);
const count = (what: string, most?: number) => whole(what, 0, most);
const positive = (what: string, most?: number) => whole(what, 1, most);
const tau = z.number().min(-1, "tau must be −1 or more").max(1, "tau must be at most 1");

const policyShape = {
  policy: z.enum(["freekv", "retrieve", "quest", "streaming", "full"]).optional(),
  budget: positive("budget").optional(),
  sink: count("sink").optional(),
  window: positive("window").optional(),
  correction: z.enum(["threshold", "exact", "off"]).optional(),
  tau: z.union([tau, z.array(tau)]).optional(),
  speculate: z.boolean().optional(),
  prefetch: count("prefetch").optional(),
};
const taskShape = {
  signal: z.instanceof(AbortSignal).optional(),
  onProgress: z
    .custom<(progress: never) => void>((f) => typeof f === "function", "onProgress must be a function")
    .optional(),
};
const engineShape = {
  device: z
    .string()
    .regex(/^(auto|cpu|cuda|cuda:\d+)$/, "device must be auto, cpu, cuda or cuda:N")
    .optional(),
  kvDtype: z.enum(["bf16", "f16", "f32"]).optional(),
  pageSize: z.literal([16, 32, 64], "page size must be 16, 32 or 64").optional(),
  digest: z.enum(["quest", "arkvale"]).optional(),
  slots: positive("slots").optional(),
  recall: z.enum(["gather", "staged", "fragmented"]).optional(),
  orchestration: z.enum(["captured", "host"]).optional(),
  layout: z.enum(["hnd", "nhd"]).optional(),
  stagingBuffers: positive("stagingBuffers", 4).optional(),
  chain: z.enum(["auto", "split"]).optional(),
  prefillKv: z.enum(["device", "host"]).optional(),
  prefillChunk: positive("prefillChunk", 8192)
    .multipleOf(64, "prefillChunk must be a multiple of 64")
    .optional(),
  numerics: z.enum(["fast", "invariant"]).optional(),
  estimate: z.enum(["freekv", "paper-speed"]).optional(),
  twin: z
    .strictObject({
      scheduleSeed: count("scheduleSeed", Number.MAX_SAFE_INTEGER).optional(),
      linkBytesPerSecond: z.number().min(0).optional(),
      threads: positive("threads").optional(),
    })
    .optional(),
  maxContext: positive("maxContext").optional(),
  maxSequences: positive("maxSequences", 32).optional(),
  hostBytes: positive("hostBytes", Number.MAX_SAFE_INTEGER).optional(),
  libraryPath: z.union([z.string(), z.instanceof(URL)]).optional(),
  debug: z.boolean().optional(),
  plain: z.boolean().optional(),
};
const generateShape = {
  maxTokens: positive("maxTokens").optional(),
  stop: z.union([z.string().min(1), z.array(z.string().min(1))]).optional(),
  stopTokens: z.union([z.array(count("stop token")), z.instanceof(Int32Array)]).optional(),
  ignoreEos: z.boolean().optional(),
  temperature: z.number().min(0, "temperature must be 0 or more").optional(),
  topP: z.number().gt(0, "topP must be above 0").max(1, "topP must be at most 1").optional(),
  topK: count("topK").optional(),
  seed: count("seed", Number.MAX_SAFE_INTEGER).optional(),
  logprobs: count("logprobs", 20).optional(),
  signal: z.instanceof(AbortSignal).optional(),
};

const schemas = {
  engine: z.strictObject({ ...policyShape, ...engineShape, ...taskShape }),
  policy: z.strictObject(policyShape),
  policyAndTask: z.strictObject({ ...policyShape, ...taskShape }),
  generate: z.strictObject(generateShape),
  policyAndGenerate: z.strictObject({ ...policyShape, ...generateShape }),
};

function parse<T>(schema: z.ZodType, value: unknown): T {
  const result = schema.safeParse(value ?? {}, { error: wording });
  if (result.success) return result.data as T;
  const issue = result.error.issues[0];
  const path = issue?.path.join(".") ?? "";
  const text =
    issue?.code === "unrecognized_keys"
      ? about(path, `there is no option ${issue.keys.join(", ")}; check the spelling`)
      : about(path === "" ? "the options" : path, issue?.message ?? "must be others");
  throw new FreeKVError("BAD_ARGUMENT", text, { detail: { option: path } });
}

export const parseEngineOptions = (value: unknown): EngineOptions => parse(schemas.engine, value);
export const parsePolicyOptions = (value: unknown): PolicyOptions => parse(schemas.policy, value);
export const parsePolicyAndTask = (value: unknown): PolicyOptions & TaskOptions =>
  parse(schemas.policyAndTask, value);
export const parseGenerateOptions = (value: unknown): GenerateOptions => parse(schemas.generate, value);
export const parsePolicyAndGenerate = (value: unknown): PolicyOptions & GenerateOptions =>
  parse(schemas.policyAndGenerate, value);

/** A sequence's policy with nothing left out. */
export type Policy = { [K in keyof Required<PolicyOptions>]: Exclude<PolicyOptions[K], undefined> };

export const defaultPolicy: Policy = {
  policy: "freekv",
  budget: 2048,
  sink: 512,
  window: 512,
  correction: "threshold",
  tau: 0.8,
  speculate: true,
  prefetch: 0,
};

/** `over` on top of `base`, checked against the page size and the number of layers. */
export function resolvePolicy(base: Policy, over: PolicyOptions, pageSize: number, layers: number): Policy {
  const merged = { ...base } as Record<keyof Policy, unknown>;
  for (const key of Object.keys(base) as (keyof Policy)[])
    if (over[key] !== undefined) merged[key] = over[key];
  const p = merged as Policy;
  const bad = (message: string): never => {
    throw new FreeKVError("BAD_ARGUMENT", message, {
      detail: { budget: p.budget, sink: p.sink, window: p.window, pageSize },
    });
  };
  for (const key of ["budget", "sink", "window"] as const) {
    if (p[key] % pageSize === 0) continue;
    const below = Math.floor(p[key] / pageSize) * pageSize;
    const near = below > 0 || key === "sink" ? `${below} or ${below + pageSize}` : `${below + pageSize}`;
    bad(`${key} ${p[key]} is not a multiple of the page size ${pageSize}; give ${near}`);
  }
  if (p.budget < p.sink + p.window + pageSize)
    bad(
      `budget ${p.budget} is smaller than sink ${p.sink} + window ${p.window} + one page of ${pageSize}; ` +
        `raise --budget to at least ${p.sink + p.window + pageSize} or lower --sink or --window`,
    );
  if (typeof p.tau !== "number" && p.tau.length !== layers)
    bad(
      `tau has ${p.tau.length} values, but the model has ${layers} layers; give one number or one per layer`,
    );
  return p;
}
