// The demo's book and the questions about it, as token ids.
import { FreeKVError } from "../errors.ts";
import { chooseQuestions, makeBook, type Question } from "../tasks/index.ts";
import type { Tokenizer } from "../tokenizer.ts";
import { leastTokens } from "./demo-policies.ts";
import { badInput } from "./failure.ts";
import { readText } from "./input.ts";

/** Room in the context for a question and its answer. */
const questionRoom = 256;
/** The demo's own book. */
const defaultTokens = 8192;

export interface AskedQuestion extends Question {
  readonly ids: Int32Array;
  /** Tokens that the answer may take. */
  readonly answerTokens: number;
}
export interface PlacedBook {
  /** BOS included. */
  readonly ids: Int32Array;
  readonly questions: readonly AskedQuestion[];
}
export interface BookChoice {
  readonly tokens: number;
  /** The user's text, to plant the facts in. */
  readonly filler: string | undefined;
}

/** How long the book is to be, and whose text it is. Errors: BAD_ARGUMENT, CONTEXT_TOO_LONG. */
export function chooseBook(
  asked: { tokens?: number; book?: string },
  tokenizer: Tokenizer,
  contextLength: number,
): BookChoice {
  const most = contextLength - questionRoom;
  const { tokens } = asked;
  if (most < leastTokens) {
    throw badInput(
      `the model's context of ${contextLength} tokens is too short for the demo; it takes ${leastTokens + questionRoom} or more`,
    );
  }
  if (tokens !== undefined && tokens < leastTokens) {
    throw badInput(`--tokens ${tokens} is too short a book; give ${leastTokens} to ${most}`);
  }
  if (tokens !== undefined && tokens > most) {
    throw new FreeKVError(
      "CONTEXT_TOO_LONG",
      `--tokens ${tokens} is over what the model's context of ${contextLength} can hold beside a question; give at most ${most}`,
    );
  }
  if (asked.book === undefined) return { tokens: tokens ?? Math.min(defaultTokens, most), filler: undefined };

  const filler = readText("--book", asked.book, most);
  if (filler.trim() === "") throw badInput(`--book ${asked.book} has no text in it; give a file with some`);
  if (tokens !== undefined) return { tokens, filler };
  const own = tokenizer.encode(filler).length;
  return { tokens: Math.max(leastTokens, Math.min(own, most)), filler };
}

/** Book, then question, each encoded by itself, as the needle model was trained on them. */
export function placeBook(
  { tokens, filler }: BookChoice,
  seed: number,
  n: number,
  tokenizer: Tokenizer,
  contextLength: number,
): PlacedBook {
  const encode = (text: string): Int32Array => tokenizer.encode(text, { addBos: false });
  const book = makeBook({ seed, tokens, tokenizer: { encode }, ...(filler === undefined ? {} : { filler }) });
  const ids = tokenizer.encode(book.text);
  const questions = chooseQuestions(book, n, seed).map((question) => ({
    ...question,
    ids: encode(question.prompt),
    answerTokens: Math.max(24, encode(question.answer).length + 8),
  }));
  const longest = Math.max(...questions.map((question) => question.ids.length + question.answerTokens));
  if (ids.length + longest > contextLength) {
    throw new FreeKVError(
      "CONTEXT_TOO_LONG",
      `the book's ${ids.length} tokens and ${longest} for a question are over the model's context of ${contextLength}; ` +
        `give --tokens ${contextLength - longest - 32} or fewer`,
    );
  }
  return { ids, questions };
}
