// Where it says no: what is refused, in which words, and that everything is afterwards as it was before.

import { readdirSync } from "node:fs";
import { test } from "node:test";
import { assert, assertEquals, assertGreater, assertMatch, assertRejects, assertThrows } from "@std/assert";
import { Engine, loadCore } from "../lib/engine.ts";
import { type ErrorCode, FreeKVError } from "../lib/errors.ts";
import type { EngineOptions } from "../lib/types.ts";
import {
  checkpoint,
  generate,
  load,
  loadWithout,
  score,
  scoreFrom,
  small,
  timeout,
  tokens,
} from "./pipeline.ts";
import { onTarget, twinOnly } from "./target.ts";

const dir = checkpoint();
const ids = tokens(900);
const blockBytes = 3 * 2 * 2 * 16 * 16 * 4;
const orchestrations = ["captured", "host"] as const;

async function refused(code: ErrorCode, text: RegExp, work: () => unknown): Promise<void> {
  const error = await assertRejects(async () => await work(), FreeKVError);
  assertEquals(error.code, code, error.message);
  assertMatch(error.message, text);
}

const drain = async (stream: AsyncIterable<unknown>): Promise<void> => {
  for await (const _ of stream);
};

test("bad options are refused by name, before anything is loaded", { timeout }, async () => {
  // The library is not looked for: there is none at that path.
  for (const [options, text] of [
    [{ bugdet: 128 }, /bugdet/],
    [
      { budget: 80, sink: 32, window: 48 },
      /budget 80 is smaller than sink 32 \+ window 48 \+ one page of 16; raise --budget to at least 96/,
    ],
    [{ budget: 100 }, /budget 100 is not a multiple of the page size 16/],
    [{ window: 0 }, /window must be 1 or more/],
    [{ tau: 1.5 }, /tau must be at most 1/],
    [{ tau: [0, 0] }, /tau has 2 values, but the model has 3 layers/],
    [{ pageSize: 24 }, /page size must be 16, 32 or 64/],
    [{ slots: 3 }, /budget 128 selects 4 pages a head, but the engine has 3 slots/],
    [{ recall: "staged", orchestration: "captured" }, /recall "staged" is decided on the host/],
    [{ stagingBuffers: 5 }, /stagingBuffers must be at most 4/],
    [{ maxContext: 5000 }, /maxContext 5000 is over the model's limit of 4096/],
    [{ twin: { sheduleSeed: 1 } }, /sheduleSeed/],
    [{ device: "gpu" }, /device must be auto, cpu, cuda or cuda:N/],
  ] as [EngineOptions, RegExp][])
    await refused("BAD_ARGUMENT", text, () =>
      Engine.load(dir, { ...small, libraryPath: "/nowhere/libfreekv.so", ...options }),
    );

  await using engine = await load(dir);
  await refused("BAD_ARGUMENT", /polcy/, () => engine.prefill(ids.slice(0, 9), { polcy: "full" } as object));
  await refused("BAD_ARGUMENT", /pageSize/, () =>
    engine.prefill(ids.slice(0, 9), { pageSize: 32 } as object),
  );
  using sequence = await engine.prefill(ids.slice(0, 9));
  await refused("BAD_ARGUMENT", /maxTokens must be 1 or more/, () =>
    drain(sequence.generate({ maxTokens: 0 })),
  );
  await refused("BAD_ARGUMENT", /topP must be above 0/, () => drain(sequence.generate({ topP: 0 })));
  await refused("BAD_ARGUMENT", /minP/, () => drain(sequence.generate({ minP: 0.1 } as object)));
  await refused("BAD_ARGUMENT", /the prompt has no tokens/, () => sequence.append([]));
  await refused("BAD_ARGUMENT", /token 1 of the prompt is 96; the vocabulary has ids 0 to 95/, () =>
    sequence.append([5, 96]),
  );
  await refused("BAD_ARGUMENT", /token 0 of the prompt is 1\.5/, () => drain(sequence.score([1.5, 2])));
  await refused("BAD_ARGUMENT", /budget 64 is smaller/, () => sequence.fork({ budget: 64 }));
  for (const length of [0, 10, 2.5, Number.NaN])
    await refused("BAD_ARGUMENT", /the sequence has 9 tokens; give 1 to 9/, () => sequence.truncate(length));
  await refused("BAD_CHECKPOINT", /tokenizer\.json/, () => engine.prefill("text"));
  assertEquals([sequence.length, engine.stats().sequences], [9, 1]);
});

test("a context that is too long is refused before it begins", { timeout }, async () => {
  await using engine = await load(dir, { maxContext: 100 });
  await refused("CONTEXT_TOO_LONG", /101 tokens do not fit the context of 100/, () =>
    engine.prefill(ids.slice(0, 101)),
  );
  using sequence = await engine.prefill(ids.slice(0, 90));
  await refused("CONTEXT_TOO_LONG", /102 tokens do not fit/, () => sequence.append(ids.slice(0, 12)));
  await refused("CONTEXT_TOO_LONG", /101 tokens do not fit/, () => drain(sequence.score(ids.slice(0, 11))));
  const trace = await score(sequence, ids.slice(90, 100));
  assertEquals([trace.logprobs.length, sequence.length], [9, 100]);
  assertEquals((await generate(sequence, {})).argmax, []);
});

for (const orchestration of orchestrations) {
  test(`${orchestration}: BUSY while it runs, and where every sequence is alive`, { timeout }, async () => {
    await using engine = await load(dir, { orchestration, maxSequences: 2 });
    using sequence = await engine.prefill(ids.slice(0, 300));
    const expected = await scoreFrom(engine, ids.slice(0, 340), 300);
    let asked = 0;
    for await (const _ of sequence.score(ids.slice(300, 340))) {
      if (asked++) continue;
      await refused("BUSY", /still running/, () => sequence.append([1]));
      await refused("BUSY", /still running/, () => drain(sequence.score([5, 6])));
      await refused("BUSY", /still running/, () => sequence.fork());
      await refused("BUSY", /still running/, () => sequence.truncate(3));
      await refused("BUSY", /generate\(\) while the sequence is still running/, () =>
        drain(sequence.generate()),
      );
    }
    assertEquals(asked, expected.logprobs.length);
    sequence.truncate(300);
    const append = sequence.append(ids.slice(300, 320));
    await refused("BUSY", /still running/, () => sequence.truncate(3));
    await append;
    assertEquals(await score(sequence, ids.slice(320, 340)), await scoreFrom(engine, ids.slice(0, 340), 320));

    using second = sequence.fork();
    assertEquals(second.length, 340);
    await refused("BUSY", /all 2 sequences are alive; dispose one or raise maxSequences/, () =>
      engine.prefill([5]),
    );
    await refused("BUSY", /all 2/, () => sequence.fork());
    await refused("BUSY", /all 2/, () => engine.generate([5]).text());
    second[Symbol.dispose]();
    assertEquals(await scoreFrom(engine, ids.slice(0, 340), 300), expected);
  });

  test(`${orchestration}: a host pool that is exhausted names the way out and leaves everything as it was`, {
    timeout,
  }, async () => {
    await using engine = await load(dir, { orchestration, hostBytes: 40 * blockBytes + 100, tau: 0 });
    const message = /^host pool exhausted at \d+ of 40 pages; raise --host-bytes or shorten the context$/;
    const expected = await scoreFrom(engine, ids.slice(0, 330), 300);
    await refused("OUT_OF_MEMORY", message, () => engine.prefill(ids.slice(0, 41 * 16)));
    assertEquals([engine.stats().hostPages, engine.stats().sequences], [0, 0]);

    using sequence = await engine.prefill(ids.slice(0, 300));
    await refused("OUT_OF_MEMORY", message, () => sequence.append(ids.slice(0, 500)));
    assertEquals([sequence.length, engine.stats().hostPages], [300, 19]);
    using other = await engine.prefill(ids.slice(400, 400 + 20 * 16));
    // 39 of 40: a fork takes the last one for its incomplete page, and nobody may take another step into a new page.
    using fork = sequence.fork();
    await refused("OUT_OF_MEMORY", message, () => sequence.fork());
    assertEquals(engine.stats().sequences, 3);
    for (const run of [
      () => score(sequence, ids.slice(300, 330)),
      () => generate(sequence, { maxTokens: 20 }),
    ])
      await refused("OUT_OF_MEMORY", message, run);
    const { length } = sequence; // what fits the page that is begun
    assert(length > 300 && length <= 304, `${length}`);
    // To abort or to cut short takes no memory of one's own page.
    sequence.truncate(300);
    await refused("OUT_OF_MEMORY", message, () => generate(other, { maxTokens: 1 }));
    assertEquals(other.length, 320);
    other[Symbol.dispose]();
    assertEquals(await score(sequence, ids.slice(300, 330)), expected);
    assertEquals(await score(fork, ids.slice(300, 330)), expected);
    assertEquals(engine.stats().hostPages, 18 + 3 + 3);
    assertEquals(engine.stats().hostBytes, 40 * blockBytes);
  });

  test(`${orchestration}: one of a batch runs out of memory, the others go on`, { timeout }, async () => {
    await using engine = await load(dir, { orchestration, hostBytes: 41 * blockBytes });
    const expected = await scoreFrom(engine, ids.slice(0, 330), 312);
    const outcomes = await Promise.allSettled([
      scoreFrom(engine, ids.slice(0, 330), 312), // 20 pages, and soon one more
      scoreFrom(engine, ids.slice(300, 700), 306), // 20 pages, and none left for the one that it needs later
    ]);
    assertEquals(outcomes[0], { status: "fulfilled", value: expected });
    assertEquals(outcomes[1]?.status, "rejected");
    assertEquals((outcomes[1] as PromiseRejectedResult).reason.code, "OUT_OF_MEMORY");
    assertEquals(engine.stats().hostPages, 0);
  });

  test(`${orchestration}: score and append stop at an abort, within a step`, { timeout }, async () => {
    await using engine = await load(dir, { orchestration, tau: 0 });
    using sequence = await engine.prefill(ids.slice(0, 300));
    const reason = new Error("enough");
    const controller = new AbortController();
    let n = 0;
    const error = await assertRejects(async () => {
      for await (const _ of sequence.score(ids.slice(300, 400), { signal: controller.signal }))
        if (++n === 7) controller.abort(reason);
    });
    assert(error === reason);
    assertEquals(n, 7);
    assert(sequence.length >= 307 && sequence.length <= 309, `${sequence.length}`);
    const at = sequence.length;
    assertEquals((await score(sequence, ids.slice(at, at + 20))).logprobs.length, 19);

    sequence.truncate(300);
    const late = new AbortController();
    let chunks = 0;
    const cut = await assertRejects(() =>
      sequence.append(ids.slice(0, 300), {
        signal: late.signal,
        onProgress: () => {
          chunks++;
          late.abort(reason);
        },
      }),
    );
    assert(cut === reason);
    assertEquals([chunks > 0, sequence.length], [true, 300]);
    await assertRejects(() => engine.prefill(ids.slice(0, 30), { signal: AbortSignal.abort(reason) }));
    assertEquals([engine.stats().sequences, engine.stats().hostPages], [1, 19]);
    assertEquals(await score(sequence, ids.slice(300, 330)), await scoreFrom(engine, ids.slice(0, 330), 300));
  });

  test(`${orchestration}: what is disposed while it runs says so, and disturbs nobody`, {
    timeout,
  }, async () => {
    await using engine = await load(dir, { orchestration, maxSequences: 3, tau: 0 });
    const expected = await scoreFrom(engine, ids.slice(0, 360), 300);
    for (const run of ["score", "generate", "append"] as const) {
      const gone = await engine.prefill(ids.slice(200, 500));
      const neighbour = scoreFrom(engine, ids.slice(0, 360), 300);
      const running =
        run === "score"
          ? score(gone, ids.slice(0, 100))
          : run === "append"
            ? gone.append(ids, { onProgress: () => gone[Symbol.dispose]() }) // a GPU reads it before three turns are over
            : generate(gone, { maxTokens: 99 });
      const failing = refused("DISPOSED", /disposed/, () => running);
      for (let turn = 0; turn < 3; turn++) await new Promise((resolve) => setImmediate(resolve));
      gone[Symbol.dispose]();
      const next = scoreFrom(engine, ids.slice(0, 360), 300);
      await failing;
      assertEquals([await neighbour, await next], [expected, expected]);
      await refused("DISPOSED", /disposed/, () => gone.append([5]));
      await refused("DISPOSED", /disposed/, () => gone.fork());
      await refused("DISPOSED", /disposed/, () => drain(gone.score([5, 6])));
      gone[Symbol.dispose]();
    }
    assertEquals([engine.stats().sequences, engine.stats().hostPages], [0, 0]);
  });
}

test("an engine that is disposed ends what runs, and says so", { timeout }, async () => {
  for (const options of [{}, { orchestration: "host" }, { recall: "staged" }] as EngineOptions[]) {
    const engine = await load(dir, options);
    const sequence = await engine.prefill(ids.slice(0, 300));
    const outcomes = [
      score(sequence, tokens(3000)), // more than a GPU does while the prompts end
      engine.prefill(ids),
      engine.generate(ids, { ignoreEos: true }).text(),
    ].map((promise) =>
      promise.then(
        () => "done",
        (error: unknown) => (error instanceof FreeKVError ? error.code : String(error)),
      ),
    );
    await new Promise((resolve) => setImmediate(resolve));
    await engine[Symbol.asyncDispose]();
    await engine[Symbol.asyncDispose]();
    assertEquals((await Promise.all(outcomes))[0], "DISPOSED");
    assertThrows(() => engine.stats(), FreeKVError, "the engine was disposed");
    await refused("DISPOSED", /disposed/, () => sequence.append([5]));
    await refused("DISPOSED", /disposed/, () => engine.prefill([5]));
    sequence[Symbol.dispose]();
  }
});

test("what fails on the device reaches the caller, and the engine can still be disposed", {
  timeout,
  skip: twinOnly,
}, async () => {
  // Without this wait a conversion may come before its entries were written, which the twin refuses.
  for (let scheduleSeed = 1; ; scheduleSeed++) {
    const engine = await loadWithout(dir, "convert-after-fill", { recall: "staged", twin: { scheduleSeed } });
    const { code } = await scoreFrom(engine, ids.slice(0, 330), 300).then(
      () => ({ code: "none" }),
      (error: FreeKVError) => error,
    );
    if (code === "DEVICE_FAILED")
      await refused("DEVICE_FAILED", /dispose it and open it again/, () => engine.prefill(ids));
    await engine[Symbol.asyncDispose]();
    if (code === "DEVICE_FAILED") return;
    assert(scheduleSeed < 50);
  }
});

test("a load that the device has no memory for leaves no device behind", {
  timeout,
  skip: twinOnly || process.platform !== "linux",
}, async () => {
  const wide = checkpoint({ contextLength: 2 ** 31 - 1 });
  // Of a device, its threads are what can be counted from outside.
  const threads = (): number => readdirSync("/proc/self/task").length;
  await (await load(dir))[Symbol.asyncDispose]();
  const before = threads();
  for (let i = 0; i < 5; i++)
    await refused("OUT_OF_MEMORY", /device memory/, () => load(wide, { maxSequences: 32 }));
  assert(threads() <= before, `${threads()} threads, ${before} before`);
});

test("fifty sequences of every policy come and go, and nothing is left of them", { timeout }, async () => {
  for (const options of [{ orchestration: "captured" }, { recall: "staged" }] as const) {
    const loaded = await loadCore(dir, onTarget({ ...small, ...options }));
    await using engine = new Engine(loaded);
    const { device } = loaded.core;
    const policies = ["freekv", "full", "retrieve", "streaming", "quest"] as const;
    const life = async (i: number): Promise<void> => {
      using sequence = await engine.prefill(ids.slice(i, 100 + 13 * i), { policy: policies[i % 5] });
      await score(sequence, ids.slice(0, 5));
      using fork = sequence.fork({ policy: policies[(i + 1) % 5] });
      await generate(fork, { maxTokens: 3 });
      sequence.truncate(50 + i);
    };
    const measure = (): number[] => {
      const { allocatedBytes, pinnedBytes } = device.memory();
      return [allocatedBytes, pinnedBytes, engine.stats().hostPages, engine.stats().sequences];
    };
    for (let i = 0; i < 50; i++) await life(i);
    const before = measure();
    assertGreater(before[0] as number, 0);
    for (let i = 0; i < 50; i++) await life(i);
    assertEquals(measure(), before);
    assertEquals(before.slice(2), [0, 0]);
  }
});
