/// <reference lib="esnext.disposable" preserve="true" />
// What real selections say of slots and prefetch: the demo model has read a book and is asked about it.

import { demoModel } from "../../lib/demo.ts";
import type { PolicyOptions } from "../../lib/types.ts";
import { spread } from "../measure.ts";
import { material, Reader, type Steps } from "../replay.ts";
import type { Run } from "./run.ts";

const pageSize = 32;
const prefetches = [4, 8, 16];

/** A budget of a sixteenth of the book, as 2048 tokens are of 32K. */
function sizes(bookTokens: number) {
  const budget = Math.floor(bookTokens / 16 / pageSize) * pageSize;
  const [sink, window] = [64, 128];
  return { budget, sink, window, k: (budget - sink - window) / pageSize };
}

/** Rows on recalled bytes by slots, and on what prefetch saves. */
export async function selections(run: Run): Promise<void> {
  const tiny = run.shape.name === "tiny";
  const bookTokens = tiny ? 4096 : 16_000;
  const made = await material(demoModel, bookTokens, tiny ? 16 : 256);
  const { k, ...budget } = sizes(bookTokens);
  const at = `demo model, ${made.book.length} tokens, ${made.asked.length} steps`;
  let least: number | undefined;
  for (const m of [1, 2, 3, 4]) {
    run.say(`demo model, m = ${m}k`);
    await using reader = await Reader.open(made, {
      ...{
        device: run.device as "auto",
        pageSize,
        slots: m * k,
        maxContext: bookTokens + 1280,
        maxSequences: 2,
      },
      ...budget,
    });
    const { headPageBytes } = reader.core.geometry;
    const kib = (steps: Steps, what: (c: Steps["counters"]) => number): number =>
      (what(steps.counters) * headPageBytes) / steps.wallMs.length / 1024;
    const all = (c: Steps["counters"]): number => c.misses_now + c.misses_next + c.prefetched;
    if (run.wants(12)) {
      const steps = await reader.feed({});
      const bytes = kib(steps, all);
      least ??= bytes;
      run.emit({
        ...{ row: 12, case: `recalled a step, m = ${m}k, ${at}`, unit: "KiB", value: bytes },
        against: { value: least, is: "m = k" },
        note: `${kib(steps, (c) => c.misses_now).toFixed(1)} KiB of it before attention; ${((100 * steps.counters.flagged) / steps.counters.heads).toFixed(1)}% of heads flagged`,
      });
    }
    if (run.wants(4) && m > 1) await prefetch(run, reader, at, m, k, kib);
  }
}

async function prefetch(
  run: Run,
  reader: Reader,
  at: string,
  m: number,
  k: number,
  kib: (steps: Steps, what: (c: Steps["counters"]) => number) => number,
): Promise<void> {
  const cases: PolicyOptions[] = [{ correction: "exact" }, { correction: "threshold" }];
  for (const policy of cases) {
    const feed = async (ahead: number): Promise<Steps> => reader.feed({ ...policy, prefetch: ahead });
    const none = await feed(0);
    const before = kib(none, (c) => c.misses_now);
    const alone = spread(none.wallMs).median;
    for (const ahead of prefetches.filter((e) => e <= (m - 1) * k)) {
      const steps = await feed(ahead);
      run.emit({
        ...{
          row: 4,
          case: `recalled before attention, ${policy.correction}, prefetch ${ahead}, m = ${m}k, ${at}`,
        },
        ...{ unit: "KiB", value: kib(steps, (c) => c.misses_now) },
        against: { value: before, is: "without prefetch" },
        note: `${kib(steps, (c) => c.prefetched).toFixed(1)} KiB prefetched; step of ${spread(steps.wallMs).median.toFixed(3)} ms, without ${alone.toFixed(3)}`,
      });
    }
  }
}
