// Ask a long text a question, under two policies that share one prefill.
import { demoModel, Engine } from "freekv";

const book = `${"The rain had stopped before noon. ".repeat(300)}The code of amber is harbor. ${"Nobody spoke. ".repeat(300)}`;
const question = "\n\nQuestion: What is the code of amber?\nAnswer: The code of amber is";

await using engine = await Engine.load(demoModel, { budget: 1024, sink: 64, window: 128 });
using read = await engine.prefill(book);
for (const policy of ["streaming", "freekv"] as const) {
  using sequence = read.fork({ policy }); // shares the pages that are already on the host
  await sequence.append(question);
  const { text, stats } = await sequence.generate({ maxTokens: 4 }).result();
  console.log(
    `${policy}:${text} (${stats.deviceKvBytes} of ${stats.totalKvBytes} bytes of KV on the device)`,
  );
}
