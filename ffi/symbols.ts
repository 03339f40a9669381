// Every entry of cuda/freekv.h as data. A backend (bun.ts, and one file each for other runtimes) binds this table;
// the TypeScript type of each call is derived from it, so a misspelt or wrongly typed call does not compile.

/**
 * How one argument is passed.
 * - `ptr`: an address as a number, never null: an opaque handle, device memory or pinned memory.
 * - `ptr?`: the same, or null.
 * - `buf`: JavaScript memory, passed as such (the address of a small array may change from one call to the next):
 *   parameter structs, which C copies at the call, and outputs, which it writes before it returns. What has no bytes
 *   becomes the null pointer or not, as the runtime has it.
 * - `mem`: an address, or JavaScript memory that C reads before it returns.
 * - `i32`, and `u64`: an integer, as a number up to 2^53 − 1 or a bigint.
 */
export type ArgKind = "ptr" | "ptr?" | "buf" | "mem" | "i32" | "u64";
export type ReturnKind = "status" | "i32" | "cstring";

/** `name: kind` for each argument in the header's order; the return is a status unless `-> kind` says otherwise. */
export const signatures = {
  fkv_abi_version: "-> i32",
  fkv_last_error: "-> cstring",
  fkv_backend: "-> cstring",

  fkv_device_count: "count: buf",
  fkv_device_open: "device: buf, params: buf",
  fkv_device_close_sync: "device: ptr",
  fkv_device_get_info: "info: buf, device: ptr",
  fkv_device_synchronize_sync: "device: ptr",

  fkv_device_alloc: "memory: buf, bytes: u64, device: ptr",
  fkv_device_free: "memory: ptr, device: ptr",
  fkv_host_alloc: "memory: buf, bytes: u64, device: ptr",
  fkv_host_free: "memory: ptr, device: ptr",
  fkv_host_reserve: "memory: buf, bytes: u64, piece_bytes: u64, device: ptr",
  fkv_host_grow: "memory: ptr, bytes: u64, device: ptr",
  fkv_host_ready: "bytes: buf, memory: ptr, device: ptr",
  fkv_host_register: "memory: mem, bytes: u64, device: ptr",
  fkv_host_unregister: "memory: mem, device: ptr",
  fkv_memcpy_async: "dst: ptr, src: mem, bytes: u64, stream: ptr",
  fkv_memcpy_2d_async:
    "dst: ptr, dst_pitch: u64, src: mem, src_pitch: u64, width: u64, height: u64, stream: ptr",
  fkv_memset_async: "dst: ptr, value: i32, bytes: u64, stream: ptr",
  fkv_memset_2d_async: "dst: ptr, pitch: u64, value: i32, width: u64, height: u64, stream: ptr",
  fkv_write_async: "dst: ptr, src: mem, bytes: u64, stream: ptr",

  fkv_stream_create: "stream: buf, device: ptr",
  fkv_stream_compute: "stream: buf, device: ptr",
  fkv_stream_destroy_sync: "stream: ptr",
  fkv_stream_synchronize_sync: "stream: ptr",
  fkv_stream_wait_event: "event: ptr, stream: ptr",
  fkv_event_create: "event: buf, device: ptr",
  fkv_event_destroy: "event: ptr",
  fkv_event_record: "event: ptr, stream: ptr",
  fkv_event_query: "done: buf, event: ptr",
  fkv_event_wait_sync: "done: buf, event: ptr, timeout_us: u64",
  fkv_event_elapsed_ms: "ms: buf, start: ptr, end: ptr",
  fkv_capture_begin: "stream: ptr",
  fkv_capture_end: "graph: buf, stream: ptr",
  fkv_graph_launch: "graph: ptr, stream: ptr",
  fkv_graph_destroy: "graph: ptr",
  fkv_clock_start: "mark: ptr, stream: ptr",
  fkv_clock_stop: "total: ptr, mark: ptr, stream: ptr",

  fkv_embed:
    "out: ptr, tokens: ptr, table: ptr, dtype: i32, hidden: i32, vocab: i32, n_rows: i32, stream: ptr",
  fkv_dense_chain: "phases: buf, n_phases: i32, n_rows: i32, family: i32, scratch: ptr?, stream: ptr",
  fkv_chain_scratch_bytes: "bytes: buf, n_rows: i32, max_k: i32, max_out: i32",
  fkv_rope: "params: buf, stream: ptr",

  fkv_control_load: "cache: buf, ring: ptr, step: ptr, ring_entries: i32, n_rows: i32, stream: ptr",
  fkv_append: "cache: buf, qkv: ptr, layer: i32, n_rows: i32, stream: ptr",
  fkv_check: "cache: buf, qkv: ptr, layer: i32, n_rows: i32, stream: ptr",
  fkv_estimate: "cache: buf, workspace: buf, qkv: ptr?, layer: i32, stage: i32, n_rows: i32, stream: ptr",
  fkv_select: "cache: buf, workspace: buf, layer: i32, stage: i32, n_rows: i32, stream: ptr",
  fkv_recall_gather: "cache: buf, workspace: buf, layer: i32, n_rows: i32, stream: ptr",
  fkv_recall_scatter: "cache: buf, staging: ptr, entries: ptr, n: i32, layer: i32, stream: ptr",
  fkv_retrieve: "cache: buf, params: buf, stream: ptr",
  fkv_attend: "out: ptr, cache: buf, qkv: ptr, layer: i32, n_rows: i32, stream: ptr",
  fkv_attend_scratch_bytes: "bytes: buf, cache: buf",
  fkv_page_finish: "cache: buf, digest_kind: i32, layer: i32, n_rows: i32, stream: ptr",
  fkv_sample: "cache: buf, params: buf, stream: ptr",

  fkv_pages_copy: "cache: buf, params: buf, stream: ptr",
  fkv_pages_digest: "cache: buf, params: buf, digest_kind: i32, stream: ptr",
  fkv_prefill_append: "cache: buf, params: buf, stream: ptr",
  fkv_prefill_attend: "cache: buf, params: buf, stream: ptr",

  fkv_module_load: "module: buf, image: mem, bytes: u64, device: ptr",
  fkv_module_unload_sync: "module: ptr",
  fkv_module_kernel: "kernel: buf, name: buf, sizes: buf, n_arguments: i32, module: ptr",
  fkv_kernel_launch: "kernel: ptr, params: buf, arguments: buf, stream: ptr",
  fkv_program_compile_sync: "program: buf, source: buf, name: buf, options: buf, library: buf, device: ptr",
  fkv_program_sizes: "image_bytes: buf, log_bytes: buf, program: ptr",
  fkv_program_read: "image: buf, log: buf, program: ptr",
  fkv_program_destroy: "program: ptr",
} as const;

export type EntryName = keyof typeof signatures;
type Signature<N extends EntryName> = (typeof signatures)[N];

export type JsMemory = ArrayBuffer | ArrayBufferView;

interface Js {
  ptr: number;
  "ptr?": number | null;
  buf: JsMemory;
  mem: number | JsMemory;
  i32: number;
  u64: number | bigint;
}
interface Result {
  status: number;
  i32: number;
  cstring: string;
}

type Args<S extends string> = S extends `-> ${string}`
  ? []
  : S extends `${string}: ${infer K extends ArgKind}, ${infer Rest}`
    ? [Js[K], ...Args<Rest>]
    : S extends `${string}: ${infer K extends ArgKind}`
      ? [Js[K]]
      : never;
type Return<S extends string> = S extends `-> ${infer R extends ReturnKind}` ? R : "status";

/** The arguments of an entry, as a tuple. */
export type CallArgs<N extends EntryName> = Args<Signature<N>>;

/** The entries as a backend binds them: those that return a status return it as a number. */
export type RawCalls<N extends EntryName = EntryName> = {
  readonly [E in N]: (...args: CallArgs<E>) => Result[Return<Signature<E>>];
};

/** The entries as the rest of the code calls them: a status that is not FKV_OK throws. */
export type Calls = {
  readonly [E in EntryName]: Return<Signature<E>> extends "status"
    ? (...args: CallArgs<E>) => void
    : RawCalls[E];
};

/** One entry, parsed. */
export interface Entry {
  readonly args: readonly { readonly name: string; readonly kind: ArgKind }[];
  readonly returns: ReturnKind;
}
export type SymbolTable<N extends EntryName = EntryName> = { readonly [E in N]: Entry };

function parse(signature: string): Entry {
  if (signature.startsWith("-> ")) return { args: [], returns: signature.slice(3) as ReturnKind };
  const args = signature.split(", ").map((arg) => {
    const [name = "", kind = ""] = arg.split(": ");
    return { name, kind: kind as ArgKind };
  });
  return { args, returns: "status" };
}

export const entryNames: readonly EntryName[] = Object.keys(signatures) as EntryName[];

/** The table of these entries, for a backend to bind. */
export function symbolTable<N extends EntryName>(names: readonly N[]): SymbolTable<N> {
  return Object.fromEntries(names.map((name) => [name, parse(signatures[name])])) as SymbolTable<N>;
}

/** What a runtime's FFI provides: `#backend` exports `load`. */
export interface Backend<N extends EntryName = EntryName> {
  readonly calls: RawCalls<N>;
  /** A view of C's memory without a copy: 1 to 2^32 bytes. Whoever frees that memory detaches the view first. */
  toArrayBuffer(address: number, bytes: number): ArrayBuffer;
  /** Make such a view, which is not empty, empty; the memory stays as it is. */
  detach(buffer: ArrayBuffer): void;
}
/** Open the library at `path` and bind the table; throws the runtime's own error where either fails. */
export type Load = <N extends EntryName>(path: string, table: SymbolTable<N>) => Backend<N>;
