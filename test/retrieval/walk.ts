// A rig and the plain model in lockstep over decode steps: what every operation left behind is compared with what the rules say.

import { assert, assertEquals } from "@std/assert";
import {
  candidateCount,
  joiningPage,
  PlainHead,
  type Retrieved,
  type RowPlan,
  ranking,
  type Stage,
  servedWith,
} from "../reference/retrieval.ts";
import type { RigLane } from "./lane.ts";
import { WalkPages } from "./pages.ts";
import { Random } from "./random.ts";
import { Rig, type RigOptions, type RowCounters } from "./rig.ts";

export interface WalkRow extends RowPlan {
  /** Position of the first token fed. */
  start: number;
}
export interface WalkOptions extends RigOptions {
  /** Row i is lane i's. */
  rows: WalkRow[];
  seed: number;
  /** How far a head's q turns a step; about half of the heads are flagged at 0.5 and τ = 0.8. */
  turn?: number;
  /** Whether a lane's row is empty in a step: the lane keeps still. */
  absent?: (step: number, lane: number) => boolean;
}

const zero = (): RowCounters => ({
  heads: 0,
  flagged: 0,
  selected: 0,
  hits: 0,
  missesNow: 0,
  missesNext: 0,
  moved: 0,
  prefetched: 0,
});

export class Walk implements Disposable {
  readonly rig: Rig;
  readonly heads: PlainHead[][];
  /** Over all steps and rows. */
  readonly totals: RowCounters = zero();
  /** The pages that each head attended, step by step. */
  readonly attended: number[][] = [];
  readonly #rows: WalkRow[];
  readonly #random: Random;
  readonly #turn: number;
  readonly #queries: Float32Array[];
  readonly #pages: WalkPages;
  readonly #absent: (step: number, lane: number) => boolean;
  readonly #positions: number[];
  #counts: RowCounters[] = [];
  #step = 0;

  constructor(options: WalkOptions) {
    const rig = new Rig(options);
    this.rig = rig;
    this.#rows = options.rows;
    this.#random = new Random(options.seed);
    this.#pages = new WalkPages(rig, options.seed);
    this.#turn = options.turn ?? 0.5;
    this.#absent = options.absent ?? (() => false);
    this.#positions = options.rows.map(({ start }) => start);
    const perLane = rig.layers * rig.kvHeads;
    this.heads = rig.lanes.map((lane) => Array.from({ length: perLane }, () => new PlainHead(lane.slots)));
    this.#queries = rig.lanes.map(() =>
      this.#random.normals(rig.layers * rig.group * rig.kvHeads * rig.headDim),
    );
    rig.mapBlocks();
    this.#writeDigests();
    for (const lane of rig.lanes.keys()) {
      rig.stream.copy((rig.tables[lane] as { qPrev: number }).qPrev, this.#queries[lane] as Float32Array);
      this.#pages.prompt(lane, this.#position(lane));
    }
    rig.stream.synchronize();
  }

  #writeDigests(): void {
    const { rig } = this;
    const perHead = 2 * rig.headDim;
    const values = new Float32Array(rig.digests.bytes / 4);
    assertEquals(rig.elementBytes, 4, "walks take f32");
    for (let at = 0; at < values.length; at += perHead) {
      for (let c = 0; c < rig.headDim; c++) {
        const [a, b] = [this.#random.normal(), this.#random.normal()];
        values[at + c] = Math.min(a, b);
        values[at + rig.headDim + c] = Math.max(a, b);
      }
    }
    rig.stream.copy(rig.digests, values);
    rig.stream.synchronize();
  }

  #lane(lane: number): RigLane {
    return this.rig.lanes[lane] as RigLane;
  }
  #row(lane: number): WalkRow {
    return this.#rows[lane] as WalkRow;
  }
  #position(lane: number): number {
    return this.#positions[lane] as number;
  }

  /** Fills about two thirds of the slots with pages of the prompt, as some past could have left them. */
  scatterSlots(random: Random): void {
    const { rig } = this;
    for (const [lane, { sinkPages, windowPages, slots, resident }] of rig.lanes.entries()) {
      if (resident) continue;
      const onHost = Math.floor(this.#position(lane) / rig.pageSize) - windowPages - sinkPages;
      const heads = this.heads[lane] as PlainHead[];
      for (const head of heads) {
        const pages = random.shuffled(Array(Math.max(0, onHost)).keys()).slice(0, Math.ceil((slots * 2) / 3));
        for (const [i, slot] of random.shuffled(Array(slots).keys()).slice(0, pages.length).entries()) {
          head.page[slot] = sinkPages + (pages[i] as number);
          head.used[slot] = random.below(this.#position(lane));
        }
      }
      const tables = rig.tables[lane] as { slotPage: number; slotUsed: number };
      rig.stream.copy(tables.slotPage, Int32Array.from(heads.flatMap((head) => head.page)));
      rig.stream.copy(tables.slotUsed, Int32Array.from(heads.flatMap((head) => head.used)));
      for (let slot = 0; slot < slots; slot++) {
        const held = Array.from({ length: rig.layers }, (_, layer) =>
          Array.from({ length: rig.kvHeads }, (_, h) => {
            const page = heads[layer * rig.kvHeads + h]?.page[slot] as number;
            return this.#pages.truth(lane, Math.max(0, page))[layer]?.[h] as Uint8Array;
          }),
        );
        rig.fillFrame(lane, sinkPages + windowPages + 1 + slot, held);
      }
    }
    rig.stream.synchronize();
  }

  /** The selection that the first step starts from. */
  first(): void {
    this.#begin();
    for (let layer = 0; layer < this.rig.layers; layer++) this.#retrieve("first", layer);
    this.#end();
  }

  /** One decode step of every row. */
  step(): void {
    const { rig } = this;
    this.#begin();
    for (const lane of this.#present()) this.#pages.enter(lane, this.#position(lane));
    for (let layer = 0; layer < rig.layers; layer++) {
      this.#newQueries(layer);
      rig.check(layer, this.#rows.length);
      this.#retrieve("now", layer);
      this.#checkContents(layer);
      for (const lane of this.#present()) rig.keepQuery(lane, lane, layer);
    }
    rig.stream.synchronize();
    for (const lane of this.#present()) this.#pages.leave(lane, this.#position(lane));
    for (let layer = 0; layer < rig.layers; layer++) this.#retrieve("next", layer);
    this.#end();
    for (const lane of this.#present()) this.#positions[lane] = this.#position(lane) + 1;
    this.#step++;
  }

  /** Lanes whose rows are not empty in this step. */
  #present(): number[] {
    return [...this.rig.lanes.keys()].filter((lane) => !this.#absent(this.#step, lane));
  }

  #begin(): void {
    const { rig } = this;
    const present = this.#present();
    rig.load(
      rig.lanes.map((_, lane) => {
        return present.includes(lane)
          ? { ...this.#row(lane), lane, position: this.#position(lane) }
          : undefined;
      }),
    );
    this.#counts = rig.lanes.map(zero);
  }

  #newQueries(layer: number): void {
    const { rig } = this;
    const width = rig.group * rig.kvHeads * rig.headDim;
    const qkv = new Float32Array(rig.qkvWidth * rig.lanes.length);
    for (const [lane, all] of this.#queries.entries()) {
      const q = all.subarray(layer * width, (layer + 1) * width);
      for (let i = 0; i < width; i += rig.group * rig.headDim) {
        const turn = this.#turn * 2 * this.#random.next();
        for (let c = i; c < i + rig.group * rig.headDim; c++) {
          q[c] = ((q[c] as number) + turn * this.#random.normal()) / Math.sqrt(1 + turn * turn);
        }
      }
      qkv.set(q, lane * rig.qkvWidth);
    }
    rig.stream.copy(rig.qkv, qkv);
  }

  #retrieve(stage: Stage, layer: number): void {
    const { rig } = this;
    const n = rig.lanes.length;
    rig.estimate(stage, layer, n);
    rig.select(stage, layer, n);
    rig.gather(stage, layer, n);
    const flags = rig.bytes(rig.flags.address + layer * rig.maxRows * rig.kvHeads, n * rig.kvHeads);
    const scores = rig.floats(rig.workspaceOf(stage).scores, n * rig.kvHeads * rig.maxPages);
    const misses = rig.misses(stage, n);
    for (const [lane, plan] of rig.lanes.entries()) {
      const row = this.#row(lane);
      if (!this.#present().includes(lane)) {
        assertEquals(misses[lane], Array(rig.kvHeads).fill([]), "an empty row misses nothing");
        continue;
      }
      const length = this.#position(lane) + (stage === "next" ? 2 : 1);
      const joining = joiningPage(plan, length, rig.pageSize);
      const count = candidateCount(plan, length, rig.pageSize);
      const state = rig.state(lane);
      if (stage === "now")
        this.#countFlags(lane, flags.subarray(lane * rig.kvHeads, (lane + 1) * rig.kvHeads));
      for (let head = 0; head < rig.kvHeads; head++) {
        const what = `step ${this.#step} ${stage} lane ${lane} layer ${layer} head ${head}`;
        const list = misses[lane]?.[head] ?? [];
        const flagged = flags[lane * rig.kvHeads + head] === 1;
        if (servedWith(stage, row, plan, flagged, joining !== undefined) === undefined) {
          assertEquals(list, [], `${what}: misses of a head not served`);
          continue;
        }
        const at = (lane * rig.kvHeads + head) * rig.maxPages;
        const ranks = count <= plan.k ? [...Array(count).keys()] : ranking(scores.subarray(at, at + count));
        const index = layer * rig.kvHeads + head;
        const model = (this.heads[lane] as PlainHead[])[index] as PlainHead;
        const prefetch = stage === "next" ? row.prefetch : 0;
        const pages = ranks.map((rank) => plan.sinkPages + rank);
        const expected = model.retrieve(plan, length, pages, prefetch, joining);
        this.#count(lane, stage, stage === "next" && flagged, expected);
        const part = (table: Int32Array, width: number, n = width): number[] => [
          ...table.subarray(index * width, index * width + n),
        ];
        assertEquals(state.nSelected[index], expected.pages.length, what);
        assertEquals(part(state.selectedPage, plan.k, expected.pages.length), expected.pages, what);
        assertEquals(part(state.selectedSlot, plan.k, expected.pages.length), expected.slots, what);
        if (!plan.resident) {
          assertEquals(part(state.slotPage, plan.slots), model.page, what);
          assertEquals(part(state.slotUsed, plan.slots), model.used, what);
        }
        const wanted = expected.misses.map(({ page, slot, moved }) => ({
          page,
          slot,
          block: rig.blockOf(lane, page),
          frame: moved ? this.#pages.frame(lane, page) : -1,
        }));
        assertEquals(list, wanted, what);
      }
    }
  }

  #countFlags(lane: number, flags: Uint8Array): void {
    const { k, attendAll } = this.#lane(lane);
    if (k === 0 || attendAll || this.#row(lane).speculation === "none") return;
    const counts = this.#counts[lane] as RowCounters;
    counts.heads += flags.length;
    for (const flag of flags) counts.flagged += flag;
  }

  /** `again`: this head selected with the same q before, so its pages count only once. */
  #count(lane: number, stage: Stage, again: boolean, { counts }: Retrieved): void {
    const row = this.#counts[lane] as RowCounters;
    if (!again) row.selected += counts.selected;
    if (!again) row.hits += counts.hits;
    row[stage === "now" ? "missesNow" : "missesNext"] += counts.misses;
    row.moved += counts.moved;
    row.prefetched += counts.prefetched;
  }

  /** Before attention every selected page is in its slot, byte for byte. */
  #checkContents(layer: number): void {
    const { rig } = this;
    for (const [lane, plan] of rig.lanes.entries()) {
      if (plan.resident || plan.k === 0) continue;
      const { nSelected, selectedPage, selectedSlot } = rig.state(lane);
      const frames = rig.frames(lane, layer);
      for (let head = 0; head < rig.kvHeads; head++) {
        const index = layer * rig.kvHeads + head;
        const first = index * plan.k;
        this.attended.push([...selectedPage.subarray(first, first + (nSelected[index] as number))]);
        for (let i = 0; i < (nSelected[index] as number); i++) {
          const page = selectedPage[index * plan.k + i] as number;
          const slot = selectedSlot[index * plan.k + i] as number;
          const found = frames(plan.sinkPages + plan.windowPages + 1 + slot, head);
          const truth = this.#pages.truth(lane, page)[layer]?.[head] as Uint8Array;
          assert(
            Buffer.compare(found, truth) === 0,
            `step ${this.#step} lane ${lane} page ${page}: wrong bytes`,
          );
        }
      }
    }
  }

  #end(): void {
    for (const [lane, expected] of this.#counts.entries()) {
      assertEquals(this.rig.counters(lane), expected, `step ${this.#step}: counters of lane ${lane}`);
      for (const name of Object.keys(expected) as (keyof RowCounters)[]) this.totals[name] += expected[name];
    }
  }

  [Symbol.dispose](): void {
    this.rig[Symbol.dispose]();
  }
}
