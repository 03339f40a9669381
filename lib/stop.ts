// Stop strings in streamed text: what may still become one is held back.

export class StopFilter {
  readonly #stops: readonly string[];
  #held = "";
  constructor(stops: readonly string[]) {
    this.#stops = stops;
  }

  /** Takes more text; returns what is surely before any stop string, and whether one was completed. */
  push(text: string): { text: string; stopped: boolean } {
    const all = this.#held + text;
    const at = Math.min(...this.#stops.map((stop) => all.indexOf(stop)).filter((i) => i >= 0));
    if (at !== Number.POSITIVE_INFINITY) {
      this.#held = "";
      return { text: all.slice(0, at), stopped: true };
    }
    const kept = Math.max(0, ...this.#stops.map((stop) => overlap(all, stop)));
    this.#held = all.slice(all.length - kept);
    return { text: all.slice(0, all.length - kept), stopped: false };
  }

  /** What was held back, when no more text comes. */
  end(): string {
    const text = this.#held;
    this.#held = "";
    return text;
  }
}

/** Length of the longest end of `text` that begins `stop`. */
function overlap(text: string, stop: string): number {
  for (let n = Math.min(text.length, stop.length - 1); n > 0; n--)
    if (text.endsWith(stop.slice(0, n))) return n;
  return 0;
}
