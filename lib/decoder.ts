// What a decode step works with: one value that the step's stages share and none of them changes.
import type { Cache } from "./cache.ts";
import type { Check } from "./correct.ts";
import type { DenseQueue } from "./dense.ts";
import type { Device, Stream } from "./device.ts";
import type { Activations, Network } from "./network.ts";
import type { Recall } from "./recall.ts";
import type { Waits } from "./waits.ts";

export interface Decoder {
  readonly device: Device;
  readonly network: Network;
  readonly cache: Cache;
  readonly act: Activations;
  readonly dense: DenseQueue;
  /** Address of logits [maxRows][vocab]. */
  readonly logits: number;
  /** The one stream of everything dense, of attention and of prefill. */
  readonly compute: Stream;
  /** What runs beside the step: speculation, prefetch, finished pages. */
  readonly side: Stream;
  readonly check: Check;
  readonly recall: Recall;
  readonly waits: Waits;
  readonly digestKind: number;
}
