/// <reference lib="esnext.disposable" preserve="true" />
// A model folder and the options for it, checked before anything is loaded; then loaded.
import { basename, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { folderPath, type ModelConfig } from "../checkpoint.ts";
import { demoModel } from "../demo.ts";
import { Engine, resolveEngine } from "../engine.ts";
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
  readonly options: EngineOptions;
  readonly policy: Policy;
  readonly plan: Plan;
}

/** Errors: BAD_ARGUMENT, BAD_CHECKPOINT, UNSUPPORTED_MODEL. */
export function prepare(dir: string | URL, options: EngineOptions): Prepared {
  if (dir === "") throw badInput("--model is empty; give a Hugging Face folder");
  const path = resolve(folderPath(dir));
  using checkpoint = openCheckpoint(path);
  const { config } = checkpoint;
  const { policy, core } = resolveEngine(config, options);
  const pageSize = options.pageSize ?? 32;
  return {
    dir: path,
    name: path === resolve(fileURLToPath(demoModel)) ? "needle model" : basename(path),
    config,
    parameters: checkpoint.bytes / dtypeBytes(config.dtype),
    options,
    policy,
    plan: planOf(policy, pageSize, Math.ceil(core.maxContext / pageSize), options.slots),
  };
}

/** Loads it, with its progress shown. Errors: those of Engine.load. */
export function load(model: Prepared, sequences: number, out: Output, signal: AbortSignal): Promise<Engine> {
  const options = { ...model.options, maxSequences: sequences, signal, onProgress: showProgress(out) };
  return Engine.load(model.dir, options);
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
  /** null: the policy has none. */
  readonly slots: number | null;
  readonly recall: string;
  readonly orchestration: string;
  /** null: by the memory that is free. */
  readonly hostBytes: number | null;
  readonly maxContext: number;
}

export function resolved(model: Prepared): Resolved {
  const { options, policy, plan, config } = model;
  const recall = options.recall ?? "gather";
  return {
    model: model.dir,
    ...policy,
    kvDtype: options.kvDtype ?? config.dtype,
    pageSize: options.pageSize ?? 32,
    digest: options.digest ?? "quest",
    slots: plan.slots > 0 ? plan.slots : null,
    recall,
    orchestration: options.orchestration ?? (recall === "gather" ? "captured" : "host"),
    hostBytes: options.hostBytes ?? null,
    maxContext: options.maxContext ?? config.contextLength,
  };
}
