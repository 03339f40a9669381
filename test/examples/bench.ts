// Measure a decode step with mitata.
import { demoModel, Engine } from "freekv";
import { bench, run } from "mitata";

await using engine = await Engine.load(demoModel, { budget: 512, sink: 64, window: 64 });
using book = await engine.prefill("One more page of a very long story. ".repeat(250));
for (const policy of ["full", "retrieve", "freekv"] as const) {
  using sequence = book.fork({ policy });
  const tokens = sequence.generate({ maxTokens: 1500, ignoreEos: true })[Symbol.asyncIterator]();
  bench(`decode, ${policy}`, async () => {
    if ((await tokens.next()).done) throw new Error("ran out of tokens");
  });
  await run({ format: process.stdout.isTTY ? "mitata" : "quiet" });
  await tokens.return?.();
}
