/// <reference lib="esnext.disposable" preserve="true" />
// Prefill: a prompt in chunks, each token attending to every earlier one whatever the policy; finished pages go to the host as
// they are made. Unless the kernels are FKV_FAST's, a token's bits do not depend on where chunks or appends begin.
import { pack } from "../ffi/structs.ts";
import type { ModelConfig } from "./checkpoint.ts";
import { type PageCopier, type Pages, range } from "./copier.ts";
import type { Decoder } from "./decoder.ts";
import { DenseQueue } from "./dense.ts";
import type { Device, DeviceBuffer, Event, Stream } from "./device.ts";
import { unlessFailed } from "./errors.ts";
import type { Frames } from "./geometry.ts";
import { keptBytes, type Lane } from "./lane.ts";
import { type ActivationRows, Activations, activationBytes } from "./network.ts";
import type { Waits } from "./waits.ts";

const twinChunk = 512;
const chunks = [4096, 2048, 1024];
/** The share of a device's memory that a chunk's activations may take. */
const chunkShare = 1 / 32;
/** int32 values in one fkv_write_async. */
const writePiece = 768;

/**
 * How many tokens to compute at a time: on a GPU, where a product of many rows is fastest and pages that stream back do so once
 * for each chunk, as many as take a small share of its memory.
 */
export function defaultChunk(device: Device, config: ModelConfig, maxContext: number): number {
  if (device.backend === "cpu") return twinChunk;
  const { hidden, intermediate, heads, headDim } = config;
  const operands = 8 * Math.max(hidden, intermediate, heads * headDim);
  const most = (device.info().totalBytes * chunkShare) / (activationBytes(config) + operands);
  return chunks.find((tokens) => tokens <= most && tokens < 2 * maxContext) ?? twinChunk;
}

/** A prompt's chunk: `ids` at positions `start` … of a sequence with these blocks, reserved up to the chunk's end. */
export interface Chunk {
  readonly start: number;
  readonly ids: Int32Array;
  readonly blocks: readonly number[];
  /** The tokens of page start/P that precede the chunk, where a page is begun already. */
  readonly partial: Pages | null;
  /** Of the last chunk: the lane that gets the partial page, q and the logits of the last token. */
  readonly lane: Lane | null;
}

export class Prefill implements Disposable {
  /** Chunks end at multiples of this. */
  readonly chunkTokens: number;
  readonly #d: Decoder;
  readonly #family: number;
  readonly #copier: PageCopier;
  readonly #waits: Waits;
  /** Carries finished pages to the host beside the next layers. */
  readonly #store: Stream;
  readonly #dense: DenseQueue;
  readonly #act: Activations;
  readonly #tokens: DeviceBuffer;
  readonly #positions: DeviceBuffer;
  readonly #appended: Event[];
  readonly #stored: Event[];
  /** Layers that the workspace holds: all, or two that take turns while earlier pages stream back for each chunk. */
  readonly #heldLayers: number;
  #workspace: DeviceBuffer | null = null;
  #pages = 0;
  #prompts = 0;
  /** The blocks of the sequence whose pages are in the workspace. */
  #held: readonly number[] | null = null;

  constructor(
    decoder: Decoder,
    copier: PageCopier,
    waits: Waits,
    o: { split: boolean; dtype: number; family: number; chunkTokens: number; prefillKv: "device" | "host" },
  ) {
    const { device, network } = decoder;
    const { config } = network;
    const { chunkTokens } = o;
    this.chunkTokens = chunkTokens;
    this.#d = decoder;
    this.#family = o.family;
    this.#copier = copier;
    this.#waits = waits;
    this.#store = device.stream();
    this.#act = new Activations(device, config, chunkTokens);
    this.#dense = new DenseQueue(device, decoder.compute, {
      dtype: o.dtype,
      eps: config.eps,
      split: o.split,
      family: o.family,
      maxRows: chunkTokens,
      ...network.widest,
    });
    this.#tokens = device.alloc(4 * chunkTokens);
    this.#positions = device.alloc(4 * chunkTokens);
    this.#appended = range(0, config.layers).map(() => device.event());
    this.#stored = range(0, config.layers).map(() => device.event());
    for (const stored of this.#stored) this.#store.record(stored); // nothing is on its way yet
    this.#heldLayers = o.prefillKv === "device" ? config.layers : Math.min(2, config.layers);
  }

  get #streamsBack(): boolean {
    return this.#heldLayers < this.#d.cache.geometry.layers;
  }

  /** A prompt comes: the workspace stays until as many end() calls say that it is not needed. */
  enter(): void {
    this.#prompts++;
  }
  /** With the last prompt, a large workspace goes; giving it back makes the device finish its work first. */
  end(): void {
    if (--this.#prompts > 0 || (this.#workspace?.bytes ?? 0) <= keptBytes) return;
    const workspace = this.#workspace;
    this.#workspace = this.#held = null;
    this.#pages = 0;
    unlessFailed(() => workspace?.[Symbol.dispose]());
  }

  /** Makes room for the pages of `blocks` and brings the complete ones before `start`, which are on the host. */
  begin(start: number, blocks: readonly number[]): void {
    const { cache, compute, device } = this.#d;
    const { frameBytes, layers, pageSize } = cache.geometry;
    const pages = blocks.length;
    this.#held = blocks;
    this.#awaitStored(layers - 1); // what the workspace holds may still be on its way
    if (pages > this.#pages) {
      this.#workspace?.[Symbol.dispose]();
      this.#workspace = null;
      this.#pages = 0;
      this.#workspace = device.alloc(this.#heldLayers * pages * frameBytes);
      this.#pages = pages;
    }
    const earlier = range(0, Math.floor(start / pageSize));
    if (!this.#streamsBack)
      this.#copier.copy(
        this.#onHost(earlier, blocks),
        { frames: this.#frames(0), pages: earlier },
        { layers },
        compute,
      );
  }

  /** Issues one chunk. */
  chunk(chunk: Chunk): void {
    const { cache, compute, device, digestKind, network } = this.#d;
    const waits = this.#waits;
    waits.next();
    const { layers, pageSize } = cache.geometry;
    const { blocks, ids, start } = chunk;
    // Another sequence may have been computed between two chunks of this one, whose pages so far went to the host.
    if (this.#held !== blocks) this.begin(start, blocks);
    const act = this.#act;
    const n = ids.length;
    const firstPage = Math.floor(start / pageSize);
    const finished = range(firstPage, Math.floor((start + n) / pageSize));
    const last = this.#stored[layers - 1] as Event;
    this.#write(this.#tokens, ids);
    this.#write(this.#positions, Int32Array.from(range(start, start + n)));
    network.embed(act, this.#tokens.address, n, compute);
    for (let layer = 0; layer < layers; layer++) {
      const frames = this.#frames(layer);
      const extent = { layer, layers: 1 };
      // Of the last layer nothing is needed but K and V, and the last token's output where it is the prompt's.
      const ends = layer === layers - 1;
      const attends = !ends || chunk.lane !== null;
      network.qkv(this.#dense, act, layer, n);
      this.#dense.run();
      network.rope(act, layer, this.#positions.address, n, compute);
      if (this.#streamsBack) this.#streamBack(layer, attends ? firstPage : 0, blocks);
      if (chunk.partial)
        this.#copier.copy(
          chunk.partial,
          { frames, pages: [firstPage] },
          { ...extent, tokens: start % pageSize },
          compute,
        );
      const attention = { layer, start, n, frames, family: this.#family, qkv: act.qkv, out: act.attended };
      const params = pack.fkv_prefill_params(attention);
      device.lib.fkv_prefill_append(cache.packed, params, compute.handle);
      waits.record(compute, this.#appended[layer] as Event);
      waits.on(this.#store, this.#appended[layer] as Event, "store-after-append");
      const made = { frames, pages: finished };
      const kept = this.#onHost(finished, blocks);
      this.#copier.copy(made, kept, extent, this.#store);
      this.#copier.digest(made, kept.pages, digestKind, extent, this.#store);
      waits.record(this.#store, this.#stored[layer] as Event);
      if (chunk.lane) this.#leave(chunk.lane, layer, start + n, n - 1);
      if (!attends) continue;
      const rows = ends ? 1 : n;
      const from = this.#rowsFrom(n - rows);
      const asked = pack.fkv_prefill_params({
        ...attention,
        ...{ start: start + n - rows, n: rows, qkv: from.qkv, out: from.attended },
      });
      device.lib.fkv_prefill_attend(cache.packed, asked, compute.handle);
      network.project(this.#dense, from, layer, rows);
      this.#dense.run();
    }
    if (!chunk.lane) return;
    network.logits(this.#dense, this.#rowsFrom(n - 1).x, chunk.lane.logits, 1);
    this.#dense.run();
    waits.on(compute, last, "fill-after-store");
  }

  /** Resolves when nothing is on its way to the host any more. */
  async settled(): Promise<void> {
    using event = this.#d.device.event();
    this.#store.record(event);
    await event.done();
  }

  #write(to: DeviceBuffer, values: Int32Array): void {
    for (let i = 0; i < values.length; i += writePiece)
      this.#d.compute.write(to.address + 4 * i, values.slice(i, i + writePiece));
  }

  /** The chunk's activations without its first `skipped` rows. */
  #rowsFrom(skipped: number): ActivationRows {
    const { x, qkv, attended, mlp } = this.#act;
    const { hidden, heads, headDim, intermediate } = this.#d.network.config;
    const at = (address: number, width: number): number => address + 4 * skipped * width;
    return {
      x: at(x, hidden),
      qkv: at(qkv, this.#d.network.qkvWidth),
      attended: at(attended, heads * headDim),
      mlp: at(mlp, intermediate),
    };
  }

  #awaitStored(layer: number): void {
    this.#waits.on(
      this.#d.compute,
      this.#stored[layer] as Event,
      "load-after-store",
      Number.POSITIVE_INFINITY,
    );
  }

  /** Brings the pages before `end` of one layer, once they are on the host and the workspace's half is free. */
  #streamBack(layer: number, end: number, blocks: readonly number[]): void {
    const { cache, compute } = this.#d;
    if (layer !== 1) this.#awaitStored(layer === 0 ? cache.geometry.layers - 1 : layer - 2);
    const earlier = range(0, end);
    this.#copier.copy(
      this.#onHost(earlier, blocks),
      { frames: this.#frames(layer), pages: earlier },
      { layer, layers: 1 },
      compute,
    );
  }

  /** For decoding: the last token's q, and the page that it leaves incomplete. */
  #leave(lane: Lane, layer: number, end: number, row: number): void {
    const { cache, compute, network } = this.#d;
    const { headDim, heads, pageSize } = cache.geometry;
    const bytes = 4 * heads * headDim;
    compute.copy(lane.qPrev + layer * bytes, this.#act.qkv + 4 * row * network.qkvWidth, bytes);
    if (end % pageSize === 0) return;
    const page = Math.floor(end / pageSize);
    this.#copier.copy(
      { frames: this.#frames(layer), pages: [page] },
      lane.pages(cache, [page]),
      { layer, layers: 1, tokens: end % pageSize },
      compute,
    );
  }

  #onHost(pages: readonly number[], blocks: readonly number[]): Pages {
    return { frames: this.#d.cache.hostFrames, pages: pages.map((p) => blocks[p] as number) };
  }

  /** The workspace as frames of `layer`, page p at index p. */
  #frames(layer: number): Frames {
    const { cache } = this.#d;
    const base = (this.#workspace as DeviceBuffer).address;
    const frames = cache.deviceFrames(base, this.#pages);
    if (!this.#streamsBack) return frames;
    return { ...frames, base: base + (layer % this.#heldLayers) * frames.layer, layer: 0 };
  }

  [Symbol.dispose](): void {
    for (const event of [...this.#appended, ...this.#stored]) event[Symbol.dispose]();
    for (const part of [this.#workspace, this.#positions, this.#tokens, this.#dense, this.#act, this.#store])
      part?.[Symbol.dispose]();
  }
}
