// The command line's refusals: one line, the right exit code, before anything is loaded.
import { closeSync, existsSync, openSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { assert, assertEquals, assertLess, assertMatch } from "@std/assert";
import { failureLine, failureOf } from "../lib/cli/failure.ts";
import { writeTinyCheckpoint } from "./checkpoints.ts";
import {
  assertRefused,
  dir,
  type Ended,
  ending,
  file,
  freekv,
  model,
  needle,
  noLibrary,
  records,
  scored,
  start,
  tokensFile,
  told,
} from "./cli/rig.ts";

const refusals: [string, string[], RegExp][] = [
  ["an unknown command", ["dance"], /no command "dance"; the commands are demo, generate, score, doctor/],
  ["an unknown flag", needle("--budgets", "4"), /unknown option '--budgets' \(Did you mean --budget\?\)/],
  ["a flag without its value", needle("--budget"), /--budget <tokens>' argument missing/],
  ["words that belong to nothing", needle("more"), /too many arguments/],
  ["a count that is none", needle("--budget", "1.5"), /--budget .*must be a whole number/],
  ["a policy that is none", needle("--policy", "best"), /Allowed choices are freekv, retrieve/],
  ["a budget below sink, window and a page", needle("--budget", "192"), /raise --budget to at least 224/],
  ["a budget of part of a page", needle("--budget", "1000"), /page size 32; give 992 or 1024$/m],
  ["a budget of less than a page", needle("--budget", "10"), /page size 32; give 32$/m],
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
  [
    "a top-k beyond what the device counts",
    told("--prompt", "a", "--top-k", "999999999999"),
    /--top-k must be at most 2147483647/,
  ],
  [
    "a context beyond the model's",
    needle("--max-context", "5000"),
    /--max-context 5000 is over the model's context of 4096/,
  ],
  [
    "more tokens than --max-context",
    [...scored("1", tokensFile), "--max-context", "640"],
    /700 tokens do not fit/,
  ],
  [
    "a model's file in place of its folder",
    ["generate", "--model", join(model, "config.json"), "--prompt", "a"],
    /config\.json: is a file; give the folder that it is in: .*model$/m,
  ],
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
    /no library at libraryPath could be loaded.*--library-path.*missing\.so: no such file/,
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

test("a config of a billion layers, or of a context that no memory has, is refused at once", {
  timeout: 30_000,
}, async () => {
  const generate = (name: string, config: object): Promise<Ended> => {
    const path = writeTinyCheckpoint(join(dir, name), { tokenizer: true, config: { ...config } });
    return freekv(["generate", "--model", path, "--prompt", "a", ...noLibrary]);
  };
  const began = performance.now();
  assertRefused(await generate("deep", { num_hidden_layers: 1e9 }), 2, /lacks the tensor model\.layers\.2\./);
  assertRefused(
    await generate("long", { max_position_embeddings: 1e15 }),
    2,
    /max_position_embeddings must be at most 2147483647, not 1000000000000000; mend the file/,
  );
  assertRefused(await generate("wide", { head_dim: 8e8 }), 2, /head_dim must be at most 4096/);
  assertLess(performance.now() - began, 15_000);
});

test("a full disk behind stdout is the machine's fault, in one line", {
  timeout: 30_000,
  skip: existsSync("/dev/full") ? false : "there is no /dev/full",
}, async () => {
  const full = openSync("/dev/full", "w");
  try {
    const ended = await ending(start(scored("690", tokensFile), full));
    assertRefused(ended, 3, /stdout cannot be written: no space is left/);
  } finally {
    closeSync(full);
  }
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
