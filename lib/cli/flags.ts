// The flags that commands share, in one table: each is the kebab-case of its option in EngineOptions.
import { type Command, InvalidArgumentError, Option } from "commander";
import { parseEngineOptions } from "../options.ts";
import type { EngineOptions } from "../types.ts";

type Parse = (text: string) => unknown;

interface Flag {
  readonly key: keyof EngineOptions;
  readonly flags: string;
  readonly text: string;
  readonly choices?: readonly string[];
  readonly parse?: Parse;
}

/** A whole number of 0 or more. */
export function parseCount(text: string): number {
  const value = /^\d+$/.test(text) ? Number(text) : Number.NaN;
  if (!Number.isSafeInteger(value)) throw new InvalidArgumentError("It must be a whole number.");
  return value;
}

export function parseNumber(text: string): number {
  const value = text.trim() === "" ? Number.NaN : Number(text);
  if (!Number.isFinite(value)) throw new InvalidArgumentError("It must be a number.");
  return value;
}

function parseTau(text: string): number | number[] {
  const values = text.split(",").map(parseNumber);
  return values.length === 1 ? (values[0] as number) : values;
}

const deviceFlags: readonly Flag[] = [
  { key: "device", flags: "--device <name>", text: "auto, cpu (the twin), cuda or cuda:N (default: auto)" },
  {
    key: "libraryPath",
    flags: "--library-path <file>",
    text: "native library to load, instead of searching",
  },
];

const engineFlags: readonly Flag[] = [
  {
    key: "policy",
    flags: "--policy <name>",
    text: "which pages a decode step attends to (default: freekv)",
    choices: ["freekv", "retrieve", "quest", "streaming", "full"],
  },
  {
    key: "budget",
    flags: "--budget <tokens>",
    text: "per KV head on the device (default: 2048)",
    parse: parseCount,
  },
  {
    key: "sink",
    flags: "--sink <tokens>",
    text: "first tokens, always attended (default: 512)",
    parse: parseCount,
  },
  {
    key: "window",
    flags: "--window <tokens>",
    text: "newest tokens, likewise (default: 512)",
    parse: parseCount,
  },
  { key: "pageSize", flags: "--page-size <tokens>", text: "16, 32 or 64 (default: 32)", parse: parseCount },
  {
    key: "slots",
    flags: "--slots <pages>",
    text: "pages cached per KV head (default: three times the selection)",
    parse: parseCount,
  },
  {
    key: "tau",
    flags: "--tau <cosine>",
    text: "a head is corrected below it: one number, or one per layer with commas (default: 0.8)",
    parse: parseTau,
  },
  {
    key: "correction",
    flags: "--correction <mode>",
    text: "when a head selects again before attention (default: threshold)",
    choices: ["threshold", "exact", "off"],
  },
  {
    key: "digest",
    flags: "--digest <kind>",
    text: "summary of a page (default: quest)",
    choices: ["quest", "arkvale"],
  },
  {
    key: "recall",
    flags: "--recall <path>",
    text: "how pages come from the host (default: gather)",
    choices: ["gather", "staged", "fragmented"],
  },
  {
    key: "orchestration",
    flags: "--orchestration <kind>",
    text: "who decides in a step (default: captured with gather, else host)",
    choices: ["captured", "host"],
  },
  { key: "speculate", flags: "--no-speculate", text: "select before attention, not beside the step before" },
  {
    key: "prefetch",
    flags: "--prefetch <pages>",
    text: "per head beyond the selection (default: 0)",
    parse: parseCount,
  },
  {
    key: "numerics",
    flags: "--numerics <kind>",
    text: "fast, or invariant: the same bits whatever runs beside (default: fast)",
    choices: ["fast", "invariant"],
  },
  {
    key: "kvDtype",
    flags: "--kv-dtype <dtype>",
    text: "storage of K and V (default: the checkpoint's)",
    choices: ["bf16", "f16", "f32"],
  },
  {
    key: "maxContext",
    flags: "--max-context <tokens>",
    text: "longest sequence; a smaller one takes less memory (default: the model's)",
    parse: parseCount,
  },
  {
    key: "hostBytes",
    flags: "--host-bytes <bytes>",
    text: "limit of pinned host memory (default: 80% of what is free)",
    parse: parseCount,
  },
];

const outputOptions = (): Option[] => [
  new Option("--json", "JSON lines on stdout, also for errors on stderr"),
  new Option("--quiet", "neither progress nor hints"),
  new Option("--plain", "CUDA without clusters and warpgroups, as on older chips; the same answers"),
  new Option("--debug", "validate every call into the library; stacks of errors"),
];

/** What every command has. */
export interface OutputFlags {
  json?: true;
  quiet?: true;
  debug?: true;
  plain?: true;
}
/** What the command line gave for the flags of this table; commander's names are the options' own. */
export type EngineFlags = OutputFlags & Record<string, unknown>;

export function addDeviceFlags(command: Command): Command {
  return addFlags(command, deviceFlags);
}

/** `seed` says what the seed is of. */
export function addEngineFlags(command: Command, seed: string): Command {
  command.addOption(new Option("--seed <n>", seed).argParser(parseCount));
  command.optionsGroup("Method and engine:");
  for (const flag of engineFlags) command.addOption(optionOf(flag));
  command.optionsGroup("Device and output:");
  return addFlags(command, deviceFlags);
}

function addFlags(command: Command, flags: readonly Flag[]): Command {
  for (const flag of flags) command.addOption(optionOf(flag));
  for (const option of outputOptions()) command.addOption(option);
  return command;
}

function optionOf({ flags, text, choices, parse }: Flag): Option {
  const option = new Option(flags, text);
  if (choices) option.choices(choices);
  if (parse) option.argParser(parse);
  return option;
}

/** The engine options that were given. Errors: BAD_ARGUMENT. */
export function engineOptions(given: EngineFlags): EngineOptions {
  const options: Record<string, unknown> = {};
  for (const { key } of [...engineFlags, ...deviceFlags]) {
    // A negated flag that was not given reads as true.
    if (given[key] !== undefined && !(key === "speculate" && given[key] === true)) options[key] = given[key];
  }
  if (given.debug) options.debug = true;
  if (given.plain) options.plain = true;
  return parseEngineOptions(options);
}
