// What bench/ffi.ts measures, in whichever runtime runs this: one JSON line a case. It knows the package by its name, and the
// runtime's backend as the package does; it uses nothing that Node 20 lacks. Word: the library of bench/calls.cpp.

import { Device, pack, read, size, write } from "freekv/cuda";
import { do_not_optimize, measure } from "mitata";
import { load } from "#backend";

/** What is measured: nanoseconds of `work`, divided by how often it does the thing. */
interface Case {
  readonly name: string;
  /** Whether the README's table has it. */
  readonly told?: boolean;
  readonly work: () => unknown;
  readonly times?: number;
}
type Call = (...args: unknown[]) => number;
type Kind = "ptr" | "i32" | "u64" | "buf" | "mem";

/** calls.cpp as the backend binds the ABI, under the ABI's kinds of arguments. */
function bind(path: string, functions: Readonly<Record<string, readonly Kind[]>>): Record<string, Call> {
  const table = Object.fromEntries(
    Object.entries(functions).map(([name, kinds]) => [
      name,
      { args: kinds.map((kind, i) => ({ name: `a${i}`, kind })), returns: "i32" },
    ]),
  );
  return (load as (path: string, table: unknown) => { calls: unknown })(path, table).calls as Record<
    string,
    Call
  >;
}

const four = (kind: Kind): Kind[] => [kind, kind, kind, kind];
const turns = (n: number): Kind[] => Array.from({ length: n }, (_, i) => (i % 2 ? "i32" : "ptr"));

function callCases(path: string, host: { address: number; view: Int32Array }): Case[] {
  const counted = bind(path, { call0: [], call2: turns(2), call4: turns(4), call8: turns(8) });
  const typed = bind(path, {
    integers: four("i32"),
    sizes: four("u64"),
    pointers: four("ptr"),
    peek: ["ptr"],
  });
  const { pointers: buffers } = bind(path, { pointers: four("buf") }) as { pointers: Call };
  const { pointers: either } = bind(path, { pointers: four("mem") }) as { pointers: Call };
  const { call0, call2, call4, call8 } = counted as Record<"call0" | "call2" | "call4" | "call8", Call>;
  const { integers, sizes, pointers, peek } = typed as Record<
    "integers" | "sizes" | "pointers" | "peek",
    Call
  >;
  const p = 4096; // only passed on, never read
  const bytes = new Uint8Array(64);
  const { address, view } = host;
  // What is read is used, and is another word each time: else the compiler would read once, or not at all.
  let at = 0;
  let sum = 0;
  const reading = (name: string, read: (index: number) => number): Case => ({
    name,
    told: true,
    work() {
      at = (at + 1) & 1023;
      sum = (sum + read(at)) | 0;
      return sum;
    },
  });
  return [
    { name: "call, no arguments", told: true, work: () => call0() },
    { name: "call, 2 arguments: pointer, int32", work: () => call2(p, 1) },
    { name: "call, 4 arguments: pointer, int32 in turn", work: () => call4(p, 1, p, 1) },
    {
      name: "call, 8 arguments: pointer, int32 in turn",
      told: true,
      work: () => call8(p, 1, p, 1, p, 1, p, 1),
    },
    { name: "call, 4 × int32", told: true, work: () => integers(1, 2, 3, 4) },
    { name: "call, 4 × uint64 as numbers", told: true, work: () => sizes(1, 2, 3, 4) },
    { name: "call, 4 × uint64 as bigints", told: true, work: () => sizes(1n, 2n, 3n, 4n) },
    { name: "call, 4 × address", told: true, work: () => pointers(p, p, p, p) },
    { name: "call, 4 × JavaScript memory", told: true, work: () => buffers(bytes, bytes, bytes, bytes) },
    { name: "call, 4 × address where memory may be", work: () => either(p, p, p, p) },
    reading("read pinned memory: a view", (index) => view[index] as number),
    reading("read pinned memory: Atomics.load on a view", (index) => Atomics.load(view, index)),
    reading("read pinned memory: a call", (index) => peek(address + 4 * index)),
  ];
}

const row = {
  ...{ seed: 1, sequence: 0, position: 0, token: -1, target: -1, block: -1, correction: 0, speculation: 0 },
  ...{ prefetch: 0, top_k: 0, n_top: 0, temperature: 0, top_p: 1 },
};

/** Cases on a device that leave nothing behind. */
function deviceCases(device: Device, debug: Device): Case[] {
  const [stream, event, done] = [device.stream(), device.event(), device.event()];
  const word = device.alloc(256);
  const kept = new ArrayBuffer(size.fkv_row);
  const rowView = new DataView(kept);
  const results = new DataView(new ArrayBuffer(size.fkv_result));
  const bytes = new BigUint64Array(1);
  const graph = stream.capture(() => {
    for (let i = 0; i < 20; i++) stream.memset(word, i);
  });
  stream.record(event);
  stream.synchronize();
  const launches = 50;
  return [
    {
      name: "ABI call, status checked",
      told: true,
      work: () => device.lib.fkv_chain_scratch_bytes(bytes, 1, 256, 256),
    },
    {
      name: "the same in debug mode",
      told: true,
      work: () => debug.lib.fkv_chain_scratch_bytes(bytes, 1, 256, 256),
    },
    { name: "poll an event: event.query()", told: true, work: () => event.query() },
    {
      name: "launch a memset (of 50 before one wait)",
      told: true,
      times: launches,
      work() {
        for (let i = 0; i < launches; i++) stream.memset(word, 1);
        stream.synchronize();
      },
    },
    {
      name: "launch a memset and wait",
      work() {
        stream.memset(word, 1);
        stream.synchronize();
      },
    },
    {
      name: "launch a memset, record and wait for the event",
      work() {
        stream.memset(word, 1);
        stream.record(done);
        done.synchronize();
      },
    },
    {
      name: "launch a graph of 20 memsets and wait",
      told: true,
      work() {
        stream.launch(graph);
        stream.synchronize();
      },
    },
    { name: "pack fkv_row into a kept buffer", work: () => pack.fkv_row(row, { into: kept }) },
    { name: "write fkv_row through a kept view", told: true, work: () => write.fkv_row(rowView, 0, row) },
    { name: "pack fkv_row into a new buffer", work: () => pack.fkv_row(row) },
    { name: "read fkv_result, every field", work: () => read.fkv_result(results, 0) },
    { name: "create and dispose: event", told: true, work: () => device.event()[Symbol.dispose]() },
    { name: "create and dispose: stream (a thread)", work: () => device.stream()[Symbol.dispose]() },
    {
      name: "create and dispose: 4 KiB of device memory",
      told: true,
      work: () => device.alloc(4096)[Symbol.dispose](),
    },
    {
      name: "create and dispose: 4 KiB of pinned memory",
      told: true,
      work: () => device.pinned(4096)[Symbol.dispose](),
    },
    {
      name: "create, view and dispose: 4 KiB of pinned memory",
      work() {
        const memory = device.pinned(4096);
        do_not_optimize(memory.view(Int32Array));
        memory[Symbol.dispose]();
      },
    },
  ];
}

const [library = ""] = process.argv.slice(2);
const device = Device.open({ device: "cpu" });
const debug = Device.open({ device: "cpu", debug: true });
const pinned = device.pinned(4096);
const host = { address: pinned.address, view: pinned.view(Int32Array) };
/** Of some rounds the one with the least median: what else the machine did, and a collector's turn, is not the call's cost. */
async function best(work: () => unknown): Promise<{ p25: number; p50: number; p75: number; min: number }> {
  const options = { min_cpu_time: 60e6, warmup_samples: 2, inner_gc: false };
  const rounds = [];
  for (let round = 0; round < 5; round++) rounds.push(await measure(work, options));
  return rounds.reduce((a, b) => (a.p50 <= b.p50 ? a : b));
}

for (const each of [...callCases(library, host), ...deviceCases(device, debug)]) {
  const { name, told = false, work, times = 1 } = each;
  const { p25, p50, p75, min } = await best(work);
  const [median, low, high, least] = [p50, p25, p75, min].map((ns) => ns / times);
  console.log(JSON.stringify({ case: name, told, median, p25: low, p75: high, best: least }));
}
debug[Symbol.dispose]();
device[Symbol.dispose]();
