/// <reference lib="esnext.disposable" preserve="true" />
// A model folder and the options for it, checked before anything is loaded; then loaded.
import { basename, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { folderPath, type ModelConfig } from "../checkpoint.ts";
import { demoModel } from "../demo.ts";
import { Engine, resolveEngine } from "../engine.ts";
import { FreeKVError } from "../errors.ts";
import { dtypeBytes } from "../float.ts";
import type { Policy } from "../options.ts";
import { type Plan, planOf } from "../plan.ts";
import type { EngineOptions, Progress } from "../types.ts";
import { openCheckpoint } from "../weights.ts";
import { badInput } from "./failure.ts";
import { type Output, thousands } from "./output.ts";

export interface Prepared {
  readonly dir: string;
  readonly name: string;
  readonly config: ModelConfig;
  readonly parameters: number;
  /** With the values that depend on this machine now. */
  readonly options: EngineOptions & { readonly hostBytes: number; readonly maxSequences: number };
  /** Tokens of the longest sequence. */
  readonly maxContext: number;
  readonly policy: Policy;
  readonly plan: Plan;
}

/** For `sequences` sequences alive at once. Errors: BAD_ARGUMENT, BAD_CHECKPOINT, UNSUPPORTED_MODEL. */
export function prepare(dir: string | URL, options: EngineOptions, sequences: number): Prepared {
  if (dir === "") throw badInput("--model is empty; give a Hugging Face folder");
  const path = resolve(folderPath(dir));
  using checkpoint = openCheckpoint(path);
  const { config } = checkpoint;
  const { maxContext: asked = config.contextLength } = options;
  if (asked > config.contextLength)
    throw badInput(
      `--max-context ${asked} is over the model's context of ${config.contextLength}; give at most that`,
    );
  const { policy, core } = resolveEngine(config, options);
  const { maxContext, hostBytes } = core;
  const pageSize = options.pageSize ?? 32;
  return {
    dir: path,
    name: path === resolve(fileURLToPath(demoModel)) ? "needle model" : basename(path),
    config,
    parameters: checkpoint.bytes / dtypeBytes(config.dtype),
    options: { ...options, hostBytes, maxSequences: sequences },
    maxContext,
    policy,
    plan: planOf(policy, pageSize, Math.ceil(maxContext / pageSize), options.slots),
  };
}

/** Loads it, with its progress shown. Errors: those of Engine.load. */
export async function load(model: Prepared, out: Output, signal: AbortSignal): Promise<Engine> {
  try {
    return await Engine.load(model.dir, { ...model.options, signal, onProgress: showProgress(out) });
  } catch (error) {
    if (!(error instanceof FreeKVError && error.code === "OUT_OF_MEMORY")) throw error;
    const hint = `a context of ${thousands(model.maxContext)} tokens may be more than fits: --max-context lowers it`;
    throw new FreeKVError(error.code, `${error.message}; ${hint}`, {
      call: error.call,
      detail: error.detail,
      cause: error,
    });
  }
}

export function showProgress(out: Output): (progress: Progress) => void {
  return ({ phase, done, total, unit }) => {
    const share =
      unit === "tokens" ? `${thousands(done)} of ${thousands(total)} tokens` : `${percent(done, total)}%`;
    out.status(`${phase} ${share}`);
  };
}

const percent = (done: number, total: number): number => (total > 0 ? Math.floor((100 * done) / total) : 100);

/** The options as they hold, nothing left open. */
export interface Resolved extends Policy {
  readonly model: string;
  readonly kvDtype: string;
  readonly pageSize: number;
  readonly digest: string;
  /** null: three times what each sequence selects. */
  readonly slots: number | null;
  readonly recall: string;
  readonly orchestration: string;
  readonly layout: string;
  readonly stagingBuffers: number;
  readonly chain: string;
  readonly prefillKv: string;
  /** null: by the device. */
  readonly prefillChunk: number | null;
  readonly numerics: string;
  readonly estimate: string;
  readonly maxContext: number;
  readonly maxSequences: number;
  readonly hostBytes: number;
  /** null: searched for. */
  readonly libraryPath: string | null;
  readonly debug: boolean;
}

export function resolved(model: Prepared): Resolved {
  const { options, policy, config, maxContext } = model;
  const { recall = "gather", estimate = "freekv", libraryPath } = options;
  return {
    model: model.dir,
    ...policy,
    kvDtype: options.kvDtype ?? config.dtype,
    pageSize: options.pageSize ?? 32,
    digest: options.digest ?? (estimate === "paper-speed" ? "arkvale" : "quest"),
    slots: options.slots ?? null,
    recall,
    orchestration: options.orchestration ?? (recall === "gather" ? "captured" : "host"),
    layout: options.layout ?? "hnd",
    stagingBuffers: options.stagingBuffers ?? 2,
    chain: options.chain ?? "auto",
    prefillKv: options.prefillKv ?? "device",
    prefillChunk: options.prefillChunk ?? null,
    numerics: options.numerics ?? "fast",
    estimate,
    maxContext,
    maxSequences: options.maxSequences,
    hostBytes: options.hostBytes,
    libraryPath: libraryPath === undefined ? null : String(libraryPath),
    debug: options.debug ?? false,
  };
}
