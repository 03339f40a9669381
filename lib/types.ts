/// <reference lib="esnext.disposable" preserve="true" />
// The public vocabulary of `freekv`. An option is the camelCase of its CLI flag. Counts are tokens unless the name has a unit.

/** Token ids, taken as they are: nothing is added to them. */
export type TokenIds = readonly number[] | Int32Array;
/** A string is text as the tokenizer reads it (BOS added where a sequence begins, no template). */
export type Prompt = string | TokenIds;

/** Where a long call stands. */
export interface Progress {
  phase: "read" | "upload" | "prefill";
  done: number;
  total: number;
  unit: "bytes" | "tokens";
}
/** What every long call takes. An abort rejects with `signal.reason`. */
export interface TaskOptions {
  signal?: AbortSignal | undefined;
  onProgress?: ((progress: Progress) => void) | undefined;
}

/** What may differ between the sequences of one engine; the engine's own values are the defaults. */
export interface PolicyOptions {
  /** Which pages a decode step attends to; default "freekv". */
  policy?: "freekv" | "retrieve" | "quest" | "streaming" | "full" | undefined;
  /** Tokens per KV head on the device: sink + window + selected; default 2048, a multiple of the page size. */
  budget?: number | undefined;
  /** First tokens, always attended; default 512. */
  sink?: number | undefined;
  /** Newest tokens, always attended; default 512, at least one page. */
  window?: number | undefined;
  /** When a head selects again before attention; default "threshold". */
  correction?: "threshold" | "exact" | "off" | undefined;
  /** A head is flagged where its mean query cosine is below this; −1..1, default 0.8; an array gives one per layer. */
  tau?: number | readonly number[] | undefined;
  /** Select for the next step beside this one; false makes the same selection before attention; default true. */
  speculate?: boolean | undefined;
  /** Pages per head to bring beyond the selection, beside the step, as far as slots have room for them; default 0. */
  prefetch?: number | undefined;
}

/** What one engine is made with. Device, dtype, page size, slots, digest, recall and orchestration cannot change afterwards. */
export interface EngineOptions extends PolicyOptions, TaskOptions {
  /** "auto" (default): cuda where it works, else cpu (the twin). */
  device?: "auto" | "cpu" | "cuda" | `cuda:${number}` | undefined;
  /** Storage of K and V; default the checkpoint's. */
  kvDtype?: "bf16" | "f16" | "f32" | undefined;
  /** Tokens a page: 16, 32 (default) or 64. */
  pageSize?: number | undefined;
  /** Page digest: channel-wise min and max ("quest", default) or mean ± mean absolute deviation ("arkvale"). */
  digest?: "quest" | "arkvale" | undefined;
  /** Pages cached per KV head beyond sink and window; default three times the selection: of real selections that recalls a third of what twice does, for a quarter more memory. */
  slots?: number | undefined;
  /** How pages come from the host; default "gather". */
  recall?: "gather" | "staged" | "fragmented" | undefined;
  /** Who decides in a step: a captured graph (default with gather) or TypeScript at each layer. */
  orchestration?: "captured" | "host" | undefined;
  /** Device layout of pages; default "hnd". */
  layout?: "hnd" | "nhd" | undefined;
  /** Buffers of a staged recall, 1..4; default 2. */
  stagingBuffers?: number | undefined;
  /** "split" launches each dense phase alone, with the same bits; default "auto". */
  chain?: "auto" | "split" | undefined;
  /** Where earlier pages wait during prefill; "host" streams them back for each chunk; default "device". */
  prefillKv?: "device" | "host" | undefined;
  /** Tokens of a prompt that are computed at a time, a multiple of 64; default by the device and its memory, 512 to 4096. */
  prefillChunk?: number | undefined;
  /**
   * "invariant": a token's bits depend on the tokens before it alone, never on the batch, on chunks or on what else runs, so
   * `score` gives the same numbers and a seed the same tokens each time. "fast" (default): prompts are computed with
   * activations rounded to the weights' type, at nearly twice the speed and equal within its accuracy; where a prompt's chunks
   * begin may then show in the last bits. The twin is always invariant.
   */
  numerics?: "fast" | "invariant" | undefined;
  /** Page scores: softmax of scaled scores, then the group's mean ("freekv", default), or the published speed code: the group mean of raw scores, on ArkVale digests. */
  estimate?: "freekv" | "paper-speed" | undefined;
  /** The CPU twin's own: a seeded schedule of its streams, a simulated host link, its compute threads. */
  twin?:
    | {
        scheduleSeed?: number | undefined;
        linkBytesPerSecond?: number | undefined;
        threads?: number | undefined;
      }
    | undefined;
  /** Longest sequence; default the model's. */
  maxContext?: number | undefined;
  /** Sequences alive at once; default 8. */
  maxSequences?: number | undefined;
  /** Limit of pinned host memory for pages, in bytes; default 80% of the free memory. */
  hostBytes?: number | undefined;
  /** The native library to load instead of searching. */
  libraryPath?: string | URL | undefined;
  /** Validate every call into the library. */
  debug?: boolean | undefined;
  /**
   * CUDA's: kernels do as on a chip without clusters, warpgroups and 200 KiB of shared memory, slower and with the same
   * bits: to test those ways on any GPU; default false.
   */
  plain?: boolean | undefined;
}

/** How a continuation is drawn. */
export interface GenerateOptions {
  /** Default 256. */
  maxTokens?: number | undefined;
  /** Ends before the first of these texts. */
  stop?: string | readonly string[] | undefined;
  /** Ends with the first of these tokens, beside the model's own. */
  stopTokens?: TokenIds | undefined;
  ignoreEos?: boolean | undefined;
  /** 0 (default): greedy. */
  temperature?: number | undefined;
  topP?: number | undefined;
  topK?: number | undefined;
  /** Draws depend on the seed and the position alone; default a random one. */
  seed?: number | undefined;
  /** How many of the most probable tokens to report with each, 0..20. */
  logprobs?: number | undefined;
  signal?: AbortSignal | undefined;
}

/** `text` is what became printable: "" inside a UTF-8 character or a possible stop string. Texts join to `Completion.text`. */
export interface Token {
  id: number;
  text: string;
  logprob?: number;
  top?: { id: number; logprob: number }[];
}
export interface Completion {
  text: string;
  tokens: number[];
  finishReason: "stop" | "length" | "context";
  usage: { promptTokens: number; cachedTokens: number; completionTokens: number };
  stats: Stats;
}
/** Nothing runs until it is read. `break` stops it; the sequence then holds exactly the tokens that were yielded. */
export interface Generation extends AsyncIterable<Token> {
  text(): Promise<string>;
  result(): Promise<Completion>;
}
/** Position i's log-probability of token i + 1, and the token it would have chosen. */
export interface Scored {
  position: number;
  next: number;
  logprob: number;
  argmax: number;
}

/** The keys of the CLI's summaries, too. null: the policy has no such thing. `stallMs`: time attention waited for recall. */
export interface Stats {
  ttftMs: number | null;
  tpotMs: number | null;
  stallMs: number | null;
  recalledPages: number;
  recalledBytes: number;
  hitRate: number | null;
  correctedShare: number | null;
  deviceKvBytes: number;
  totalKvBytes: number;
}
export interface EngineStats extends Stats {
  sequences: number;
  hostPages: number;
  hostBytes: number;
  deviceBytes: number;
}
export interface Tokenizer {
  /** Ids of a text that begins a sequence (BOS where the model has one). */
  encode(text: string): Int32Array;
  decode(ids: TokenIds): string;
}
export interface ModelInfo {
  architecture: string;
  layers: number;
  heads: number;
  kvHeads: number;
  headDim: number;
  vocabSize: number;
  contextLength: number;
}
