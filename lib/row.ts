// A row of the control ring: what one sequence does in one step.
import type { pack } from "../ffi/structs.ts";
import type { Lane } from "./lane.ts";

export type Row = Parameters<typeof pack.fkv_row>[0];

/** How the token after this one is drawn. */
export interface Sampling {
  temperature: number;
  topP: number;
  topK: number;
  seed: number;
  nTop: number;
}
export const greedy: Sampling = { temperature: 0, topP: 1, topK: 0, seed: 0, nTop: 0 };

/** An empty row writes nothing. */
export const emptyRow: Row = {
  seed: 0,
  sequence: -1,
  position: -1,
  token: -1,
  target: -1,
  block: -1,
  correction: 0,
  speculation: 0,
  prefetch: 0,
  top_k: 0,
  n_top: 0,
  temperature: 0,
  top_p: 1,
};

/** `token` −1: the one sampled last; `target` −1: the sampled token's log-probability; `block` −1: none. */
export function rowOf(
  lane: Lane,
  o: { position: number; token?: number; target?: number; block?: number; sampling?: Sampling },
): Row {
  const { plan } = lane;
  const sampling = o.sampling ?? greedy;
  return {
    seed: sampling.seed,
    sequence: lane.index,
    position: o.position,
    token: o.token ?? -1,
    target: o.target ?? -1,
    block: o.block ?? -1,
    correction: plan.correction,
    speculation: plan.speculation,
    prefetch: plan.prefetch,
    top_k: sampling.topK,
    n_top: sampling.nTop,
    temperature: sampling.temperature,
    top_p: sampling.topP,
  };
}
