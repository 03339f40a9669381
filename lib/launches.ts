// The kernels that are not ours: which of them may be running (an asynchronous error shows only later, and names none), and
// which a graph holds.

import { FreeKVError } from "./errors.ts";

/** A kernel that is not ours. */
export interface Launched {
  readonly name: string;
  /** The code; `handle` throws once it is unloaded. */
  readonly module: { readonly handle: number };
}

/** Errors: DISPOSED if the code of one of them was unloaded. */
export function requireLoaded(kernels: Iterable<Launched>): void {
  for (const { name, module } of kernels) {
    try {
      void module.handle;
    } catch (cause) {
      const message = `this graph launches kernel ${name}, whose module was disposed; load it and capture again`;
      throw new FreeKVError("DISPOSED", message, { cause, detail: { what: "module", kernel: name } });
    }
  }
}

/** Stream → how many of all launches came before: those of this stream among them are meant. */
type Point = ReadonlyMap<number, number>;

interface Capture {
  /** The one that it began on, and those that forked from it. */
  readonly streams: Set<number>;
  /** Recorded in it. */
  readonly events: Set<number>;
  readonly kernels: Set<Launched>;
}

/** Streams and events are named by their handles. One that is gone may lend its handle to another: numbers of launches only rise. */
export class Launches {
  #count = 0;
  /** Stream → name → the latest launch of it that may still run. */
  readonly #running = new Map<number, Map<string, number>>();
  /** Stream → what of others it waited for. */
  readonly #behind = new Map<number, Point>();
  /** Event → what is done when it is. */
  readonly #recorded = new Map<number, Point>();
  readonly #captures: Capture[] = [];

  /** Whether what is launched on this stream now is captured, and runs only with its graph. */
  captures(stream: number): boolean {
    return this.#captureOf(stream) !== undefined;
  }

  /** The kernels that `issue` launches into the capture which began on this stream; none of them runs now. */
  capture(stream: number, issue: () => void): ReadonlySet<Launched> {
    const capture: Capture = { streams: new Set([stream]), events: new Set(), kernels: new Set() };
    this.#captures.push(capture);
    try {
      issue();
    } finally {
      this.#captures.splice(this.#captures.indexOf(capture), 1);
    }
    return capture.kernels;
  }

  add(stream: number, kernels: Iterable<Launched>): void {
    const capture = this.#captureOf(stream);
    if (capture !== undefined) {
      for (const kernel of kernels) capture.kernels.add(kernel);
      return;
    }
    this.#count++;
    for (const { name } of kernels) {
      const names = this.#running.get(stream) ?? new Map<string, number>();
      this.#running.set(stream, names.set(name, this.#count));
    }
  }

  record(event: number, stream: number): void {
    this.forget(event);
    const capture = this.#captureOf(stream);
    if (capture !== undefined) capture.events.add(event);
    else if (this.#running.size > 0) this.#recorded.set(event, this.#pointOf(stream));
  }

  wait(stream: number, event: number): void {
    this.#captures.find(({ events }) => events.has(event))?.streams.add(stream);
    const point = this.#recorded.get(event);
    if (point === undefined) return;
    const behind = new Map(this.#behind.get(stream));
    for (const [other, count] of point) behind.set(other, Math.max(count, behind.get(other) ?? 0));
    this.#behind.set(stream, behind);
  }

  /** All work that this event came after is done. */
  reached(event: number): void {
    const point = this.#recorded.get(event);
    if (point === undefined) return;
    this.#recorded.delete(event);
    this.#done(point);
  }

  /** This event is no more, or is recorded anew. */
  forget(event: number): void {
    this.#recorded.delete(event);
    for (const { events } of this.#captures) events.delete(event);
  }

  /** All work of this stream is done; without one, that of every stream. */
  done(stream?: number): void {
    if (stream !== undefined) {
      this.#done(this.#pointOf(stream));
      this.#behind.delete(stream);
    } else for (const all of [this.#running, this.#behind, this.#recorded]) all.clear();
  }

  names(): string[] {
    return [...new Set([...this.#running.values()].flatMap((names) => [...names.keys()]))];
  }

  #captureOf(stream: number): Capture | undefined {
    return this.#captures.find(({ streams }) => streams.has(stream));
  }

  #pointOf(stream: number): Point {
    return new Map([...(this.#behind.get(stream) ?? []), [stream, this.#count]]);
  }

  #done(point: Point): void {
    for (const [stream, count] of point) {
      const names = this.#running.get(stream);
      if (names === undefined) continue;
      for (const [name, latest] of names) if (latest <= count) names.delete(name);
      if (names.size === 0) this.#running.delete(stream);
    }
  }
}
