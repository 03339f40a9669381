// Ask a long text a question, under two policies that share one prefill.
import { demoModel, Engine } from "freekv";

const pages = Array.from(
  { length: 400 },
  (_, i) => `Day ${i}: ${i % 3 ? "rain" : "sun"}, ${i * 7} steps walked.`,
);
pages[90] = "The code of amber is leopard.";
const question = "\n\nQuestion: What is the code of amber?\nAnswer: The code of amber is";

await using engine = await Engine.load(demoModel, { budget: 1024, sink: 64, window: 128 });
const asked = engine.tokenizer.encode(question).slice(1); // it follows a text: no beginning-of-sequence token
using book = await engine.prefill(pages.join("\n"));
for (const policy of ["streaming", "freekv"] as const) {
  using sequence = book.fork({ policy }); // shares the pages that are already on the host
  for await (const _ of sequence.score(asked)); // read under the policy; append() would attend to everything
  const { text, stats } = await sequence.generate({ maxTokens: 4 }).result();
  console.log(
    `${policy}:${text} (${stats.deviceKvBytes} of ${stats.totalKvBytes} bytes of KV on the device)`,
  );
}
