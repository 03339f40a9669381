// Stats as a command reports them.
import type { Plan } from "../plan.ts";
import type { Stats } from "../types.ts";

/** Stats whose counts are null, too, where the policy has no such thing. */
export type ReportedStats = { [K in keyof Stats]: Stats[K] | null };

/** A policy that recalls nothing has no count of it. */
export function reported(stats: Stats, plan: Plan): ReportedStats {
  return plan.slots > 0 ? stats : { ...stats, recalledPages: null, recalledBytes: null };
}
