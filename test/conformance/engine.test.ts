/// <reference lib="esnext.disposable" preserve="true" />
// The whole engine: the tokens are those that transformers gives, so that all runtimes give the same.

import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { assert, assertEquals, assertGreater, assertMatch, assertRejects } from "@std/assert";
import { demoModel, Engine, FreeKVError } from "freekv";
import { root } from "./shared.ts";
import { target } from "./target.ts";

const timeout = 60_000;
const dir = join(root, "test", "fixtures", "golden", "llama");
const golden = JSON.parse(readFileSync(join(dir, "golden.json"), "utf8")) as {
  tokens: number[];
  vocab: number;
};
const { tokens, vocab } = golden;

/** [tokens.length][vocab]: transformers' log-probabilities of the token after each prefix. */
function expected(): number[][] {
  const bytes = readFileSync(join(dir, "logprobs.bin"));
  const all = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
  return tokens.map((_, i) => [...all.subarray(i * vocab, (i + 1) * vocab)]);
}

test("decoding says what transformers says, at every token", { timeout }, async () => {
  await using engine = await Engine.load(dir, { device: target, policy: "full" });
  using sequence = await engine.prefill(tokens.slice(0, 1));
  const rows = expected();
  let i = 1;
  for await (const { logprob, argmax } of sequence.score(tokens.slice(1))) {
    const row = rows[i++] as number[];
    assert(Math.abs(logprob - (row[tokens[i] as number] as number)) < 1e-3, `token ${i}: ${logprob}`);
    assert(Math.max(...row) - (row[argmax] as number) < 1e-3, `token ${i}: ${argmax}`);
  }
  assertEquals(i, tokens.length - 1);
});

test("every orchestration of a retrieving policy gives the same tokens", { timeout }, async () => {
  const small = { device: target, pageSize: 16, budget: 64, sink: 16, window: 16 } as const;
  const found = new Set<string>();
  for (const options of [
    { orchestration: "captured" },
    { orchestration: "host" },
    { recall: "staged" },
  ] as const) {
    await using engine = await Engine.load(dir, { ...small, ...options });
    const [one, other] = await Promise.all([
      engine.generate(tokens, { maxTokens: 24, ignoreEos: true, temperature: 1, seed: 3 }).result(),
      engine.generate(tokens.slice(0, 50), { maxTokens: 24, ignoreEos: true }).result(),
    ]);
    assertEquals([one.tokens.length, other.tokens.length], [24, 24]);
    assertGreater(new Set(one.tokens).size, 5);
    found.add(JSON.stringify([one.tokens, other.tokens]));
  }
  assertEquals(found.size, 1);
});

test("a generation can be left and aborted; a disposed engine says so", { timeout }, async () => {
  await using engine = await Engine.load(dir, { device: target });
  for await (const { id } of engine.generate(tokens, { ignoreEos: true })) {
    assert(id >= 0 && id < vocab);
    break;
  }
  const controller = new AbortController();
  const reason = new Error("the reader left");
  const aborted = await assertRejects(async () => {
    for await (const _ of engine.generate(tokens, { signal: controller.signal, ignoreEos: true }))
      controller.abort(reason);
  });
  assertEquals(aborted, reason);
  assertEquals(engine.stats().sequences, 0);
  await engine[Symbol.asyncDispose]();
  const error = await assertRejects(async () => void (await engine.generate([1]).result()), FreeKVError);
  assertEquals(error.code, "DISPOSED");
});

const weights = new URL(`${demoModel}/model.safetensors`);
const skip = existsSync(weights) ? false : "lib/demo-model has no weights";
test("the demo model answers with a word, the same under every orchestration", {
  timeout,
  skip,
}, async () => {
  const rain = "The rain had stopped before noon. ".repeat(40);
  const prompt = `${rain}The code of amber is harbor. ${rain}\n\nQuestion: What is the code of amber?\nAnswer: The code of amber is`;
  const answers: string[] = [];
  for (const orchestration of ["captured", "host"] as const) {
    await using engine = await Engine.load(demoModel, {
      ...{ device: target, orchestration, budget: 512, sink: 64, window: 64 },
    });
    const tokens: number[] = [];
    let text = "";
    for await (const token of engine.generate(prompt, { maxTokens: 4 })) {
      tokens.push(token.id);
      text += token.text;
    }
    assertEquals(engine.tokenizer.decode(tokens).trim(), text.trim());
    assertMatch(text, /^ [a-z]+\./);
    answers.push(text);
  }
  assertEquals(answers[0], answers[1]);
});
