// Entries of the control ring.

import {
  FKV_CORRECT_EXACT,
  FKV_CORRECT_OFF,
  FKV_CORRECT_THRESHOLD,
  FKV_SPECULATE_LAZY,
  FKV_SPECULATE_NEXT,
  FKV_SPECULATE_NONE,
  pack,
} from "../../lib/device.ts";
import type { RowPlan } from "../reference/retrieval.ts";

export interface RigRow extends RowPlan {
  lane: number;
  position: number;
  token?: number;
  block?: number;
}

const corrections = { off: FKV_CORRECT_OFF, threshold: FKV_CORRECT_THRESHOLD, exact: FKV_CORRECT_EXACT };
const speculations = { none: FKV_SPECULATE_NONE, next: FKV_SPECULATE_NEXT, lazy: FKV_SPECULATE_LAZY };

/** A row into `buffer` at byte `at`; undefined is an empty row. */
export function packRow(buffer: ArrayBuffer, at: number, row: RigRow | undefined): void {
  const values = {
    seed: 0,
    sequence: row?.lane ?? -1,
    position: row?.position ?? 0,
    token: row?.token ?? 0,
    target: -1,
    block: row?.block ?? -1,
    correction: corrections[row?.correction ?? "off"],
    speculation: speculations[row?.speculation ?? "none"],
    prefetch: row?.prefetch ?? 0,
    top_k: 0,
    n_top: 0,
    temperature: 0,
    top_p: 1,
  };
  pack.fkv_row(values, { into: buffer, at });
}
