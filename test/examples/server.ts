// A Bun.serve handler that streams an answer and stops when the client leaves.
import { demoModel, Engine, FreeKVError } from "freekv";

const engine = await Engine.load(demoModel, { budget: 1024, sink: 64, window: 128 });

const server = Bun.serve({
  port: Number(process.env.PORT ?? 0),
  idleTimeout: 0,
  async fetch(request) {
    try {
      const generation = engine.generate(await request.text(), { maxTokens: 64, signal: request.signal });
      const tokens = generation[Symbol.asyncIterator]();
      const first = await tokens.next(); // what is wrong with the prompt shows before the answer begins
      const encoder = new TextEncoder();
      return new Response(
        new ReadableStream({
          start: (stream) => stream.enqueue(encoder.encode(first.value?.text ?? "")),
          async pull(stream) {
            const { done, value } = await tokens.next();
            if (done) stream.close();
            else stream.enqueue(encoder.encode(value.text));
          },
          cancel: async () => void (await tokens.return?.()),
        }),
      );
    } catch (error) {
      if (!(error instanceof FreeKVError)) throw error;
      return Response.json({ code: error.code, message: error.message }, { status: 400 });
    }
  },
});
console.log(`listening on ${server.url}`);
process.on("SIGTERM", async () => {
  await server.stop(true);
  await engine[Symbol.asyncDispose]();
});
