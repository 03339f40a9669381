// The command line, as a shell sees it: what goes to stdout and what to stderr.
import { existsSync } from "node:fs";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { assert, assertEquals, assertGreater, assertMatch, assertNotEquals } from "@std/assert";
import { wilson } from "../lib/cli/demo-table.ts";
import { main } from "../lib/cli/main.ts";
import { Output } from "../lib/cli/output.ts";
import {
  type Ended,
  ending,
  file,
  freekv,
  linesOf,
  needle,
  noLibrary,
  records,
  scored,
  start,
  tokens,
  tokensFile,
  told,
} from "./cli/rig.ts";

const demoWeights = fileURLToPath(new URL("../lib/demo-model/model.safetensors", import.meta.url));

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
    await score("--policy", "freekv", "--budget", "4096", "--max-context", "1024"),
    await score("--policy", "freekv", "--tau", "0.5,0.9", ...small),
    await score("--policy", "retrieve", "--recall", "staged", "--slots", "6", "--debug", ...small),
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
  assertEquals(full.start.slots, null);
  assertGreater(full.start.hostBytes, 0);
  const { layout, stagingBuffers, chain, prefillKv, estimate, maxContext, maxSequences } = full.start;
  assertEquals([layout, stagingBuffers, chain, prefillKv], ["hnd", 2, "auto", "device"]);
  assertEquals([estimate, maxContext, maxSequences, wide.start.maxContext], ["freekv", 4096, 1, 1024]);
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

test("SIGTERM ends doctor, at its start and while it measures", { timeout: 30_000 }, async () => {
  for (const soon of [(kill: () => void) => kill(), setImmediate]) {
    const ended = main(["doctor", "--device", "cpu"]); // in this process: from here on the signal is its own
    soon(() => process.kill(process.pid, "SIGTERM"));
    assertEquals(await ended, 143);
  }
});

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
  assertEquals(
    [start.seed, start.budget, start.questions, start.policy],
    [3, Math.floor(book.tokens / 128) * 32, 2, policies],
  );
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
