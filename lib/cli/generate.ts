/// <reference lib="esnext.disposable" preserve="true" />
// freekv generate: a prompt's continuation, as it comes.
import { type Command, InvalidArgumentError } from "commander";
import { FreeKVError } from "../errors.ts";
import { parseGenerateOptions } from "../options.ts";
import { loadTokenizer } from "../tokenizer.ts";
import type { GenerateOptions } from "../types.ts";
import { badInput } from "./failure.ts";
import { addEngineFlags, type EngineFlags, engineOptions, parseCount, parseNumber } from "./flags.ts";
import { readPrompt, readStdin } from "./input.ts";
import { load, prepare, resolved, showProgress } from "./model.ts";
import type { Session } from "./session.ts";
import { reported } from "./stats.ts";

interface GenerateFlags extends EngineFlags {
  model: string;
  prompt?: string;
  promptFile?: string;
  maxTokens?: number;
  temperature?: number;
  topP?: number;
  topK?: number;
  seed?: number;
  stop?: string[];
}

export function addGenerate(program: Command, run: (flags: GenerateFlags) => Promise<void>): void {
  const command = program
    .command("generate")
    .description("Continue a prompt; the text comes on stdout as it is made.")
    .requiredOption("--model <dir>", "Hugging Face folder")
    .option("--prompt <text>", "the prompt; - reads it from stdin")
    .option("--prompt-file <file>", "or a text file that is the prompt")
    .option("--max-tokens <n>", "default: 256", parseCount)
    .option("--temperature <t>", "0 is greedy (default)", parseNumber)
    .option("--top-p <p>", "draw from the likeliest tokens that reach this probability", parseNumber)
    .option("--top-k <k>", "draw from so many of the likeliest tokens", parseCount)
    .option("--stop <text>", "end before this text; may be repeated", collectStop);
  addEngineFlags(command, "of the draws (default: 0)").action(run);
}

export async function generate(flags: GenerateFlags, { out, signal, start }: Session): Promise<void> {
  const sampling = samplingOf(flags);
  if ((flags.prompt === undefined) === (flags.promptFile === undefined)) {
    throw badInput("give the prompt with either --prompt or --prompt-file");
  }
  const model = prepare(flags.model, engineOptions(flags), 1);
  const { maxContext } = model;
  const tokenizer = await loadTokenizer(model.dir);
  const prompt = await readPromptOf(flags, maxContext, signal);
  if (prompt === "") throw badInput("the prompt is empty; give some text");
  const ids = tokenizer.encode(prompt);
  if (ids.length >= maxContext) {
    throw new FreeKVError(
      "CONTEXT_TOO_LONG",
      `the prompt's ${ids.length} tokens leave no room in the context of ${maxContext}; shorten it`,
    );
  }

  await using engine = await load(model, out, signal);
  await start(engine.device, { ...resolved(model), ...sampling });
  using sequence = await engine.prefill(ids, { signal, onProgress: showProgress(out) });
  const generation = sequence.generate({ ...sampling, signal });
  let last = "";
  for await (const { id, text } of generation) {
    await out.record({ id, text });
    if (text === "") continue;
    if (!out.json) await out.text(text);
    last = text;
  }
  if (!last.endsWith("\n")) await out.lines("");

  const { text, finishReason, usage, stats } = await generation.result();
  const { promptTokens, completionTokens } = usage;
  await out.record({
    summary: { text, finishReason, promptTokens, completionTokens, ...reported(stats, model.plan) },
  });
  const pace = stats.tpotMs === null ? "" : ` · ${stats.tpotMs.toFixed(1)} ms a token`;
  out.note(out.dim(`${promptTokens} + ${completionTokens} tokens (${finishReason})${pace}`));
}

function collectStop(text: string, before: readonly string[] = []): string[] {
  if (text === "") throw new InvalidArgumentError("It must not be empty.");
  return [...before, text];
}

function samplingOf(flags: GenerateFlags): GenerateOptions {
  const { maxTokens = 256, temperature = 0, topP = 1, topK = 0, seed = 0, stop = [] } = flags;
  return parseGenerateOptions({ maxTokens, temperature, topP, topK, seed, stop });
}

async function readPromptOf(flags: GenerateFlags, maxContext: number, signal: AbortSignal): Promise<string> {
  if (flags.promptFile !== undefined) return readPrompt("--prompt-file", flags.promptFile, maxContext);
  return flags.prompt === "-" ? readStdin(maxContext, signal) : (flags.prompt ?? "");
}
