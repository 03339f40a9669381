// A prompt on its way into a sequence, and the chunks in which it gets there.
import type { Pages } from "./copier.ts";
import type { Core } from "./core.ts";
import type { Lane } from "./lane.ts";

export interface Change {
  /** Takes the place of the sequence's lane when all is done. */
  readonly lane: Lane;
  /** Blocks taken for it. */
  readonly added: readonly number[];
  /** Blocks of the whole. */
  readonly blocks: readonly number[];
  readonly start: number;
  /** The incomplete page that it continues. */
  readonly partial: Pages | null;
}

interface Chunk {
  /** Issues it; how many of the prompt's tokens have been issued then. */
  readonly issue: () => number;
  /** Blocks of the pages that it completes, which have to be ready before it is issued. */
  readonly finishes: readonly number[];
}

/** The chunks of a prompt, each up to the next multiple of the engine's chunk, in the order in which they are to be issued. */
export function* chunksOf(core: Core, change: Change, ids: Int32Array): Generator<Chunk> {
  const { blocks, start, lane } = change;
  const { pageSize } = core.geometry;
  const total = start + ids.length;
  const { chunkTokens } = core.prefill;
  for (let at = start; at < total; ) {
    const from = at;
    const end = Math.min(total, (Math.floor(from / chunkTokens) + 1) * chunkTokens);
    const issue = (): number => {
      core.prefill.chunk({
        start: from,
        ids: ids.slice(from - start, end - start),
        blocks,
        partial: from === start ? change.partial : null,
        lane: end === total ? lane : null,
      });
      return end - start;
    };
    yield { issue, finishes: blocks.slice(Math.floor(from / pageSize), Math.floor(end / pageSize)) };
    at = end;
  }
}
