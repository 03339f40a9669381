// What every page of a walk holds, and when it lies where: in its window frame, then on the host. Until a page has left the
// window its host block holds rubbish, so that a copy from the wrong place shows.

import type { RigLane } from "./lane.ts";
import { Random } from "./random.ts";
import type { Rig } from "./rig.ts";

export class WalkPages {
  readonly #rig: Rig;
  readonly #seed: number;
  readonly #pages = new Map<string, Uint8Array[][]>();

  constructor(rig: Rig, seed: number) {
    this.#rig = rig;
    this.#seed = seed;
  }

  /** [layer][head]. */
  truth(lane: number, page: number): Uint8Array[][] {
    const key = `${lane} ${page}`;
    let pages = this.#pages.get(key);
    if (pages === undefined) {
      const random = new Random(this.#seed * 7919 + lane * 1009 + page);
      const { layers, kvHeads, headPageBytes } = this.#rig;
      const heads = (): Uint8Array[] => Array.from({ length: kvHeads }, () => random.bytes(headPageBytes));
      pages = Array.from({ length: layers }, heads);
      this.#pages.set(key, pages);
    }
    return pages;
  }

  /** Frame of a sink or window page. */
  frame(lane: number, page: number): number {
    const { sinkPages, windowPages } = this.#lane(lane);
    return page < sinkPages ? page : sinkPages + (page % (windowPages + 1));
  }

  /** The pages of a prompt, with that of the token to come. */
  prompt(lane: number, position: number): void {
    const rig = this.#rig;
    const { sinkPages, windowPages, resident } = this.#lane(lane);
    const last = Math.floor(position / rig.pageSize);
    rig.stream.synchronize();
    for (let page = 0; page <= last && !resident; page++) {
      const inWindow = page >= last - windowPages;
      if (page < sinkPages || inWindow) rig.fillFrame(lane, this.frame(lane, page), this.truth(lane, page));
      if (inWindow) rig.spoilBlock(rig.blockOf(lane, page));
      else rig.fillBlock(rig.blockOf(lane, page), this.truth(lane, page));
    }
  }

  /** With a page's first token it takes the frame of the one that left the window. */
  enter(lane: number, position: number): void {
    const page = position / this.#rig.pageSize;
    if (!Number.isInteger(page) || this.#lane(lane).resident) return;
    this.#rig.fillFrame(lane, this.frame(lane, page), this.truth(lane, page));
    this.#rig.stream.synchronize();
    this.#rig.spoilBlock(this.#rig.blockOf(lane, page));
  }

  /** The first retrieval that no longer finds a page in its window frame finds it on the host, and none before does. */
  leave(lane: number, position: number): void {
    const page = (position + 1) / this.#rig.pageSize - this.#lane(lane).windowPages - 1;
    if (!Number.isInteger(page) || page < 0 || this.#lane(lane).resident) return;
    this.#rig.fillBlock(this.#rig.blockOf(lane, page), this.truth(lane, page));
  }

  #lane(lane: number): RigLane {
    return this.#rig.lanes[lane] as RigLane;
  }
}
