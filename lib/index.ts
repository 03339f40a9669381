// The public API of `freekv`.

export { demoModel } from "./demo.ts";
export { Engine } from "./engine.ts";
export { type ErrorCode, FreeKVError } from "./errors.ts";
export { Sequence } from "./sequence.ts";
export type {
  Completion,
  EngineOptions,
  EngineStats,
  GenerateOptions,
  Generation,
  ModelInfo,
  PolicyOptions,
  Progress,
  Prompt,
  Scored,
  Stats,
  TaskOptions,
  Token,
  TokenIds,
  Tokenizer,
} from "./types.ts";
