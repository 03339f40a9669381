// What a policy means for one sequence's memory and control: pure arithmetic, in pages.
import {
  FKV_CORRECT_EXACT,
  FKV_CORRECT_OFF,
  FKV_CORRECT_THRESHOLD,
  FKV_SPECULATE_LAZY,
  FKV_SPECULATE_NEXT,
  FKV_SPECULATE_NONE,
} from "../ffi/constants.ts";
import { FreeKVError } from "./errors.ts";
import type { Policy } from "./options.ts";

/** How a policy is carried out. `k` selected pages and `slots` cached pages a KV head. */
export interface Plan {
  readonly sinkPages: number;
  readonly windowPages: number;
  readonly k: number;
  readonly slots: number;
  /** Every page has a frame of its own on the device (full, quest). */
  readonly resident: boolean;
  /** Attends to every page (full). */
  readonly attendAll: boolean;
  readonly correction: number;
  readonly speculation: number;
  readonly prefetch: number;
}

/** Errors: BAD_ARGUMENT where the engine's slots cannot hold the selection. */
export function planOf(p: Policy, pageSize: number, maxPages: number, engineSlots: number | undefined): Plan {
  const sinkPages = p.sink / pageSize;
  const resident = p.policy === "full" || p.policy === "quest";
  const selects = p.policy === "quest" || p.policy === "retrieve" || p.policy === "freekv";
  const k = selects ? Math.min((p.budget - p.sink - p.window) / pageSize, maxPages) : 0;
  if (engineSlots !== undefined && !resident && k > engineSlots)
    throw new FreeKVError(
      "BAD_ARGUMENT",
      `budget ${p.budget} selects ${k} pages a head, but the engine has ${engineSlots} slots; raise --slots or lower --budget`,
    );
  const speculates = p.policy === "freekv";
  const slots = resident || !selects ? 0 : Math.max(k, Math.min(engineSlots ?? 3 * k, maxPages));
  return {
    sinkPages,
    windowPages: p.policy === "streaming" ? (p.budget - p.sink) / pageSize : p.window / pageSize,
    k,
    slots,
    resident,
    attendAll: p.policy === "full",
    correction: !selects
      ? FKV_CORRECT_OFF
      : !speculates || p.correction === "exact"
        ? FKV_CORRECT_EXACT
        : p.correction === "threshold"
          ? FKV_CORRECT_THRESHOLD
          : FKV_CORRECT_OFF,
    speculation: !speculates ? FKV_SPECULATE_NONE : p.speculate ? FKV_SPECULATE_NEXT : FKV_SPECULATE_LAZY,
    prefetch: speculates ? Math.min(p.prefetch, slots - k) : 0,
  };
}
