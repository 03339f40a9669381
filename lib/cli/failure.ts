// How a command ends when it does not succeed: its exit code, and one line that says why.
import { CommanderError } from "commander";
import { exitCode, FreeKVError } from "../errors.ts";
import { OutputLost } from "./output.ts";

/** The user's signal, as the reason of an abort. */
export class Interrupted extends Error {
  /** 128 + the signal's number, as a shell has it. */
  readonly exit: number;

  constructor(signal: "SIGINT" | "SIGTERM") {
    super(`interrupted by ${signal}`);
    this.name = "Interrupted";
    this.exit = signal === "SIGINT" ? 130 : 143;
  }
}

export interface Failure {
  /** One of FreeKVError's, "OUTPUT_LOST" or "INTERNAL". */
  readonly code: string;
  /** One line. */
  readonly message: string;
  readonly exit: 1 | 2 | 3;
  readonly stack: string | undefined;
}

/** What an error means to whoever called the command. */
export function failureOf(error: unknown): Failure {
  const stack = error instanceof Error ? error.stack : undefined;
  if (error instanceof CommanderError) {
    return { code: "BAD_ARGUMENT", message: oneLine(error.message.replace(/^error: /, "")), exit: 2, stack };
  }
  if (error instanceof OutputLost)
    return { code: "OUTPUT_LOST", message: oneLine(error.message), exit: 3, stack };
  const exit = exitCode(error);
  if (error instanceof FreeKVError && exit !== 1) {
    const message = named(oneLine(error.message), error.detail.option);
    return { code: error.code, message, exit, stack };
  }
  const text = oneLine(error instanceof Error ? error.message : String(error));
  const message = `internal error: ${text}; please report it, with what --debug adds`;
  return { code: error instanceof FreeKVError ? error.code : "INTERNAL", message, exit: 1, stack };
}

/** The line that tells it, with the stack where it was asked for. */
export function failureLine(failure: Failure, how: { json: boolean; debug: boolean }): string {
  const { code, message } = failure;
  const stack = how.debug ? failure.stack : undefined;
  if (how.json)
    return JSON.stringify({ error: stack === undefined ? { code, message } : { code, message, stack } });
  return `freekv: ${message}${stack === undefined ? "" : `\n${stack}`}`;
}

/** A message about an option, with the flag's name: "topP must be above 0" → "--top-p must be above 0". */
function named(message: string, option: unknown): string {
  if (typeof option !== "string" || option === "") return message;
  const key = option.split(".")[0] as string;
  const flag = `--${key.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`;
  return message.startsWith(option) ? flag + message.slice(option.length) : `${flag}: ${message}`;
}

function oneLine(text: string): string {
  return text.trim().replace(/\s*\n\s*/g, " ");
}

/** The user's own mistake, found here. */
export function badInput(message: string, detail: Readonly<Record<string, unknown>> = {}): FreeKVError {
  return new FreeKVError("BAD_ARGUMENT", message, { detail });
}
