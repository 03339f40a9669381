// What the tests of the command line share: a tiny model, and how to run the command.
import { type ChildProcess, spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after } from "node:test";
import { fileURLToPath } from "node:url";
import { assertEquals, assertMatch } from "@std/assert";
import { writeTinyCheckpoint } from "../checkpoints.ts";

const cli = fileURLToPath(new URL("../../lib/cli.ts", import.meta.url));
export const dir: string = mkdtempSync(join(tmpdir(), "freekv-cli-"));
after(() => rmSync(dir, { recursive: true }));

/** It never says end-of-sequence, so what it continues is as long as was asked. */
export const model: string = writeTinyCheckpoint(join(dir, "model"), {
  tokenizer: true,
  contextLength: 4096,
  tied: false,
  config: { eos_token_id: [] },
});
export const file = (name: string, content: string | Uint8Array): string => {
  writeFileSync(join(dir, name), content);
  return join(dir, name);
};
export const tokens: number[] = Array.from({ length: 700 }, (_, i) => (i * 37 + (i >> 3)) % 256);
export const tokensFile: string = file("tokens.json", JSON.stringify(tokens));

export interface Ended {
  code: number | null;
  out: string;
  err: string;
}

/** `stdout`: a file that it goes to, in place of a pipe. */
export function start(args: readonly string[], stdout: number | "pipe" = "pipe"): ChildProcess {
  return spawn(process.execPath, [cli, ...args], { stdio: ["pipe", stdout, "pipe"] });
}

export function ending(child: ChildProcess): Promise<Ended> {
  let out = "";
  let err = "";
  child.stdout?.setEncoding("utf8").on("data", (text) => {
    out += text;
  });
  child.stderr?.setEncoding("utf8").on("data", (text) => {
    err += text;
  });
  return new Promise((resolve) => child.on("close", (code) => resolve({ code, out, err })));
}

export function freekv(args: readonly string[], input = ""): Promise<Ended> {
  const child = start(args);
  child.stdin?.on("error", () => {}); // most commands read none
  child.stdin?.end(input);
  return ending(child);
}

export const linesOf = (text: string): string[] => text.split("\n").slice(0, -1);
// biome-ignore lint/suspicious/noExplicitAny: the tests assert the shape of what was printed
export const records = (text: string): any[] => linesOf(text).map((line) => JSON.parse(line));

/** One line on stderr, nothing on stdout. */
export function assertRefused({ code, out, err }: Ended, exit: number, message: RegExp): void {
  assertEquals(out, "");
  assertMatch(err, message);
  assertEquals(linesOf(err).length, 1, err);
  assertMatch(err, /^freekv: /);
  assertEquals(code, exit);
}

// Each with a library that does not exist: that would be exit 3, so exit 2 shows that nothing was loaded.
export const noLibrary: string[] = ["--library-path", join(dir, "missing.so")];
export const needle = (...more: string[]): string[] => ["demo", "--device", "cpu", "--model", model, ...more];
export const scored = (prefill: string, tokensFile: string): string[] => [
  "score",
  "--device",
  "cpu",
  "--model",
  model,
  "--tokens-file",
  tokensFile,
  "--prefill",
  prefill,
];
export const told = (...more: string[]): string[] => [
  "generate",
  "--device",
  "cpu",
  "--model",
  model,
  ...more,
];
