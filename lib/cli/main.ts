// The command line: what it says is parsed, its command run, and any error becomes an exit code and one line.
import { Command, CommanderError } from "commander";
import { addDemo, demo } from "./demo.ts";
import { addDoctor, doctor } from "./doctor.ts";
import { badInput, failureLine, failureOf, Interrupted } from "./failure.ts";
import { addGenerate, generate } from "./generate.ts";
import { Output, ReaderGone } from "./output.ts";
import { addScore, score } from "./score.ts";
import type { Session } from "./session.ts";
import { version } from "./version.ts";

/** Runs a command line. Resolves with the exit code: 0 done, 2 your input, 3 this machine, 1 our fault, 130 and 143 signals. */
export async function main(args: readonly string[]): Promise<number> {
  const has = (flag: string): boolean => args.includes(flag);
  const out = new Output({ json: has("--json"), quiet: has("--quiet") });
  const { signal, release } = catchSignals();
  try {
    await run(args, out, signal);
    return 0;
  } catch (error) {
    if (error instanceof ReaderGone) return 0;
    out.clearStatus();
    // Whatever an abort made fail, the abort is what happened.
    if (signal.aborted) return (signal.reason as Interrupted).exit;
    const failure = failureOf(error);
    await out.error(failureLine(failure, { json: out.json, debug: has("--debug") }));
    return failure.exit;
  } finally {
    out.clearStatus();
    release();
  }
}

async function run(args: readonly string[], out: Output, signal: AbortSignal): Promise<void> {
  let told = ""; // help and version
  const program = new Command("freekv")
    .description("Long-context inference: all KV pages in host memory, a fixed budget on the device.")
    .version(version())
    .exitOverride()
    .configureOutput({
      writeOut: (text) => {
        told += text;
      },
      writeErr: () => {},
    });
  const session: Session = {
    out,
    signal,
    start: (device, options) => out.record({ start: { version: version(), device, ...options } }),
  };
  const running =
    <F>(command: (flags: F, session: Session) => Promise<void>) =>
    (flags: F): Promise<void> =>
      command(flags, session);
  addDemo(program, running(demo));
  addGenerate(program, running(generate));
  addScore(program, running(score));
  addDoctor(program, running(doctor));

  const names = program.commands.map((command) => command.name());
  const word = args[0];
  if (word !== undefined && !word.startsWith("-") && word !== "help" && !names.includes(word)) {
    throw badInput(`there is no command "${word}"; the commands are ${names.join(", ")}`);
  }
  try {
    await program.parseAsync(args, { from: "user" });
  } catch (error) {
    if (!(error instanceof CommanderError) || error.exitCode !== 0) throw error;
    await out.text(told);
  }
}

/** The first signal aborts, so that what runs can end cleanly; the second one ends the process. */
function catchSignals(): { signal: AbortSignal; release: () => void } {
  const controller = new AbortController();
  const handlers = (["SIGINT", "SIGTERM"] as const).map((name) => {
    const handler = (): void => {
      const reason = new Interrupted(name);
      if (controller.signal.aborted) process.exit(reason.exit);
      controller.abort(reason);
    };
    process.on(name, handler);
    return { name, handler };
  });
  return {
    signal: controller.signal,
    release: () => {
      for (const { name, handler } of handlers) process.off(name, handler);
    },
  };
}
