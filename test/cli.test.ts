// The command line, as a shell sees it: exit codes, what goes to stdout and what to stderr.

import { type ChildProcess, spawn } from "node:child_process";
import { existsSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import { fileURLToPath } from "node:url";
import { assert, assertEquals, assertGreater, assertMatch, assertNotEquals } from "@std/assert";
import { wilson } from "../lib/cli/demo-table.ts";
import { failureLine, failureOf } from "../lib/cli/failure.ts";
import { Output } from "../lib/cli/output.ts";
import { writeTinyCheckpoint } from "./checkpoints.ts";

const cli = fileURLToPath(new URL("../lib/cli.ts", import.meta.url));
const demoWeights = fileURLToPath(new URL("../lib/demo-model/model.safetensors", import.meta.url));
const dir = mkdtempSync(join(tmpdir(), "freekv-cli-"));
after(() => rmSync(dir, { recursive: true }));

/** It never says end-of-sequence, so what it continues is as long as was asked. */
const model = writeTinyCheckpoint(join(dir, "model"), {
  tokenizer: true,
  contextLength: 4096,
  tied: false,
  config: { eos_token_id: [] },
});
const file = (name: string, content: string | Uint8Array): string => {
  writeFileSync(join(dir, name), content);
  return join(dir, name);
};
const tokens = Array.from({ length: 700 }, (_, i) => (i * 37 + (i >> 3)) % 256);
const tokensFile = file("tokens.json", JSON.stringify(tokens));

interface Ended {
  code: number | null;
  out: string;
  err: string;
}

function start(args: readonly string[]): ChildProcess {
  return spawn(process.execPath, [cli, ...args], { stdio: ["pipe", "pipe", "pipe"] });
}

function ending(child: ChildProcess): Promise<Ended> {
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

function freekv(args: readonly string[], input = ""): Promise<Ended> {
  const child = start(args);
  child.stdin?.on("error", () => {}); // most commands read none
  child.stdin?.end(input);
  return ending(child);
}

const linesOf = (text: string): string[] => text.split("\n").slice(0, -1);
// biome-ignore lint/suspicious/noExplicitAny: the tests assert the shape of what was printed
const records = (text: string): any[] => linesOf(text).map((line) => JSON.parse(line));

/** One line on stderr, nothing on stdout. */
function assertRefused({ code, out, err }: Ended, exit: number, message: RegExp): void {
  assertEquals(out, "");
  assertMatch(err, message);
  assertEquals(linesOf(err).length, 1, err);
  assertMatch(err, /^freekv: /);
  assertEquals(code, exit);
}

// Each with a library that does not exist: that would be exit 3, so exit 2 shows that nothing was loaded.
const noLibrary = ["--library-path", join(dir, "missing.so")];
const needle = (...more: string[]): string[] => ["demo", "--device", "cpu", "--model", model, ...more];
const scored = (prefill: string, tokensFile: string): string[] => [
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
const told = (...more: string[]): string[] => ["generate", "--device", "cpu", "--model", model, ...more];
const refusals: [string, string[], RegExp][] = [
  ["an unknown command", ["dance"], /no command "dance"; the commands are demo, generate, score, doctor/],
  ["an unknown flag", needle("--budgets", "4"), /unknown option '--budgets' \(Did you mean --budget\?\)/],
  ["a flag without its value", needle("--budget"), /--budget <tokens>' argument missing/],
  ["words that belong to nothing", needle("more"), /too many arguments/],
  ["a count that is none", needle("--budget", "1.5"), /--budget .*must be a whole number/],
  ["a policy that is none", needle("--policy", "best"), /Allowed choices are freekv, retrieve/],
  ["a budget below sink, window and a page", needle("--budget", "192"), /raise --budget to at least 224/],
  ["a budget of part of a page", needle("--budget", "1000"), /not a multiple of the page size 32/],
  ["another page size", needle("--page-size", "48"), /--page-size: page size must be 16, 32 or 64/],
  ["too few slots", needle("--slots", "3"), /raise --slots or lower --budget/],
  ["tau beyond a cosine", needle("--tau", "1.5"), /--tau must be at most 1/],
  ["tau for other layers", needle("--tau", "0.5,0.6,0.7"), /has 3 values, but the model has 2 layers/],
  ["a device of no kind", needle("--device", "tpu"), /device must be auto, cpu, cuda or cuda:N/],
  [
    "captured with staged recall",
    needle("--recall", "staged", "--orchestration", "captured"),
    /orchestration "host"/,
  ],
  ["a book beyond the context", needle("--tokens", "4000"), /give at most 3840/],
  ["a book too short", needle("--tokens", "100"), /give 1024 to 3840/],
  ["no question", needle("--questions", "0"), /--questions must be 1 or more/],
  ["a book that is not there", needle("--book", join(dir, "none.txt")), /none\.txt: no such file/],
  ["a book that is a folder", needle("--book", dir), /is a folder/],
  ["an empty book", needle("--book", file("blank", " \n ")), /has no text in it/],
  [
    "a book that is no text",
    needle("--book", file("binary", new Uint8Array([1, 255, 0, 9]))),
    /not UTF-8 text/,
  ],
  ["a book with NULs", needle("--book", file("nul", "a\0b")), /is a binary file/],
  ["no model", ["generate", "--prompt", "a"], /'--model <dir>' not specified/],
  [
    "a model that is not there",
    ["generate", "--model", join(dir, "none"), "--prompt", "a"],
    /no config\.json/,
  ],
  ["no prompt", told(), /either --prompt or --prompt-file/],
  ["two prompts", told("--prompt", "a", "--prompt-file", "b"), /either --prompt or --prompt-file/],
  ["an empty prompt", told("--prompt", ""), /the prompt is empty/],
  [
    "a prompt file that is not there",
    told("--prompt-file", join(dir, "none")),
    /--prompt-file .*no such file/,
  ],
  ["a prompt beyond the context", told("--prompt", "x".repeat(5000)), /5001 tokens leave no room/],
  ["a probability beyond 1", told("--prompt", "a", "--top-p", "1.5"), /--top-p must be at most 1/],
  ["nothing to generate", told("--prompt", "a", "--max-tokens", "0"), /--max-tokens must be 1 or more/],
  ["an empty stop text", told("--prompt", "a", "--stop", ""), /--stop .*must not be empty/],
  ["a prefill of everything", scored("700", tokensFile), /give 1 to 699/],
  ["a prefill of nothing", scored("0", tokensFile), /give 1 to 699/],
  ["a token that is no number", scored("1", file("word", "1 2 three")), /item 2 is "three".*0 to 257/],
  ["a token beyond the vocabulary", scored("1", file("big", "[1, 258]")), /item 1 is 258/],
  ["a JSON array cut short", scored("1", file("cut", "[1, 2,")), /starts like a JSON array/],
  ["too few tokens", scored("1", file("one", "7")), /holds 1 token ids/],
  ["more tokens than the context", scored("1", file("many", "1 ".repeat(4097))), /4097 tokens do not fit/],
];

test("what the user did wrong is one line and exit 2, before anything is loaded", {
  timeout: 60_000,
}, async () => {
  const queue = [...refusals];
  const worker = async (): Promise<void> => {
    for (let next = queue.shift(); next !== undefined; next = queue.shift()) {
      const [what, args, message] = next;
      const [command = "", ...rest] = args;
      const ended = await freekv([command, ...noLibrary, ...rest]);
      try {
        assertRefused(ended, 2, message);
      } catch (error) {
        throw new Error(`${what}: ${args.join(" ").slice(0, 200)}`, { cause: error });
      }
    }
  };
  await Promise.all([worker(), worker(), worker()]);
});

test("a checkpoint that is damaged or of another kind is the user's to mend", {
  timeout: 30_000,
}, async () => {
  const cut = writeTinyCheckpoint(join(dir, "cut-model"), { tokenizer: true });
  writeFileSync(join(cut, "model.safetensors"), new Uint8Array(4));
  const other = writeTinyCheckpoint(join(dir, "other-model"), {
    config: { architectures: ["GPT2LMHeadModel"] },
  });
  const mute = writeTinyCheckpoint(join(dir, "mute-model"));
  const generate = (model: string): Promise<Ended> =>
    freekv(["generate", "--model", model, "--prompt", "a", ...noLibrary]);
  assertRefused(await generate(cut), 2, /has 4 bytes, too few/);
  assertRefused(await generate(other), 2, /GPT2LMHeadModel is not supported; supported: Llama/);
  assertRefused(await generate(mute), 2, /no tokenizer\.json/);
});

test("what the machine lacks is exit 3; with --json an error is one JSON line", {
  timeout: 30_000,
}, async () => {
  assertRefused(
    await freekv([...told("--prompt", "a"), ...noLibrary]),
    3,
    /no cpu library.*missing\.so: no such file/,
  );
  const { code, out, err } = await freekv([...told("--prompt", "a", "--json"), ...noLibrary]);
  assertEquals([code, out], [3, ""]);
  const [{ error }, ...more] = records(err);
  assertEquals(more, []);
  assertEquals(Object.keys(error), ["code", "message"]);
  assertEquals(error.code, "LIBRARY_NOT_FOUND");

  const refused = await freekv(["demo", "--nope", "--json"]);
  assertEquals([refused.code, refused.out], [2, ""]);
  assertEquals(records(refused.err)[0].error.code, "BAD_ARGUMENT");
});

test("our own mistake is exit 1, with a stack only on request", () => {
  const failure = failureOf(new TypeError("x is not\na function"));
  assertEquals([failure.exit, failure.code], [1, "INTERNAL"]);
  const short = failureLine(failure, { json: false, debug: false });
  assertMatch(short, /^freekv: internal error: x is not a function; .*--debug/);
  assert(!short.includes("\n"));
  assertMatch(failureLine(failure, { json: false, debug: true }), /\n +at /);
  assertEquals(Object.keys(JSON.parse(failureLine(failure, { json: true, debug: false })).error), [
    "code",
    "message",
  ]);
});

test("help and version are answers", { timeout: 30_000 }, async () => {
  const version = await freekv(["--version"]);
  assertEquals([version.code, version.err], [0, ""]);
  assertMatch(version.out, /^\d+\.\d+\.\d+\n$/);
  const help = await freekv(["--help"]);
  assertEquals([help.code, help.err], [0, ""]);
  for (const word of ["demo", "generate", "score", "doctor"])
    assert(help.out.includes(`\n  ${word} [options]`));
  assertMatch((await freekv(["score", "--help"])).out, /--tokens-file <file>/);
});

const statKeys = [
  "ttftMs",
  "tpotMs",
  "stallMs",
  "recalledPages",
  "recalledBytes",
  "hitRate",
  "correctedShare",
  "deviceKvBytes",
  "totalKvBytes",
];
const small = ["--sink", "32", "--window", "64", "--budget", "192"];

test("score prints positions N to count − 2, and policies that drop pages differ from full", {
  timeout: 60_000,
}, async () => {
  const score = async (...more: string[]) => {
    const { code, out, err } = await freekv([...scored("660", tokensFile), "--json", ...more]);
    assertEquals([code, err], [0, ""]);
    const [{ start }, ...rest] = records(out);
    return { start, positions: rest.slice(0, -1), summary: rest.at(-1).summary };
  };
  const [full, wide, narrow, waits] = [
    await score("--policy", "full"),
    await score("--policy", "freekv", "--budget", "4096"),
    await score("--policy", "freekv", "--tau", "0.5,0.9", ...small),
    await score("--policy", "retrieve", "--recall", "staged", "--debug", ...small),
  ];
  assertEquals(
    full.positions.map(({ position }) => position),
    Array.from({ length: 39 }, (_, i) => 660 + i),
  );
  for (const { position, next, logprob } of full.positions) {
    assertEquals(next, tokens[position + 1]);
    assert(Number.isFinite(logprob) && logprob < 0);
  }
  assertGreater(new Set(full.positions.map(({ argmax }) => argmax)).size, 3);
  assertEquals(wide.positions, full.positions);
  assertNotEquals(narrow.positions, full.positions);

  assertEquals(full.start.device, "cpu");
  assertEquals([full.start.policy, wide.start.budget, narrow.start.tau], ["full", 4096, [0.5, 0.9]]);
  assertEquals([waits.start.recall, waits.start.orchestration, waits.start.slots], ["staged", "host", 6]);
  assertEquals(Object.keys(full.summary), statKeys);
  for (const key of ["ttftMs", "stallMs", "recalledPages", "recalledBytes", "hitRate", "correctedShare"]) {
    assertEquals(full.summary[key], null, `full has no ${key}`);
  }
  assertGreater(full.summary.tpotMs, 0);
  assertGreater(waits.summary.recalledPages, 0);
  assertGreater(narrow.summary.hitRate, 0);
  assertGreater(full.summary.deviceKvBytes, narrow.summary.deviceKvBytes);
});

test("score without --json is a table of one line a position", { timeout: 30_000 }, async () => {
  const { code, out, err } = await freekv([
    ...scored("697", file("plain", tokens.join("\n"))),
    "--device",
    "cpu",
  ]);
  assertEquals([code, err], [0, ""]);
  const [header = "", ...lines] = linesOf(out);
  assertEquals(header.trim().split(/\s+/), ["position", "next", "logprob", "argmax"]);
  assertEquals(
    lines.map((line) => line.trim().split(/\s+/).slice(0, 2)),
    [
      ["697", String(tokens[698])],
      ["698", String(tokens[699])],
    ],
  );
});

test("generate streams the same text from every kind of prompt, and ends before a stop text", {
  timeout: 60_000,
}, async () => {
  const generate = (...more: string[]): Promise<Ended> =>
    freekv(told("--max-tokens", "40", ...more), "one two");
  const json = await generate("--prompt", "one two", "--json");
  assertEquals([json.code, json.err], [0, ""]);
  const [{ start }, ...rest] = records(json.out);
  const { summary } = rest.at(-1);
  const said = rest.slice(0, -1);
  assertEquals([start.maxTokens, start.temperature, start.seed], [40, 0, 0]);
  assertEquals(said.length, 40);
  assertEquals(said.map(({ text }) => text).join(""), summary.text);
  assertGreater(new Set(said.map(({ id }) => id)).size, 3);
  assertEquals([summary.finishReason, summary.promptTokens, summary.completionTokens], ["length", 8, 40]);
  assertEquals(Object.keys(summary).slice(4), statKeys);

  const plain = { code: 0, out: `${summary.text}\n`, err: "" };
  assertEquals(await generate("--prompt", "-"), plain);
  assertEquals(await generate("--prompt-file", file("prompt", "one two"), "--quiet"), plain);

  const stop = [...summary.text].find(
    (character, i, all) => i > 3 && !all.slice(0, 3).includes(character),
  ) as string;
  const stopped = await generate("--prompt", "one two", "--stop", "no such text", "--stop", stop);
  assertEquals(stopped, { ...plain, out: `${summary.text.slice(0, summary.text.indexOf(stop))}\n` });

  const drawn = ["--prompt", "one two", "--temperature", "1.5"];
  const [one, again, two] = [
    await generate(...drawn, "--seed", "1"),
    await generate(...drawn, "--seed", "1"),
    await generate(...drawn, "--seed", "2"),
  ];
  assertEquals(again, one);
  assertNotEquals(two, one);
});

test("a reader that leaves ends the command quietly", { timeout: 30_000 }, async () => {
  const child = start([...scored("1", tokensFile), "--json"]);
  const ended = ending(child);
  child.stdout?.once("data", () => child.stdout?.destroy());
  const { code, out, err } = await ended;
  assertEquals([code, err], [0, ""]);
  assert(!out.includes("summary"), "all was printed before the reader left: this shows nothing");
});

for (const [signal, exit] of [
  ["SIGINT", 130],
  ["SIGTERM", 143],
] as const) {
  test(`${signal} ends a generation with ${exit} and no word`, { timeout: 30_000 }, async () => {
    const child = start(told("--prompt", "a", "--max-tokens", "4000"));
    const ended = ending(child);
    child.stdout?.once("data", () => child.kill(signal));
    const { code, out, err } = await ended;
    assertEquals([code, err], [exit, ""]);
    assertGreater(out.length, 0);
    assert(!out.endsWith("\n"), "it was not interrupted");
  });
}

test("doctor names every path tried, the device and its link", { timeout: 30_000 }, async () => {
  const { code, out, err } = await freekv(["doctor", "--device", "cpu", "--json"]);
  assertEquals([code, err], [0, ""]);
  const [{ start }, { machine }, { library }, { summary }] = records(out);
  assertEquals([start.device, summary], ["cpu", { ok: true, device: "cpu" }]);
  assertMatch(machine.runtime, /^(Bun|Node) \d/);
  assertMatch(library.tried.at(-1).path, /libfreekv_cpu\.so$/);
  assertGreater(library.device.h2dBytesPerSecond, 1e8);
  assertGreater(library.device.totalBytes, 0);

  const plain = await freekv(["doctor"]);
  assertEquals([plain.code, plain.err], [0, ""]);
  assertMatch(plain.out, /cuda +.*libfreekv_cuda\.so/);
  assertMatch(plain.out, /\n {2}link .* GB\/s to the device/);
  assertMatch(plain.out, /\nready on (cpu|cuda:0)\n$/);

  const broken = await freekv(["doctor", ...noLibrary]);
  assertEquals(broken.code, 3);
  assertMatch(broken.out, /missing\.so: no such file/);
  assertMatch(broken.err, /^freekv: no device works here; .*npm run build:twin\n$/);
});

const policies = ["full", "streaming", "retrieve", "freekv-off", "freekv", "freekv-exact"];

test("demo prints a table of 100 characters at most, one row a policy", { timeout: 60_000 }, async () => {
  const text = file("book.txt", "The ferry leaves at nine. Nobody counts the gulls.\n".repeat(30));
  const { code, out, err } = await freekv(needle("--book", text, "--questions", "1"));
  assertEquals([code, err], [0, ""]);
  assert(!out.includes("\x1b"), "not a terminal, so no escapes");
  const lines = linesOf(out);
  for (const line of lines) assert([...line].length <= 100, line);
  assertMatch(
    lines[0] ?? "",
    /^CPU twin · model, \d+ K · your book 1,\d+ tokens, seed 1 · prefill \d+\.\d s, once$/,
  );
  assertMatch(
    lines[1] ?? "",
    /^budget \d+ tokens a head = 64 sink \+ 128 window \+ \d+ selected \(2\d% of the book\)$/,
  );
  const table = lines.slice(lines.findIndex((line) => line.startsWith("policy")));
  assertMatch(
    table[0] ?? "",
    /^policy +right +95% interval +recalled\/token +waited\/token +device KV +TPOT$/,
  );
  const titles = [
    "full",
    "streaming (drops)",
    "retrieve (waits)",
    "freekv, uncorrected",
    "freekv",
    "freekv, exact",
  ];
  assertEquals(
    table.slice(1, 7).map((line) => line.split(/ {2,}/)[0]),
    titles,
  );
  assertMatch(table[1] ?? "", /^full +[01]\/1 +\d+–\d+% +– +– +\d+\.\d MiB +100% +\d+\.\d+ ms$/);
  assertMatch(out, /hit rate .*%, heads corrected .*%/);
});

test("demo --json ends with a summary of every policy; what does not apply is null", {
  timeout: 60_000,
}, async () => {
  const { code, out, err } = await freekv(
    needle("--tokens", "1024", "--questions", "2", "--seed", "3", "--json"),
  );
  assertEquals([code, err], [0, ""]);
  const [{ start }, { book }, ...rest] = records(out);
  const { summary } = rest.at(-1);
  const answers = rest.slice(0, -1);
  assertEquals([start.seed, start.budget, start.questions, start.policy], [3, 256, 2, policies]);
  assert(book.tokens <= 1024 && book.tokens > 900);
  assertEquals(
    answers.map(({ policy, question }) => `${policy} ${question}`),
    policies.flatMap((p) => [`${p} 0`, `${p} 1`]),
  );
  assertEquals(Object.keys(summary), policies);
  for (const policy of policies) {
    assertEquals(Object.keys(summary[policy]), ["correct", "asked", ...statKeys]);
    assertEquals(summary[policy].asked, 2);
    assertGreater(summary[policy].ttftMs, 0);
    const recalls = policy !== "full" && policy !== "streaming";
    for (const key of ["stallMs", "recalledPages", "recalledBytes", "hitRate"]) {
      assertEquals(typeof summary[policy][key], recalls ? "number" : "object", `${policy} ${key}`);
    }
  }
  assertEquals(
    answers.filter(({ policy }) => policy === "freekv-exact").map(({ said }) => said),
    answers.filter(({ policy }) => policy === "retrieve").map(({ said }) => said),
  );

  const chosen = await freekv(
    needle("--tokens", "1024", "--questions", "1", "--policy", "freekv", "--correction", "off", "--json"),
  );
  assertEquals(Object.keys(records(chosen.out).at(-1).summary), ["freekv-off"]);
});

const noWeights = existsSync(demoWeights) ? false : "lib/demo-model has no weights";
if (noWeights) console.log(`skipped: ${noWeights}`);

test("demo's own model answers from its book", { timeout: 60_000, skip: noWeights }, async () => {
  const { code, out, err } = await freekv(["demo", "--tokens", "2048", "--questions", "4", "--json"]);
  assertEquals([code, err], [0, ""]);
  const { summary } = records(out).at(-1);
  assertGreater(summary.full.correct, 2);
  assertGreater(summary.freekv.correct, summary.streaming.correct);
});

test("Wilson's interval of 20 in 20 is 84–100%, and of none in 20 its mirror", () => {
  const percent = (right: number): number[] => wilson(right, 20).map((share) => Math.round(100 * share));
  assertEquals(percent(20), [84, 100]);
  assertEquals(percent(0), [0, 16]);
  assertEquals(percent(10), [30, 70]);
});

test("a terminal gets bold titles, unless NO_COLOR is set", () => {
  const { isTTY } = process.stdout;
  const { NO_COLOR, TERM } = process.env;
  try {
    process.stdout.isTTY = true;
    process.env.TERM = "xterm";
    delete process.env.NO_COLOR;
    assertEquals(new Output({ json: false, quiet: false }).bold("x"), "\x1b[1mx\x1b[22m");
    process.env.NO_COLOR = "1";
    assertEquals(new Output({ json: false, quiet: false }).bold("x"), "x");
  } finally {
    process.stdout.isTTY = isTTY;
    for (const [name, value] of Object.entries({ NO_COLOR, TERM })) {
      if (value === undefined) delete process.env[name];
      else process.env[name] = value;
    }
  }
});
