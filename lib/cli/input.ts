// What a command reads beside a checkpoint: text and token ids. Never more of a file than a context could hold.
import { closeSync, openSync, readSync } from "node:fs";
import { FreeKVError } from "../errors.ts";
import { badInput } from "./failure.ts";

/** No text needs more characters a token than this, and none of what a token file holds takes more bytes an id. */
export const mostBytesPerToken = 32;

const reasons: Readonly<Record<string, string>> = {
  ENOENT: "no such file",
  EISDIR: "is a folder",
  EACCES: "may not be read",
};

/** A file's first `most` bytes, and whether there are more. `flag` is named in errors. */
function readBytes(flag: string, path: string, most: number): { bytes: Uint8Array; cut: boolean } {
  const pieces: Uint8Array[] = [];
  let total = 0;
  try {
    const fd = openSync(path, "r");
    try {
      while (total <= most) {
        const piece = new Uint8Array(Math.min(1 << 20, most + 1 - total));
        const n = readSync(fd, piece, 0, piece.length, null);
        if (n === 0) break;
        pieces.push(piece.subarray(0, n));
        total += n;
      }
    } finally {
      closeSync(fd);
    }
  } catch (error) {
    const code = error instanceof Error && "code" in error ? String(error.code) : "";
    throw badInput(`${flag} ${path}: ${reasons[code] ?? `cannot be read (${code || String(error)})`}`, {
      path,
    });
  }
  return { bytes: Buffer.concat(pieces).subarray(0, most), cut: total > most };
}

/** `what` is named in errors. `cut`: the bytes may end inside a character. */
function decode(what: string, bytes: Uint8Array, cut: boolean): string {
  let text: string;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes, { stream: cut });
  } catch {
    throw badInput(`${what} is not UTF-8 text; give a plain text file`);
  }
  if (text.includes("\0")) throw badInput(`${what} is a binary file; give a plain text file`);
  return text;
}

/** A text file's text, or as much of its start as `tokens` tokens can need. */
export function readText(flag: string, path: string, tokens: number): string {
  const { bytes, cut } = readBytes(flag, path, tokens * mostBytesPerToken);
  return decode(`${flag} ${path}`, bytes, cut);
}

/** A text file that must fit a context of `tokens` tokens as a whole. Errors: BAD_ARGUMENT, CONTEXT_TOO_LONG. */
export function readPrompt(flag: string, path: string, tokens: number): string {
  const { bytes, cut } = readBytes(flag, path, tokens * mostBytesPerToken);
  if (cut) throw tooLong(`${flag} ${path}`, tokens);
  return decode(`${flag} ${path}`, bytes, false);
}

/** The same from stdin. */
export async function readStdin(tokens: number, signal: AbortSignal): Promise<string> {
  const pieces: Uint8Array[] = [];
  let total = 0;
  const end = (): void => void process.stdin.destroy();
  signal.addEventListener("abort", end);
  try {
    for await (const piece of process.stdin) {
      pieces.push(piece);
      total += piece.length;
      if (total > tokens * mostBytesPerToken) throw tooLong("the text on stdin", tokens);
    }
  } catch (error) {
    signal.throwIfAborted();
    throw error;
  } finally {
    signal.removeEventListener("abort", end);
  }
  signal.throwIfAborted();
  return decode("the text on stdin", Buffer.concat(pieces), false);
}

function tooLong(what: string, tokens: number): FreeKVError {
  return new FreeKVError(
    "CONTEXT_TOO_LONG",
    `${what} is longer than the model's context of ${tokens} tokens; shorten it`,
  );
}

/** Token ids of a file: a JSON array, or numbers with white space between. Errors: BAD_ARGUMENT, CONTEXT_TOO_LONG. */
export function readTokens(flag: string, path: string, vocab: number, contextLength: number): Int32Array {
  const what = `${flag} ${path}`;
  const text = readPrompt(flag, path, contextLength).trim();
  let items: unknown[];
  if (text.startsWith("[")) {
    try {
      items = JSON.parse(text);
    } catch {
      throw badInput(`${what} starts like a JSON array but is none; it may be cut short`);
    }
  } else
    items = text === "" ? [] : text.split(/\s+/).map((word) => (/^\d+$/.test(word) ? Number(word) : word));
  for (const [i, item] of items.entries()) {
    if (Number.isSafeInteger(item) && (item as number) >= 0 && (item as number) < vocab) continue;
    const shown = JSON.stringify(item)?.slice(0, 40);
    throw badInput(`${what}: item ${i} is ${shown}; the vocabulary has the ids 0 to ${vocab - 1}`);
  }
  if (items.length > contextLength) {
    throw new FreeKVError(
      "CONTEXT_TOO_LONG",
      `${what}: ${items.length} tokens do not fit the model's context of ${contextLength}; give fewer`,
    );
  }
  return Int32Array.from(items as number[]);
}
