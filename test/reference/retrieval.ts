// Retrieval as its formulas read, in float64 and plain lists: page scores, the check, and a head's slots as a cache.
// It shares nothing with the library but the meaning of its tables.

export interface LanePlan {
  sinkPages: number;
  windowPages: number;
  k: number;
  slots: number;
  /** Every page in its own frame, as quest has it: a selection, but no slots. */
  resident?: boolean;
  /** As full has it: nothing is selected. */
  attendAll?: boolean;
}

export type Stage = "now" | "next" | "first";
export interface RowPlan {
  correction: "off" | "threshold" | "exact";
  speculation: "none" | "next" | "lazy";
  prefetch: number;
}

/** How many pages from sinkPages on may be selected at a length. */
export function candidateCount(lane: LanePlan, length: number, pageSize: number): number {
  return Math.max(0, Math.floor(length / pageSize) - lane.windowPages - lane.sinkPages);
}

/** The page that is a candidate at `length` and was none one token before; undefined where there is none. */
export function joiningPage(lane: LanePlan, length: number, pageSize: number): number | undefined {
  const count = candidateCount(lane, length, pageSize);
  return count > candidateCount(lane, length - 1, pageSize) ? lane.sinkPages + count - 1 : undefined;
}

/** Whose query a head is served with in a stage; undefined: it is not served. */
export function servedWith(
  stage: Stage,
  row: RowPlan,
  lane: LanePlan,
  flagged: boolean,
  joins: boolean,
): "q" | "before" | undefined {
  if (lane.k === 0 || lane.attendAll) return undefined;
  if (stage === "now") return flagged ? "q" : row.speculation === "lazy" ? "before" : undefined;
  if (row.speculation !== "next") return undefined;
  return stage === "first" || row.prefetch > 0 || joins || !flagged ? "before" : undefined;
}

/** Mean over the group of cos(a, b); both hold one vector of `d` values per head of the group. NaN where one is zero. */
export function meanCosine(a: ArrayLike<number>, b: ArrayLike<number>, d: number): number {
  const group = a.length / d;
  let sum = 0;
  for (let h = 0; h < group; h++) {
    let ab = 0;
    let aa = 0;
    let bb = 0;
    for (let i = h * d; i < (h + 1) * d; i++) {
      ab += (a[i] as number) * (b[i] as number);
      aa += (a[i] as number) ** 2;
      bb += (b[i] as number) ** 2;
    }
    sum += ab / Math.sqrt(aa * bb);
  }
  return sum / group;
}

/** One page of one KV head: least and greatest value of each channel. */
export interface Digest {
  low: ArrayLike<number>;
  high: ArrayLike<number>;
}

/**
 * Scores of the pages for a group of queries (d values each), pooled. A page that scores NaN for one query head is NaN, and
 * no other page feels it.
 */
export function pageScores(
  queries: readonly ArrayLike<number>[],
  digests: readonly Digest[],
  scale: number,
  pooling: "softmax" | "raw",
): number[] {
  const perHead = queries.map((q) => {
    const scores = digests.map(({ low, high }) => {
      let score = 0;
      for (let c = 0; c < q.length; c++) {
        const x = q[c] as number;
        score += Math.max(x * (low[c] as number), x * (high[c] as number));
      }
      return score * scale;
    });
    if (pooling === "raw") return scores;
    const top = Math.max(...scores.filter((score) => !Number.isNaN(score)));
    const weights = scores.map((score) => Math.exp(score - top));
    const sum = weights.reduce((total, weight) => (Number.isNaN(weight) ? total : total + weight), 0);
    return weights.map((weight) => weight / sum);
  });
  return digests.map((_, page) => {
    return perHead.reduce((total, scores) => total + (scores[page] as number), 0) / queries.length;
  });
}

/** Indices of the scores, best first: score descending, index ascending, NaN last. */
export function ranking(scores: ArrayLike<number>): number[] {
  const order = Array.from(scores, (_, i) => i);
  const value = (i: number): number => (Number.isNaN(scores[i]) ? -Infinity : (scores[i] as number));
  return order.sort((a, b) => {
    const [nanA, nanB] = [Number.isNaN(scores[a]), Number.isNaN(scores[b])];
    if (nanA !== nanB) return nanA ? 1 : -1;
    return value(a) === value(b) ? a - b : value(b) - value(a);
  });
}

export interface Miss {
  page: number;
  slot: number;
  /** It is copied from its window frame. */
  moved: boolean;
}

export interface Counts {
  selected: number;
  hits: number;
  misses: number;
  moved: number;
  prefetched: number;
}

export interface Retrieved {
  pages: number[];
  slots: number[];
  misses: Miss[];
  counts: Counts;
}

/** One head of one layer of one lane. */
export class PlainHead {
  /** Page of each slot, −1 = empty. */
  readonly page: number[];
  /** Length at which each slot was last selected. */
  readonly used: number[];

  constructor(slots: number) {
    this.page = new Array<number>(slots).fill(-1);
    this.used = new Array<number>(slots).fill(0);
  }

  /** `ranks`: every candidate, best first. */
  retrieve(
    lane: LanePlan,
    length: number,
    ranks: readonly number[],
    prefetch: number,
    joining: number | undefined,
  ): Retrieved {
    const pages = ranks.slice(0, lane.k).sort((a, b) => a - b);
    const misses: Miss[] = [];
    const counts: Counts = { selected: pages.length, hits: 0, misses: 0, moved: 0, prefetched: 0 };
    if (lane.resident) return { pages, slots: pages.map(() => -1), misses, counts };

    const put = (page: number, slot: number): void => {
      this.page[slot] = page;
      misses.push({ page, slot, moved: page === joining });
    };
    for (const page of pages) {
      let slot = this.page.indexOf(page);
      if (slot >= 0) counts.hits++;
      else {
        slot = this.#victim((s) => !pages.includes(this.page[s] as number)) as number;
        put(page, slot);
        if (page === joining) counts.moved++;
        else counts.misses++;
      }
    }
    const slots = pages.map((page) => this.page.indexOf(page));
    for (const slot of slots) this.used[slot] = length;

    for (const page of prefetch > 0 ? ranks.slice(lane.k, lane.k + prefetch) : []) {
      if (this.page.includes(page)) continue;
      const idle = (s: number): boolean => this.page[s] === -1 || (this.used[s] as number) + 8 <= length;
      const slot = this.#victim((s) => !slots.includes(s) && idle(s));
      if (slot === undefined) break;
      put(page, slot);
      this.used[slot] = length - 4;
      counts.prefetched++;
    }
    return { pages, slots, misses, counts };
  }

  /** Of the slots allowed, the one used longest ago, the lowest of several. */
  #victim(allowed: (slot: number) => boolean): number | undefined {
    let best: number | undefined;
    for (let slot = 0; slot < this.page.length; slot++) {
      if (!allowed(slot)) continue;
      if (best === undefined || (this.used[slot] as number) < (this.used[best] as number)) best = slot;
    }
    return best;
  }
}
