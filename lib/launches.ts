// Which kernels that are not ours may be running: an asynchronous error shows only later, and names none.

export class Launches {
  /** Stream → the kernels launched on it since it was last known to be done. */
  readonly #running = new Map<number, Set<string>>();
  #captured: Set<string> | undefined;

  /** Whether what is launched now is captured, and runs only with its graph. */
  get capturing(): boolean {
    return this.#captured !== undefined;
  }

  /** The kernels that `issue` launches, none of which runs now. */
  capture(issue: () => void): ReadonlySet<string> {
    const outer = this.#captured;
    const captured = new Set<string>();
    this.#captured = captured;
    try {
      issue();
    } finally {
      this.#captured = outer;
    }
    return captured;
  }

  add(stream: number, kernels: Iterable<string>): void {
    let names = this.#captured ?? this.#running.get(stream);
    if (names === undefined) {
      names = new Set();
      this.#running.set(stream, names);
    }
    for (const kernel of kernels) names.add(kernel);
  }

  /** All work of this stream is done; without one, that of every stream. */
  done(stream?: number): void {
    if (stream === undefined) this.#running.clear();
    else this.#running.delete(stream);
  }

  names(): string[] {
    return [...new Set([...this.#running.values()].flatMap((names) => [...names]))];
  }
}
