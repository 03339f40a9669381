// What the host pays: calls by their number of arguments, polls, reads of pinned memory, structs, objects, launches.

import { dlopen, type FFIFunction } from "bun:ffi";
import { do_not_optimize, measure } from "mitata";
import { Device, pack, read, size, write } from "../lib/device.ts";
import { emptyRow } from "../lib/row.ts";
import type { Bench } from "./bench.ts";
import { compile } from "./native.ts";
import type { Row } from "./table.ts";

type Call = (...args: number[]) => number;
const argumentCounts = [0, 2, 4, 8, 12] as const;

/** bench/calls.cpp through Bun's FFI, as ffi/bun.ts binds the ABI; each function already given its arguments. */
function bareCalls(): [string, () => unknown][] {
  const name = (n: number): string => `call${n}`;
  const args = (n: number): ("ptr" | "i32")[] => Array.from({ length: n }, (_, i) => (i % 2 ? "i32" : "ptr"));
  const table: Record<string, FFIFunction> = Object.fromEntries(
    argumentCounts.map((n) => [name(n), { args: args(n), returns: "i32" as const }]),
  );
  const { symbols } = dlopen(compile("calls", { shared: true }), table);
  const f = symbols as unknown as Record<string, Call>;
  const [f0, f2, f4, f8, f12] = argumentCounts.map((n) => f[name(n)]) as [Call, Call, Call, Call, Call];
  const p = 4096; // only passed on, never read
  return [
    ["FFI call, 0 arguments", () => f0()],
    ["FFI call, 2 arguments", () => f2(p, 1)],
    ["FFI call, 4 arguments", () => f4(p, 1, p, 1)],
    ["FFI call, 8 arguments", () => f8(p, 1, p, 1, p, 1, p, 1)],
    ["FFI call, 12 arguments", () => f12(p, 1, p, 1, p, 1, p, 1, p, 1, p, 1)],
  ];
}

/** Cases that leave nothing behind. */
function deviceCases(device: Device, debug: Device, owned: DisposableStack): [string, () => unknown][] {
  const stream = owned.use(device.stream());
  const event = owned.use(device.event());
  const done = owned.use(device.event());
  const word = owned.use(device.alloc(256));
  const pinned = owned.use(device.pinned(4096));
  const view = pinned.view(Int32Array);
  const row = new ArrayBuffer(size.fkv_row);
  const rowView = new DataView(row);
  const results = new DataView(new ArrayBuffer(size.fkv_result));
  const bytes = new BigUint64Array(1);
  const graph = owned.use(
    stream.capture(() => {
      for (let i = 0; i < 20; i++) stream.memset(word, i);
    }),
  );
  stream.record(event);
  stream.synchronize();
  return [
    ["ABI call, 4 arguments, status checked", () => device.lib.fkv_chain_scratch_bytes(bytes, 1, 256, 256)],
    ["the same in debug mode", () => debug.lib.fkv_chain_scratch_bytes(bytes, 1, 256, 256)],
    ["poll an event: event.query()", () => event.query()],
    ["read pinned memory: a typed array", () => do_not_optimize(view[7])],
    ["read pinned memory: Atomics.load", () => Atomics.load(view, 7)],
    ["pack fkv_row into a kept buffer", () => pack.fkv_row(emptyRow, { into: row })],
    ["write fkv_row through a kept view", () => write.fkv_row(rowView, 0, emptyRow)],
    ["pack fkv_row into a new buffer", () => pack.fkv_row(emptyRow)],
    ["read fkv_result, every field", () => read.fkv_result(results, 0)],
    ["create and dispose: event", () => device.event()[Symbol.dispose]()],
    ["create and dispose: stream (a thread)", () => device.stream()[Symbol.dispose]()],
    ["create and dispose: 4 KiB of device memory", () => device.alloc(4096)[Symbol.dispose]()],
    ["create and dispose: 4 KiB of pinned memory", () => device.pinned(4096)[Symbol.dispose]()],
    [
      "launch and synchronize: one memset",
      () => {
        stream.memset(word, 1);
        stream.synchronize();
      },
    ],
    [
      "launch and synchronize: a graph of 20 memsets",
      () => {
        stream.launch(graph);
        stream.synchronize();
      },
    ],
    [
      "launch, record and wait for the event",
      () => {
        stream.memset(word, 1);
        stream.record(done);
        done.synchronize();
      },
    ],
  ];
}

export const ffi: Bench = {
  title: "FFI: what the host pays",
  async run({ say }) {
    using owned = new DisposableStack();
    const device = owned.use(Device.open({ device: "cpu" }));
    const debug = owned.use(Device.open({ device: "cpu", debug: true }));
    const rows: Row[] = [];
    for (const [name, work] of [...bareCalls(), ...deviceCases(device, debug, owned)]) {
      say(name);
      const { p25, p50, p75, min } = await measure(work, {
        min_cpu_time: 150e6,
        warmup_samples: 2,
        inner_gc: false,
      });
      rows.push({ case: name, unit: "ns", median: p50, p25, p75, best: min });
    }
    return { rows, notes: ["mitata. Times of one call or of the line named, in nanoseconds."] };
  },
};
