// Which positions a policy attends to, in float64 and from its definition: sink, window, and the best pages by the query of
// this step or, of a head that is not flagged, by that of the step before. No slots, no recall, no steps.

import type { Visible } from "./model.ts";
import { candidateCount, meanCosine, pageScores, ranking } from "./retrieval.ts";

export interface PolicyReference {
  /** Positions below it are prefilled: they attend to everything. */
  prompt: number;
  pageSize: number;
  sinkPages: number;
  windowPages: number;
  /** Selected pages a head; 0 drops what is outside sink and window. */
  k: number;
  /** A head selects with this step's query where its mean cosine is not at least this: 1 is nearly always, −1 never. */
  tau: number;
  /** Called with the smallest gap between the last page selected and the first that is not, as a share of its score. */
  onGap?: (gap: number) => void;
  onHead?: (flagged: boolean) => void;
}

export function visibleUnder(p: PolicyReference): Visible {
  const digests = new Map<string, { low: number[]; high: number[] }>();
  return ({ layer, kvHead, position, queries, before, key }) => {
    if (position < p.prompt) return undefined;
    const digest = (page: number): { low: number[]; high: number[] } => {
      const name = `${layer} ${kvHead} ${page}`;
      let found = digests.get(name);
      if (!found) {
        const keys = Array.from({ length: p.pageSize }, (_, i) => key(page * p.pageSize + i));
        const channel = (c: number): number[] => keys.map((each) => each[c] as number);
        const channels = Array.from({ length: key(0).length }, (_, c) => channel(c));
        found = { low: channels.map((x) => Math.min(...x)), high: channels.map((x) => Math.max(...x)) };
        digests.set(name, found);
      }
      return found;
    };
    const n = candidateCount({ ...p, slots: 0 }, position + 1, p.pageSize);
    const flat = (parts: Float64Array[]): number[] => parts.flatMap((part) => Array.from(part));
    const flagged = !(meanCosine(flat(queries), flat(before), key(0).length) >= p.tau);
    let selected = Array.from({ length: n }, (_, i) => i);
    if (n > p.k) {
      const scale = 1 / Math.sqrt(key(0).length);
      const candidates = selected.map((i) => digest(p.sinkPages + i));
      const scores = pageScores(flagged ? queries : before, candidates, scale, "softmax");
      const order = ranking(scores);
      const [last, next] = [
        scores[order[p.k - 1] as number] as number,
        scores[order[p.k] as number] as number,
      ];
      if (p.k > 0) p.onGap?.((last - next) / last);
      selected = order.slice(0, p.k);
    }
    if (p.k > 0) p.onHead?.(flagged);
    const pages = new Set(selected.map((i) => p.sinkPages + i));
    return (at) => {
      const page = Math.floor(at / p.pageSize);
      return page < p.sinkPages || page >= p.sinkPages + n || pages.has(page);
    };
  };
}
