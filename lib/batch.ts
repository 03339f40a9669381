/// <reference lib="esnext.disposable" preserve="true" />
// Concurrent runs share steps. The host reads results one step behind: while it hands out what step s told, step s + 1 is
// under way. Each step's control is one entry of the pinned ring, written only after the step that used it last is complete.
import { offsets, read, size, write } from "../ffi/structs.ts";
import { ringEntries } from "./cache.ts";
import type { Core } from "./core.ts";
import { type Deferred, deferred } from "./deferred.ts";
import type { Event } from "./device.ts";
import { FreeKVError } from "./errors.ts";
import { sampleFirst } from "./model.ts";
import { emptyRow, type Row, rowOf, type Sampling } from "./row.ts";
import type { State } from "./state.ts";

/** The token of a step that is under way: it was drawn on the device and the host has not seen it. */
const unknown = -1;

export type Result = ReturnType<typeof read.fkv_result>;

/** `fkv_result` with no more of the most probable tokens than were asked for: mostly none, and reading forty would take the longest. */
function readResult(view: DataView, at: number): Result {
  const place = offsets.fkv_result;
  if (view.getInt32(at + place.n_top, true) > 0) return read.fkv_result(view, at);
  return {
    token: view.getInt32(at + place.token, true),
    argmax: view.getInt32(at + place.argmax, true),
    logprob: view.getFloat32(at + place.logprob, true),
    n_top: 0,
    stall_ns: Number(view.getBigUint64(at + place.stall_ns, true)),
    counters: read.fkv_counters(view, at + place.counters),
    top_id: [],
    top_logprob: [],
  };
}

/** What a step told of a run: how long its attention waited, and when the host heard of it (performance.now). */
export interface Told {
  readonly result: Result;
  readonly stallMs: number;
  readonly at: number;
}

/** What a run does in its i-th launch: draw the first token from the lane's logits, or feed a token (null: the one drawn last). */
export type Launch = { draw: true } | { draw: false; token: number | null; target: number };

/** One sequence being decoded: its launches are made as results are asked for, at most one ahead. */
export class Run {
  readonly state: State;
  readonly total: number;
  readonly launch: (i: number) => Launch;
  readonly sampling: Sampling;
  /** Length of the sequence before the first launch. */
  readonly base: number;
  /** Tokens of the results so far. */
  readonly tokens: number[] = [];
  /** Launches to be made although nobody waits for their results. */
  owed = 0;
  launched = 0;
  delivered = 0;
  taken = 0;
  readonly results: Told[] = [];
  waiting: Deferred<Told> | null = null;
  drained: Deferred<void> | null = null;

  constructor(state: State, total: number, sampling: Sampling, launch: (i: number) => Launch) {
    this.state = state;
    this.total = total;
    this.base = state.length;
    this.sampling = sampling;
    this.launch = launch;
  }
  /** Whether what is asked for, or the step after it, or what is owed, has still to be launched. */
  get behind(): boolean {
    return this.launched < Math.min(this.total, this.waiting ? this.taken + 2 : this.owed);
  }
  get complete(): boolean {
    return this.delivered === this.launched && !this.behind;
  }
}

interface InFlight {
  readonly step: number;
  readonly runs: readonly Run[];
  readonly done: Event;
}

export class Batch implements Disposable {
  readonly #core: Core;
  readonly #control: DataView;
  readonly #results: DataView;
  readonly #events: Event[];
  readonly #runs = new Set<Run>();
  readonly #inFlight: InFlight[] = [];
  #step = 0;
  #stallNs = 0;
  #pumping = false;
  #failure: unknown;

  constructor(core: Core) {
    this.#core = core;
    this.#control = new DataView(core.cache.control.buffer);
    this.#results = new DataView(core.cache.results.buffer);
    this.#events = Array.from({ length: ringEntries }, () => core.device.event());
  }

  /** The next result of a run. */
  next(run: Run): Promise<Told> {
    if (this.#failure) return Promise.reject(this.#failure);
    const ready = run.results.shift();
    run.waiting = deferred();
    const { promise } = run.waiting;
    this.#runs.add(run);
    if (!ready) {
      void this.#pump();
      return promise;
    }
    this.#launchAhead(); // what comes after it, before it is handed out
    if (run.waiting) this.#hand(run, ready); // else that launch failed, and the run with it
    return promise;
  }

  /** Resolves when everything that the run launched, `owed` launches or more, is complete. */
  async finish(run: Run, owed = 0): Promise<void> {
    run.waiting = null;
    run.owed = owed;
    if (!run.behind) this.#runs.delete(run);
    if (run.complete || this.#failure) return; // a device that failed completes nothing
    run.drained = deferred();
    const { promise } = run.drained;
    void this.#pump();
    return promise;
  }

  async #pump(): Promise<void> {
    if (this.#pumping) return;
    this.#pumping = true;
    try {
      while (
        [...this.#runs].some((run) => run.waiting || run.behind) ||
        this.#inFlight.some(({ runs }) => runs.some((run) => run.drained))
      ) {
        await new Promise((resolve) => setImmediate(resolve)); // whoever was just handed a token may ask for the next
        this.#launchAhead();
        const oldest = this.#inFlight[0];
        if (oldest) {
          await oldest.done.done();
          this.#inFlight.shift();
          this.#deliver(oldest);
        }
      }
    } catch (error) {
      this.#fail(error);
    } finally {
      this.#pumping = false;
    }
  }

  /** Milliseconds that steps waited, in all. */
  get stallMs(): number {
    return this.#stallNs / 1e6;
  }

  /** Launches until every waiting run is one step ahead of what it asked for. */
  #launchAhead(): void {
    while (!this.#failure) {
      const behind = [...this.#runs].filter((run) => run.behind);
      if (behind.length === 0 || this.#inFlight.length >= ringEntries - 1) return;
      const drawing = behind.filter((run) => run.launch(run.launched).draw);
      if (drawing.length === 0 && !this.#blocksReady(behind)) return;
      this.#launch(drawing.length ? drawing : behind, drawing.length > 0);
    }
  }

  /** Whether every block that the next step needs is pinned; the pool grows ahead, so that they nearly always are. */
  #blocksReady(runs: readonly Run[]): boolean {
    let ready = true;
    for (const run of runs) {
      try {
        run.state.check();
        ready = this.#core.pool.ready([run.state.reserve()]) && ready;
      } catch (error) {
        this.#reject(run, error);
        ready = false; // they are looked at anew
      }
    }
    return ready;
  }

  #launch(runs: readonly Run[], draw: boolean): void {
    const { cache, decoder, geometry, orchestration } = this.#core;
    const entry = (this.#step % ringEntries) * cache.maxRows;
    const control = (row: number, values: Row): void =>
      write.fkv_row(this.#control, (entry + row) * size.fkv_row, values);
    const able: Run[] = [];
    for (const run of runs) {
      try {
        control(able.length, this.#row(run));
        able.push(run);
      } catch (error) {
        this.#reject(run, error); // one run's failure is its own
      }
    }
    if (able.length === 0) return;
    const bucket = 2 ** Math.ceil(Math.log2(able.length));
    for (let i = able.length; i < bucket; i++) control(i, emptyRow);
    try {
      if (draw) sampleFirst(decoder, bucket);
      else
        orchestration.step(
          Array.from({ length: bucket }, (_, i) => {
            const state = able[i]?.state;
            return state ? { lane: state.lane, completesPage: state.length % geometry.pageSize === 0 } : null;
          }),
        );
    } catch (error) {
      // Nothing was sampled, so the ring's entry is still this step's; the tokens that it was to feed are not in the sequences.
      for (const run of able) {
        if (!draw) run.state.ids.pop();
        this.#reject(run, error);
      }
      if (error instanceof FreeKVError && error.code === "DEVICE_FAILED") this.#fail(error);
      return;
    }
    const done = this.#events[this.#step % ringEntries] as Event;
    decoder.compute.record(done);
    this.#inFlight.push({ step: this.#step++, runs: able, done });
    for (const run of able) run.launched++;
  }

  /** The control of a run's next launch; feeding a token makes the sequence one longer. */
  #row(run: Run): Row {
    const { state, sampling } = run;
    const launch = run.launch(run.launched);
    state.check();
    if (launch.draw) return rowOf(state.lane, { position: state.length - 1, sampling });
    const block = state.reserve();
    const position = state.length;
    state.ids.push(launch.token ?? run.tokens[run.launched - 1] ?? unknown);
    return rowOf(state.lane, {
      position,
      block,
      sampling,
      target: launch.target,
      ...(launch.token === null ? {} : { token: launch.token }),
    });
  }

  #deliver({ step, runs }: InFlight): void {
    const entry = (step % ringEntries) * this.#core.cache.maxRows;
    const at = performance.now();
    let stallMs = 0;
    for (const [i, run] of runs.entries()) {
      const result = readResult(this.#results, (entry + i) * size.fkv_result);
      if (i === 0) {
        stallMs = (result.stall_ns - this.#stallNs) / 1e6;
        this.#stallNs = result.stall_ns;
      }
      const position = run.base + run.delivered++;
      run.tokens.push(result.token);
      if (run.state.ids[position] === unknown) run.state.ids[position] = result.token;
      const told = { result, stallMs, at };
      if (run.waiting) this.#hand(run, told);
      else run.results.push(told);
      if (!run.drained || !run.complete) continue;
      this.#runs.delete(run);
      run.drained.resolve();
    }
  }

  #hand(run: Run, told: Told): void {
    run.taken++;
    run.waiting?.resolve(told);
    run.waiting = null;
  }

  #reject(run: Run, error: unknown): void {
    this.#runs.delete(run);
    run.waiting?.reject(error);
    run.waiting = null;
    run.drained?.reject(error);
  }

  /** A device that failed, or was closed, answers nobody any more. */
  #fail(error: unknown): void {
    this.#failure ??= error;
    const runs = new Set([...this.#runs, ...this.#inFlight.flatMap(({ runs }) => runs)]);
    this.#inFlight.length = 0;
    for (const run of runs) this.#reject(run, error);
  }

  /** Ends what runs. */
  [Symbol.dispose](): void {
    this.#fail(new FreeKVError("DISPOSED", "the engine was disposed while this ran"));
    for (const event of this.#events) event[Symbol.dispose]();
  }
}
