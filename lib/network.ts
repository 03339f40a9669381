/// <reference lib="esnext.disposable" preserve="true" />
// The network: a model's weights on the device, and the dense phases of a layer as its checkpoint describes them.
import { pack } from "../ffi/structs.ts";
import type { ModelConfig } from "./checkpoint.ts";
import { type DenseQueue, epilogue, type Linear } from "./dense.ts";
import type { Device, DeviceBuffer, Stream } from "./device.ts";
import { dtypeCode } from "./geometry.ts";
import { Owned } from "./owned.ts";
import type { TaskOptions } from "./types.ts";
import type { Checkpoint } from "./weights.ts";

const stagingBytes = 8 * 2 ** 20;

interface LayerWeights {
  readonly qkv: Linear;
  readonly o: Linear;
  readonly gateUp: Linear;
  readonly down: Linear;
  readonly qNorm: number;
  readonly kNorm: number;
}

/** Addresses of f32 rows of activations: x [hidden], qkv [(Hq + 2·Hkv)·d], attended [Hq·d], mlp [intermediate]. */
export interface ActivationRows {
  readonly x: number;
  readonly qkv: number;
  readonly attended: number;
  readonly mlp: number;
}

const widthsOf = (c: ModelConfig): number[] => [c.hidden, qkvWidth(c), c.heads * c.headDim, c.intermediate];

/** Device bytes that a row takes. */
export const activationBytes = (config: ModelConfig): number =>
  4 * widthsOf(config).reduce((sum, width) => sum + width, 0);

/** Where `rows` rows of activations live. */
export class Activations implements ActivationRows, Disposable {
  readonly #memory: DeviceBuffer;
  readonly x: number;
  readonly qkv: number;
  readonly attended: number;
  readonly mlp: number;
  constructor(device: Device, config: ModelConfig, rows: number) {
    const bytes = widthsOf(config).map((width) => Math.ceil((4 * width * rows) / 256) * 256);
    this.#memory = device.alloc(bytes.reduce((a, b) => a + b, 0));
    const at = (i: number): number => this.#memory.address + bytes.slice(0, i).reduce((a, b) => a + b, 0);
    this.x = at(0);
    this.qkv = at(1);
    this.attended = at(2);
    this.mlp = at(3);
  }
  [Symbol.dispose](): void {
    this.#memory[Symbol.dispose]();
  }
}

const qkvWidth = (c: ModelConfig): number => (c.heads + 2 * c.kvHeads) * c.headDim;

export class Network implements Disposable {
  readonly config: ModelConfig;
  readonly #device: Device;
  readonly #owned: DeviceBuffer[];
  readonly #layers: LayerWeights[];
  readonly #embed: number;
  readonly #head: Linear;
  readonly #invFreq: number;

  private constructor(
    device: Device,
    config: ModelConfig,
    owned: DeviceBuffer[],
    at: (name: string) => number,
  ) {
    this.config = config;
    this.#device = device;
    this.#owned = owned;
    const { hidden, intermediate, heads, headDim } = config;
    this.#layers = Array.from({ length: config.layers }, (_, l) => {
      const of = (name: string): number => at(`layers.${l}.${name}`);
      return {
        qkv: {
          weight: of("qkv"),
          bias: of("qkvBias"),
          norm: of("attnNorm"),
          nOut: qkvWidth(config),
          k: hidden,
        },
        o: { weight: of("o"), bias: of("oBias"), norm: 0, nOut: hidden, k: heads * headDim },
        gateUp: {
          weight: of("gateUp"),
          bias: of("gateUpBias"),
          norm: of("mlpNorm"),
          nOut: 2 * intermediate,
          k: hidden,
        },
        down: { weight: of("down"), bias: of("downBias"), norm: 0, nOut: hidden, k: intermediate },
        qNorm: of("qNorm"),
        kNorm: of("kNorm"),
      };
    });
    this.#embed = at("embed");
    this.#head = {
      weight: at(config.tied ? "embed" : "lmHead"),
      bias: 0,
      norm: at("norm"),
      nOut: config.vocab,
      k: hidden,
    };
    this.#invFreq = at("invFreq");
  }

  /** Uploads a checkpoint through two pinned staging buffers: one fills from the file while the other is copied. */
  static async load(
    device: Device,
    checkpoint: Checkpoint,
    stream: Stream,
    task: TaskOptions,
  ): Promise<Network> {
    const owned: DeviceBuffer[] = [];
    const addresses = new Map<string, number>();
    const own = (name: string, bytes: number): DeviceBuffer => {
      const buffer = device.alloc(bytes);
      owned.push(buffer);
      addresses.set(name, buffer.address);
      return buffer;
    };
    using staging = new Owned();
    const halves = [0, 1].map(() => {
      const memory = staging.use(device.pinned(stagingBytes));
      return { memory, view: memory.view(Uint8Array), copied: staging.use(device.event()), used: false };
    });
    let turn = 0;
    let done = 0;
    try {
      for (const tensor of checkpoint.tensors) {
        const target = own(tensor.name, tensor.bytes);
        for (let offset = 0; offset < tensor.bytes; offset += stagingBytes) {
          task.signal?.throwIfAborted();
          const half = halves[turn++ % 2] as (typeof halves)[0];
          if (half.used) await half.copied.done();
          half.used = true;
          const bytes = Math.min(stagingBytes, tensor.bytes - offset);
          tensor.read(half.view.subarray(0, bytes), offset);
          stream.copy(target.address + offset, half.memory.address, bytes);
          stream.record(half.copied);
          done += bytes;
          task.onProgress?.({ phase: "upload", done, total: checkpoint.bytes, unit: "bytes" });
        }
      }
      const { invFreq } = checkpoint.config.rope;
      stream.write(own("invFreq", invFreq.byteLength), invFreq);
      stream.synchronize();
      return new Network(device, checkpoint.config, owned, (name) => addresses.get(name) ?? 0);
    } catch (error) {
      stream.synchronize(); // copies still read the staging buffers
      for (const buffer of owned) buffer[Symbol.dispose]();
      throw error;
    }
  }

  /** The widest shapes of a phase: what scratch is sized by. */
  get widest(): { maxK: number; maxOut: number } {
    const { hidden, intermediate, heads, headDim, vocab } = this.config;
    return {
      maxK: Math.max(hidden, intermediate, heads * headDim),
      maxOut: Math.max(this.qkvWidth, 2 * intermediate, vocab),
    };
  }
  get qkvWidth(): number {
    return qkvWidth(this.config);
  }

  /** x = embedding of device tokens. */
  embed(act: Activations, tokens: number, rows: number, stream: Stream): void {
    const { hidden, vocab, dtype } = this.config;
    this.#device.lib.fkv_embed(
      act.x,
      tokens,
      this.#embed,
      dtypeCode[dtype],
      hidden,
      vocab,
      rows,
      stream.handle,
    );
  }

  /** qkv = Wqkv·norm(x). */
  qkv(dense: DenseQueue, act: Activations, layer: number, rows: number): void {
    const { qkv } = this.#layers[layer] as LayerWeights;
    dense.add(qkv, epilogue.store, act.x, qkv.k, act.qkv, qkv.nOut, rows);
  }

  /** x += Wo·attended; x += Wdown·silu-gated(Wgu·norm(x)). */
  project(dense: DenseQueue, act: ActivationRows, layer: number, rows: number): void {
    const { o, gateUp, down } = this.#layers[layer] as LayerWeights;
    dense.add(o, epilogue.add, act.attended, o.k, act.x, o.nOut, rows);
    dense.add(gateUp, epilogue.swiglu, act.x, gateUp.k, act.mlp, down.k, rows);
    dense.add(down, epilogue.add, act.mlp, down.k, act.x, down.nOut, rows);
  }

  /** logits [rows][vocab] = head·norm(x), x the address of the first row. */
  logits(dense: DenseQueue, x: number, logits: number, rows: number): void {
    dense.add(this.#head, epilogue.store, x, this.#head.k, logits, this.#head.nOut, rows);
  }

  /** Fields of `fkv_rope_params` for this layer: QK-norm and RoPE on qkv, positions an address of device int32. */
  ropeFields(
    act: Activations,
    layer: number,
    positions: number,
    rows: number,
  ): Parameters<typeof pack.fkv_rope_params>[0] {
    const { config } = this;
    const { qNorm, kNorm } = this.#layers[layer] as LayerWeights;
    return {
      n_rows: rows,
      n_q_heads: config.heads,
      n_kv_heads: config.kvHeads,
      head_dim: config.headDim,
      dtype: dtypeCode[config.dtype],
      eps: config.eps,
      scale: config.rope.scale,
      qkv: act.qkv,
      positions,
      inv_freq: this.#invFreq,
      q_norm: qNorm,
      k_norm: kNorm,
    };
  }

  rope(act: Activations, layer: number, positions: number, rows: number, stream: Stream): void {
    this.#device.lib.fkv_rope(
      pack.fkv_rope_params(this.ropeFields(act, layer, positions, rows)),
      stream.handle,
    );
  }

  [Symbol.dispose](): void {
    for (const buffer of this.#owned) buffer[Symbol.dispose]();
  }
}
