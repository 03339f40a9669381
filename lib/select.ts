// Stage: which pages each head attends to next (estimate, then top-k and slots). Source: Quest §3, FreeKV §4.
import type { Cache, Workspace } from "./cache.ts";
import type { Device, Stream } from "./device.ts";

/** Scores the candidates for the heads that `stage` serves, selects, and lists the misses in `workspace`. */
export function select(
  device: Device,
  cache: Cache,
  workspace: Workspace,
  qkv: number,
  layer: number,
  stage: number,
  rows: number,
  stream: Stream,
): void {
  device.lib.fkv_estimate(cache.packed, workspace.packed, qkv, layer, stage, rows, stream.handle);
  device.lib.fkv_select(cache.packed, workspace.packed, layer, stage, rows, stream.handle);
}
