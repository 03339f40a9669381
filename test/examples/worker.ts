/// <reference lib="esnext.disposable" preserve="true" />
// The engine in a worker: the main thread keeps its event loop to itself. Each request has a message port: tokens come
// through it, and closing it stops the generation. Whatever ends the worker rejects what still waits; only a crash in
// native code ends the whole process, as threads do.
import { on, once } from "node:events";
import {
  isMainThread,
  MessageChannel,
  type MessagePort,
  parentPort,
  Worker,
  workerData,
} from "node:worker_threads";
import {
  demoModel,
  Engine,
  type EngineOptions,
  type ErrorCode,
  FreeKVError,
  type GenerateOptions,
  type PolicyOptions,
  type Prompt,
  type Token,
} from "freekv";

type Options = PolicyOptions & GenerateOptions;
interface Request {
  prompt: Prompt;
  options: Options;
  port: MessagePort;
}
type Reply = { token: Token } | { done: true } | { error: { code?: ErrorCode; message: string } };

/** The main thread's side. */
export class EngineWorker implements AsyncDisposable {
  readonly worker: Worker;
  readonly #ended = new AbortController();

  constructor(dir: string | URL, options: EngineOptions = {}) {
    this.worker = new Worker(new URL(import.meta.url), { workerData: { dir: String(dir), options } });
    this.worker.on("error", (error) => this.#ended.abort(error));
    this.worker.on("exit", (code) => this.#ended.abort(new Error(`the worker ended with code ${code}`)));
  }

  async *generate(
    prompt: Prompt,
    { signal, ...options }: Options = {},
  ): AsyncGenerator<Token, void, undefined> {
    const { port1: port, port2 } = new MessageChannel();
    const ends = AbortSignal.any(signal === undefined ? [this.#ended.signal] : [signal, this.#ended.signal]);
    try {
      ends.throwIfAborted();
      this.worker.postMessage({ prompt, options, port: port2 } satisfies Request, [port2]);
      for await (const [reply] of on(port, "message", { signal: ends }) as AsyncIterable<[Reply]>) {
        if ("done" in reply) return;
        if ("error" in reply) throw errorOf(reply.error);
        yield reply.token;
      }
    } catch (error) {
      throw ends.aborted ? ends.reason : error;
    } finally {
      port.close(); // also where the reader left: the worker stops
    }
  }

  /** Waits for what runs, frees the engine and ends the worker. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#ended.signal.aborted) return;
    const exit = once(this.worker, "exit");
    this.worker.postMessage("close");
    await exit;
  }
}

function errorOf({ code, message }: { code?: ErrorCode; message: string }): Error {
  return code === undefined ? new Error(message) : new FreeKVError(code, message);
}

/** The worker's side. A model that cannot be loaded ends the worker with that error. */
async function serve(): Promise<void> {
  const { dir, options } = workerData as { dir: string; options: EngineOptions };
  const engine = await Engine.load(dir.startsWith("file:") ? new URL(dir) : dir, options);
  parentPort?.on("message", async (message: Request | "close") => {
    if (message === "close") {
      await engine[Symbol.asyncDispose]();
      return process.exit(0);
    }
    const { prompt, options, port } = message;
    const closed = new AbortController();
    port.on("close", () => closed.abort());
    const reply = (each: Reply): void => port.postMessage(each);
    try {
      for await (const token of engine.generate(prompt, { ...options, signal: closed.signal }))
        reply({ token });
      reply({ done: true });
    } catch (error) {
      const { code, message } = error as FreeKVError;
      reply({ error: { code, message } });
    }
  });
}

if (!isMainThread) await serve();
else if (import.meta.main) {
  await using engine = new EngineWorker(demoModel, { budget: 1024, sink: 64, window: 128 });
  const prompt =
    "The code of amber is leopard.\n\nQuestion: What is the code of amber?\nAnswer: The code of amber is";
  for await (const { text } of engine.generate(prompt, { maxTokens: 4 })) process.stdout.write(text);
  console.log();
}
