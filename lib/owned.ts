/// <reference lib="esnext.disposable" preserve="true" />
// Things that are disposed together, the latest first. Node before 24 has no DisposableStack.

export class Owned implements Disposable {
  #items: Disposable[] = [];

  use<T extends Disposable>(item: T): T {
    this.#items.push(item);
    return item;
  }

  /** All of them, in a new owner; this one has nothing to dispose any more. */
  move(): Owned {
    const moved = new Owned();
    [moved.#items, this.#items] = [this.#items, []];
    return moved;
  }

  /** Disposes every item, also when one of them throws; the first error is thrown at the end. */
  [Symbol.dispose](): void {
    const errors: unknown[] = [];
    for (const item of this.#items.splice(0).reverse()) {
      try {
        item[Symbol.dispose]();
      } catch (error) {
        errors.push(error);
      }
    }
    if (errors.length > 0) throw errors[0];
  }
}
