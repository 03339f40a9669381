// The device state of one lane: allocated, emptied and packed as the ABI has it.

import { pack } from "../../lib/device.ts";
import type { LanePlan } from "../reference/retrieval.ts";
import type { Memory } from "./memory.ts";

export interface RigLane extends LanePlan {
  /** One a layer; 0.8 if absent. */
  tau?: number[];
}

/** Addresses. */
export interface LaneTables {
  nFrames: number;
  frames: number;
  qPrev: number;
  slotPage: number;
  slotUsed: number;
  nSelected: number;
  selectedPage: number;
  selectedSlot: number;
}

interface Shape extends Memory {
  readonly layers: number;
  readonly kvHeads: number;
  readonly group: number;
  readonly headDim: number;
  readonly maxPages: number;
  readonly frameBytes: number;
}

/** Slots are empty, frames undefined, everything else zero. */
export function laneTables(rig: Shape, lane: RigLane): LaneTables {
  const nFrames = lane.resident ? rig.maxPages : lane.sinkPages + lane.windowPages + 1 + lane.slots;
  const heads = rig.layers * rig.kvHeads;
  const table = (width: number): number => rig.zeroed(4 * Math.max(1, heads * width)).address;
  const slotPage = table(lane.slots);
  rig.stream.memset(slotPage, 0xff, 4 * heads * lane.slots);
  return {
    nFrames,
    frames: rig.device.alloc(rig.layers * nFrames * rig.frameBytes).address,
    qPrev: table(rig.group * rig.headDim),
    slotPage,
    slotUsed: table(lane.slots),
    nSelected: table(1),
    selectedPage: table(lane.k),
    selectedSlot: table(lane.k),
  };
}

export function packLane(rig: Shape, lane: RigLane, tables: LaneTables): ArrayBuffer {
  const tau = rig.device.alloc(4 * rig.layers);
  rig.stream.write(
    tau,
    Float32Array.from({ length: rig.layers }, (_, l) => lane.tau?.[l] ?? 0.8),
  );
  return pack.fkv_lane({
    frames: tables.frames,
    q_prev: tables.qPrev,
    logits: null,
    tau,
    slot_page: tables.slotPage,
    slot_used: tables.slotUsed,
    n_selected: tables.nSelected,
    selected_page: tables.selectedPage,
    selected_slot: tables.selectedSlot,
    n_frames: tables.nFrames,
    sink_pages: lane.sinkPages,
    window_pages: lane.windowPages,
    k: lane.k,
    n_slots: lane.slots,
    resident: lane.resident ? 1 : 0,
    attend_all: lane.attendAll ? 1 : 0,
  });
}
