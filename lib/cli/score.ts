/// <reference lib="esnext.disposable" preserve="true" />
// freekv score: log-probabilities of given tokens through the decode path.
import type { Command } from "commander";
import { badInput } from "./failure.ts";
import { addEngineFlags, type EngineFlags, engineOptions, parseCount } from "./flags.ts";
import { readTokens } from "./input.ts";
import { load, prepare, resolved, showProgress } from "./model.ts";
import type { Session } from "./session.ts";
import { reported } from "./stats.ts";

interface ScoreFlags extends EngineFlags {
  model: string;
  tokensFile: string;
  prefill: number;
}

export function addScore(program: Command, run: (flags: ScoreFlags) => Promise<void>): void {
  const command = program
    .command("score")
    .description("Log-probabilities of a file's tokens, each decoded under the policy. Needs no tokenizer.")
    .requiredOption("--model <dir>", "Hugging Face folder")
    .requiredOption("--tokens-file <file>", "token ids: a JSON array, or numbers with white space between")
    .requiredOption("--prefill <n>", "how many of them are the prompt: 1 up to all but one", parseCount);
  addEngineFlags(command, "accepted as everywhere; nothing is drawn here").action(run);
}

/** Prints positions prefill … count − 2: position i's log-probability of token i + 1, and the token it would have chosen. */
export async function score(flags: ScoreFlags, { out, signal, start }: Session): Promise<void> {
  const model = prepare(flags.model, engineOptions(flags), 1);
  const ids = readTokens("--tokens-file", flags.tokensFile, model.config.vocab, model.maxContext);
  const { prefill } = flags;
  if (ids.length < 2) {
    throw badInput(`--tokens-file ${flags.tokensFile} holds ${ids.length} token ids; at least 2 are needed`);
  }
  if (prefill < 1 || prefill >= ids.length) {
    throw badInput(`--prefill ${prefill}: the file has ${ids.length} tokens; give 1 to ${ids.length - 1}`);
  }

  await using engine = await load(model, out, signal);
  await start(engine.device, {
    ...resolved(model),
    tokensFile: flags.tokensFile,
    prefill,
    seed: flags.seed ?? null,
  });
  using sequence = await engine.prefill(ids.slice(0, prefill), { signal, onProgress: showProgress(out) });
  await out.lines(out.bold("position      next     logprob    argmax"));
  let steps = 0;
  let spentMs = 0;
  let from = performance.now();
  for await (const { position, next, logprob, argmax } of sequence.score(ids.slice(prefill), { signal })) {
    spentMs += performance.now() - from;
    steps++;
    await out.record({ position, next, logprob, argmax });
    const columns = [String(position).padStart(8), String(next).padStart(8), logprob.toFixed(6).padStart(10)];
    await out.lines(`${columns.join("  ")}  ${String(argmax).padStart(8)}`);
    from = performance.now();
  }
  const tpotMs = steps > 0 ? spentMs / steps : null;
  await out.record({ summary: { ...reported(sequence.stats(), model.plan), tpotMs } });
}
