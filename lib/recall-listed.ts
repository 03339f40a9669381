/// <reference lib="esnext.disposable" preserve="true" />
// Recall by the host: TypeScript reads the miss list from pinned memory and issues the copies itself. What the staged path
// (the paper's) and the fragmented one (the baseline's) share.
import { offsets, size } from "../ffi/structs.ts";
import type { Cache, Workspace } from "./cache.ts";
import type { Device, Event, PinnedBuffer, Stream } from "./device.ts";
import type { Strides } from "./geometry.ts";
import type { Lane } from "./lane.ts";
import type { InFlight, Lanes, Recall } from "./recall.ts";
import type { Waits } from "./waits.ts";

/** A head page to bring to `slotFrame` of the lane: from host block `block`, or from `frame` of the lane where that is >= 0. */
export interface Miss {
  lane: Lane;
  head: number;
  slot: number;
  slotFrame: number;
  block: number;
  frame: number;
}

interface Ticket extends InFlight {
  layer: number;
  lanes: Lanes;
  listed: Event;
  done: Event;
  list: PinnedBuffer;
  issued: boolean;
}

export abstract class ListedRecall implements Recall {
  protected readonly device: Device;
  protected readonly cache: Cache;
  protected readonly waits: Waits;
  /** Host to device copies. */
  protected readonly copies: Stream;
  readonly #queue: Ticket[] = [];
  readonly #events = new Map<Workspace, { listed: Event; done: Event }[]>();
  readonly #lists = new Map<Workspace, (PinnedBuffer | undefined)[]>();

  constructor(device: Device, cache: Cache, waits: Waits) {
    this.device = device;
    this.cache = cache;
    this.waits = waits;
    this.copies = device.stream();
    for (const workspace of [cache.now, cache.next]) {
      this.#events.set(
        workspace,
        Array.from({ length: cache.geometry.layers }, () => ({
          listed: device.event(),
          done: device.event(),
        })),
      );
      this.#lists.set(workspace, []);
    }
  }

  /** Issues the copies of one layer's misses and records `done` behind them. */
  protected abstract bring(misses: readonly Miss[], layer: number, done: Event): void;

  start(workspace: Workspace, layer: number, lanes: Lanes, on: Stream): InFlight {
    const { kvHeads } = this.cache.geometry;
    const heads = lanes.length * kvHeads;
    const slots = Math.max(1, ...lanes.map((lane) => lane?.plan.slots ?? 0));
    const list = this.#list(workspace, layer, heads * (4 + slots * size.fkv_miss));
    on.copy(list, workspace.nMisses.address, 4 * heads);
    on.copy2d(
      list.address + 4 * heads,
      slots * size.fkv_miss,
      workspace.misses.address,
      this.cache.slots * size.fkv_miss,
      slots * size.fkv_miss,
      heads,
    );
    const events = this.#events.get(workspace) as { listed: Event; done: Event }[];
    const { listed, done } = events[layer] as { listed: Event; done: Event };
    on.record(listed);
    const ticket: Ticket = {
      layer,
      lanes,
      listed,
      done,
      list,
      issued: false,
      event: () => {
        while (!ticket.issued) this.#issue(this.#queue.shift() as Ticket);
        return done;
      },
    };
    this.#queue.push(ticket);
    return ticket;
  }

  progress(): void {
    while (this.#queue[0]?.listed.query()) this.#issue(this.#queue.shift() as Ticket);
  }

  #list(workspace: Workspace, layer: number, bytes: number): PinnedBuffer {
    const lists = this.#lists.get(workspace) as (PinnedBuffer | undefined)[];
    const old = lists[layer];
    if (old && old.bytes >= bytes) return old;
    this.device.synchronize();
    old?.[Symbol.dispose]();
    const list = this.device.pinned(bytes);
    lists[layer] = list;
    return list;
  }

  /** The copies are issued once the host has seen the list, and so after the selection and what it came after. */
  #issue(ticket: Ticket): void {
    ticket.listed.synchronize();
    ticket.issued = true;
    this.bring(this.#read(ticket), ticket.layer, ticket.done);
  }

  #read({ lanes, list }: Ticket): Miss[] {
    const { kvHeads } = this.cache.geometry;
    const heads = lanes.length * kvHeads;
    const slots = Math.max(1, ...lanes.map((lane) => lane?.plan.slots ?? 0));
    const view = new DataView(list.buffer, 0, heads * (4 + slots * size.fkv_miss));
    const misses: Miss[] = [];
    const field = offsets.fkv_miss;
    for (let i = 0; i < heads; i++) {
      const lane = lanes[Math.floor(i / kvHeads)];
      const n = lane ? view.getInt32(4 * i, true) : 0;
      for (let j = 0; j < n && lane; j++) {
        const at = 4 * heads + (i * slots + j) * size.fkv_miss;
        const slot = view.getInt32(at + field.slot, true);
        misses.push({
          lane,
          head: i % kvHeads,
          slot,
          slotFrame: lane.plan.sinkPages + lane.plan.windowPages + 1 + slot,
          block: view.getInt32(at + field.block, true),
          frame: view.getInt32(at + field.frame, true),
        });
      }
    }
    return misses;
  }

  /** Where a head page of a lane's frame begins. */
  protected laneAddress(lane: Lane, layer: number, frame: number, head: number): number {
    const g = this.cache.geometry;
    return lane.frames + (layer * lane.nFrames + frame) * g.frameBytes + head * g.device.head;
  }
  protected hostAddress(block: number, layer: number, head: number): number {
    const g = this.cache.geometry;
    return this.cache.pool.address(block) + layer * g.host.layer + head * g.host.head;
  }

  /** K and V of one head page between any two layouts: two 2-D copies. */
  protected copyHeadPage(stream: Stream, dst: number, to: Strides, src: number, from: Strides): void {
    const g = this.cache.geometry;
    const rowBytes = g.headPageBytes / (2 * g.pageSize);
    for (const kv of [0, 1])
      stream.copy2d(dst + kv * to.kv, to.row, src + kv * from.kv, from.row, rowBytes, g.pageSize);
  }

  [Symbol.dispose](): void {
    for (const events of this.#events.values())
      for (const { listed, done } of events) {
        listed[Symbol.dispose]();
        done[Symbol.dispose]();
      }
    for (const lists of this.#lists.values()) for (const list of lists) list?.[Symbol.dispose]();
    this.copies[Symbol.dispose]();
  }
}

/** The baseline: one 2-D copy per missed page, head and K or V, from a host pool in NHD, all queued before one wait. */
export class FragmentedRecall extends ListedRecall {
  protected bring(misses: readonly Miss[], layer: number, done: Event): void {
    const { device, host } = this.cache.geometry;
    for (const m of misses) {
      const slot = this.laneAddress(m.lane, layer, m.slotFrame, m.head);
      if (m.frame >= 0)
        this.copyHeadPage(
          this.copies,
          slot,
          device,
          this.laneAddress(m.lane, layer, m.frame, m.head),
          device,
        );
      else this.copyHeadPage(this.copies, slot, device, this.hostAddress(m.block, layer, m.head), host);
    }
    this.waits.record(this.copies, done);
  }
}
