// Counts of a sequence, and what they say of it as Stats.
import { FKV_CORRECT_OFF } from "../ffi/constants.ts";
import type { Geometry } from "./geometry.ts";
import type { Plan } from "./plan.ts";
import type { Stats } from "./types.ts";

/** What one step of one row counted: the fields of `fkv_counters`. */
export interface Counters {
  heads: number;
  flagged: number;
  selected: number;
  hits: number;
  misses_now: number;
  misses_next: number;
  moved: number;
  prefetched: number;
}

export class Tally {
  #heads = 0;
  #flagged = 0;
  #hits = 0;
  #misses = 0;
  #recalled = 0;
  #stallMs = 0;
  #ttftMs: number | null = null;
  #decodeMs = 0;
  #decoded = 0;

  step(c: Counters, stallMs: number): void {
    this.#heads += c.heads;
    this.#flagged += c.flagged;
    this.#hits += c.hits;
    this.#misses += c.misses_now + c.misses_next;
    this.#recalled += c.misses_now + c.misses_next + c.prefetched;
    this.#stallMs += stallMs;
  }
  firstToken(ms: number): void {
    this.#ttftMs = ms;
  }
  laterToken(ms: number): void {
    this.#decodeMs += ms;
    this.#decoded++;
  }

  stats(plan: Plan, g: Geometry, deviceKvBytes: number, length: number): Stats {
    const recalls = plan.slots > 0;
    return {
      ttftMs: this.#ttftMs,
      tpotMs: this.#decoded ? this.#decodeMs / this.#decoded : null,
      stallMs: recalls ? this.#stallMs : null,
      recalledPages: this.#recalled,
      recalledBytes: this.#recalled * g.headPageBytes,
      hitRate: recalls && this.#hits + this.#misses > 0 ? this.#hits / (this.#hits + this.#misses) : null,
      correctedShare: plan.correction !== FKV_CORRECT_OFF && this.#heads ? this.#flagged / this.#heads : null,
      deviceKvBytes,
      totalKvBytes: Math.ceil(length / g.pageSize) * g.blockBytes,
    };
  }
}

/** Sums and means over sequences. */
export function sumStats(all: readonly Stats[]): Stats {
  const known = (pick: (s: Stats) => number | null): number[] => all.map(pick).filter((x) => x !== null);
  const sum = (xs: readonly number[]): number => xs.reduce((a, b) => a + b, 0);
  const mean = (xs: readonly number[]): number | null => (xs.length ? sum(xs) / xs.length : null);
  const stalls = known((s) => s.stallMs);
  return {
    ttftMs: mean(known((s) => s.ttftMs)),
    tpotMs: mean(known((s) => s.tpotMs)),
    stallMs: stalls.length ? sum(stalls) : null,
    recalledPages: sum(known((s) => s.recalledPages)),
    recalledBytes: sum(known((s) => s.recalledBytes)),
    hitRate: mean(known((s) => s.hitRate)),
    correctedShare: mean(known((s) => s.correctedShare)),
    deviceKvBytes: sum(known((s) => s.deviceKvBytes)),
    totalKvBytes: sum(known((s) => s.totalKvBytes)),
  };
}
