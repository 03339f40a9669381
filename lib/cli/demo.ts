/// <reference lib="esnext.disposable" preserve="true" />
// freekv demo: questions about a long book, read once, under each policy.
import type { Command } from "commander";
import { demoModel } from "../demo.ts";
import { loadTokenizer } from "../tokenizer.ts";
import { type Answer, ask } from "./demo-ask.ts";
import { chooseBook, placeBook } from "./demo-book.ts";
import { chosenRows, withDemoDefaults } from "./demo-policies.ts";
import { footer, header, next, type Row, recordOf, rowOf, shortOf, summaryOf } from "./demo-report.ts";
import { tableHeader, tableLine } from "./demo-table.ts";
import { badInput } from "./failure.ts";
import { addEngineFlags, type EngineFlags, engineOptions, parseCount } from "./flags.ts";
import { load, prepare, resolved, showProgress } from "./model.ts";
import type { Session } from "./session.ts";

/** The book, and a fork of it that is asked. */
const sequences = 2;

interface DemoFlags extends EngineFlags {
  model?: string;
  book?: string;
  tokens?: number;
  questions?: number;
  seed?: number;
}

export function addDemo(program: Command, run: (flags: DemoFlags) => Promise<void>): void {
  const command = program
    .command("demo", { isDefault: true })
    .description(
      "Ask a long book questions under each policy, and show what each policy costs. The default command.",
    )
    .option("--tokens <n>", "length of the book (default: 8192, or the length of --book)", parseCount)
    .option("--book <file>", "plant the facts in this text, in English, instead of a made-up book")
    .option("--questions <n>", "asked under each policy (default: 20)", parseCount)
    .option("--model <dir>", "Hugging Face folder (default: the needle model of this package)")
    .addHelpText(
      "after",
      "\nHere --budget, --sink and --window default to a quarter of the book, 64 and 128; --policy and --correction\n" +
        "choose rows of the table.\n" +
        "The needle model reads English: of a --book in another language or script it answers little, even with full.",
    );
  addEngineFlags(command, "of book and questions (default: 1)").action(run);
}

export async function demo(flags: DemoFlags, session: Session): Promise<void> {
  const { out, signal, start } = session;
  const { seed = 1, questions: n = 20 } = flags;
  if (n < 1) throw badInput("--questions must be 1 or more");
  const given = engineOptions(flags);
  const rows = chosenRows(given);
  const dir = flags.model ?? demoModel;
  const { policy: _policy, correction: _correction, ...own } = given;
  const { maxContext } = prepare(dir, { maxContext: given.maxContext }, sequences);
  const tokenizer = await loadTokenizer(dir);
  const choice = chooseBook(flags, tokenizer, maxContext);
  out.status("writing the book");
  const book = placeBook(choice, seed, n, tokenizer, maxContext);
  const model = prepare(dir, withDemoDefaults(own, book.ids.length), sequences);

  await using engine = await load(model, out, signal);
  await start(engine.device, {
    ...resolved(model),
    policy: rows.map((row) => row.key),
    correction: null,
    tokens: choice.tokens,
    book: flags.book ?? null,
    questions: book.questions.length,
    seed,
  });
  const from = performance.now();
  using sequence = await engine.prefill(book.ids, {
    policy: "streaming",
    signal,
    onProgress: showProgress(out),
  });
  const prefillMs = performance.now() - from;
  await out.record({ book: { tokens: book.ids.length, prefillMs } });
  const run = {
    device: engine.device,
    askedDevice: given.device ?? "auto",
    ownBook: flags.book !== undefined,
    seed,
    prefillMs,
  };
  await out.lines(...header(run, model, book), "", out.bold(tableHeader));

  const done: Row[] = [];
  for (const row of rows) {
    const answers: Answer[] = [];
    for (const [i, question] of book.questions.entries()) {
      const live = (said: string): void =>
        out.status(`${row.title} ${i + 1}/${book.questions.length} · ${shortOf(question)}${said}`);
      live("");
      const answer = await ask(sequence, question, row.policy, signal, live);
      answers.push(answer);
      await out.record(recordOf(row, i, question, answer));
    }
    done.push({ ...row, answers });
    await out.lines(tableLine(rowOf(done[done.length - 1] as Row, done, model)));
  }
  await out.record({ summary: Object.fromEntries(done.map((row) => [row.key, summaryOf(row, model)])) });
  await out.lines(...footer(done, book, engine.device));
  if (!out.quiet) await out.lines("", out.dim(next()));
}
