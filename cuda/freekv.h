// freekv.h: the thin C ABI between the TypeScript pipeline and a device. `libfreekv_cpu` (the twin) and `libfreekv_cuda`
// export exactly these entries; the twin is the numerical reference.
//
// Rules. Every entry returns an int32_t status, 0 = FKV_OK; fkv_last_error() explains the last failure of the calling
// thread. Outputs come first, the stream last; every launch is asynchronous on it; what blocks ends in `_sync`. An entry is
// one operation: which operations follow each other is decided in TypeScript. Parameter structs start with
// `struct_bytes = sizeof(struct)`, are copied at the call (also at capture), and what their pointers point to is read when
// the operation runs. No step operation allocates. Shapes are C order, offsets in bytes are 64-bit.
//
// Terms (design section 2): L layers, Hq query heads, Hkv KV heads, G = Hq/Hkv, d head dim, P page size. A *frame* is the
// place of one page of one layer on the device (all KV heads), a *block* that of one page of all layers on the host,
// a *lane* the device state of one sequence, a *row* one sequence's place in a step's batch.
#ifndef FREEKV_H
#define FREEKV_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FKV_API __attribute__((visibility("default")))
#define FKV_ABI_VERSION 1
#define FKV_MAX_TOP 20

// Status codes. ffi/ maps them to FreeKVError codes.
enum {
  FKV_OK = 0,
  FKV_BAD_ARGUMENT = 1,   // null, misaligned or out of range; text says which
  FKV_BAD_SHAPE = 2,      // shapes that do not fit each other
  FKV_OUT_OF_MEMORY = 3,
  FKV_NO_DEVICE = 4,
  FKV_ABI_MISMATCH = 5,   // struct_bytes of another version
  FKV_CAPTURE = 6,        // not allowed during capture, an unjoined fork, or a wait across the capture's boundary
  FKV_NOT_RECORDED = 7,   // wait, query or elapsed time on an event that was never recorded
  FKV_DEVICE_FAILED = 8,  // an asynchronous operation failed; sticky for the device
  FKV_UNSUPPORTED = 9,
};
enum { FKV_F32 = 0, FKV_BF16 = 1, FKV_F16 = 2 };

typedef struct fkv_device fkv_device;
typedef struct fkv_stream fkv_stream;
typedef struct fkv_event fkv_event;
typedef struct fkv_graph fkv_graph;

// ---- version and errors ----
FKV_API int32_t fkv_abi_version(void);
// Text of the calling thread's last failed call; valid until its next failed call. Never null.
FKV_API const char* fkv_last_error(void);
// "cpu" or "cuda".
FKV_API const char* fkv_backend(void);

// ---- devices ----
typedef struct fkv_device_params {
  uint32_t struct_bytes;
  int32_t ordinal;
  uint64_t schedule_seed;          // twin only: 0 = real threads; else operations run one at a time in a seeded order (see cpu/twin.h)
  double link_bytes_per_second;    // twin only: simulated host link, each way; 0 = none
  int32_t threads;                 // twin only: compute threads; 0 = all cores
  int32_t plain;                   // CUDA only: 1 = as on a chip without clusters, warpgroups and 200 KiB of shared memory; same bits
} fkv_device_params;
typedef struct fkv_device_info {
  uint32_t struct_bytes;
  int32_t compute_major, compute_minor;  // CUDA compute capability; 0 for the twin
  int32_t multiprocessors;               // SMs; compute threads of the twin
  double total_bytes, free_bytes;        // device memory
  double allocated_bytes;                // by fkv_device_alloc, now
  double pinned_bytes;                   // by fkv_host_alloc, fkv_host_register and fkv_host_reserve, now
  double shared_bytes_per_block;         // the most that a kernel may ask for; this and the next three are 0 for the twin
  double l2_bytes;
  int32_t max_threads_per_block, warp_size;
  char name[128];
} fkv_device_info;
FKV_API int32_t fkv_device_count(int32_t* count);
FKV_API int32_t fkv_device_open(fkv_device** device, const fkv_device_params* params);
// Waits for the device's work and frees what is left. Streams, events, graphs and memory of it are invalid afterwards.
FKV_API int32_t fkv_device_close_sync(fkv_device* device);
FKV_API int32_t fkv_device_get_info(fkv_device_info* info, fkv_device* device);
FKV_API int32_t fkv_device_synchronize_sync(fkv_device* device);

// ---- memory ----
// 256-byte aligned device memory, contents undefined (the twin fills it with NaN bytes 0xFF).
FKV_API int32_t fkv_device_alloc(void** memory, uint64_t bytes, fkv_device* device);
FKV_API int32_t fkv_device_free(void* memory, fkv_device* device);
// Pinned host memory, 4096-byte aligned, zeroed, readable by kernels of the device at the same address.
FKV_API int32_t fkv_host_alloc(void** memory, uint64_t bytes, fkv_device* device);
// Of fkv_host_alloc, or of fkv_host_reserve, whose thread it ends.
FKV_API int32_t fkv_host_free(void* memory, fkv_device* device);
// Address space for pinned host memory, 2 MiB aligned, of which nothing is there yet: a thread of the library's own makes it so, from
// its start on, as far as fkv_host_grow asks (a number of bytes from the start; less than was asked before changes nothing). What is
// there is as by fkv_host_alloc. Each piece of piece_bytes (a multiple of 4096) is pinned by itself, and a copy must not cross from one
// to the next. A launch waits for the piece that is being pinned.
FKV_API int32_t fkv_host_reserve(void** memory, uint64_t bytes, uint64_t piece_bytes, fkv_device* device);
FKV_API int32_t fkv_host_grow(void* memory, uint64_t bytes, fkv_device* device);
// How much is there from the start, and, where it cannot grow any more, why: the status and text of this call; *bytes is set all the same.
FKV_API int32_t fkv_host_ready(uint64_t* bytes, void* memory, fkv_device* device);
// Pins memory that the caller owns and has touched.
FKV_API int32_t fkv_host_register(void* memory, uint64_t bytes, fkv_device* device);
FKV_API int32_t fkv_host_unregister(void* memory, fkv_device* device);
// Each side is device or pinned memory. During capture both must be; outside it, pageable host memory makes the call blocking
// on CUDA and is copied at the call by the twin (host to device only; device to pageable is BAD_ARGUMENT).
FKV_API int32_t fkv_memcpy_async(void* dst, const void* src, uint64_t bytes, fkv_stream* stream);
// `height` rows of `width` bytes, `*_pitch` bytes apart.
FKV_API int32_t fkv_memcpy_2d_async(void* dst, uint64_t dst_pitch, const void* src, uint64_t src_pitch, uint64_t width, uint64_t height, fkv_stream* stream);
FKV_API int32_t fkv_memset_async(void* dst, int32_t value, uint64_t bytes, fkv_stream* stream);
// `height` rows of `width` bytes, `pitch` bytes apart; what lies between them stays.
FKV_API int32_t fkv_memset_2d_async(void* dst, uint64_t pitch, int32_t value, uint64_t width, uint64_t height, fkv_stream* stream);
// Writes up to 3072 bytes, copied from any host memory at the call, to device memory when the stream gets there.
FKV_API int32_t fkv_write_async(void* dst, const void* src, uint64_t bytes, fkv_stream* stream);

// ---- streams, events, graphs ----
FKV_API int32_t fkv_stream_create(fkv_stream** stream, fkv_device* device);
// The device's compute stream, one for all that is issued on this ordinal in the process, through whichever fkv_device (the twin's share
// nothing: there it is one for each). Kernels whose blocks wait for each other run only there, so that no two of them ever hold each
// other up. Each call is answered by one fkv_stream_destroy_sync.
FKV_API int32_t fkv_stream_compute(fkv_stream** stream, fkv_device* device);
FKV_API int32_t fkv_stream_destroy_sync(fkv_stream* stream);
FKV_API int32_t fkv_stream_synchronize_sync(fkv_stream* stream);
FKV_API int32_t fkv_stream_wait_event(fkv_event* event, fkv_stream* stream);  // NOT_RECORDED if it never was
FKV_API int32_t fkv_event_create(fkv_event** event, fkv_device* device);
FKV_API int32_t fkv_event_destroy(fkv_event* event);
FKV_API int32_t fkv_event_record(fkv_event* event, fkv_stream* stream);
FKV_API int32_t fkv_event_query(int32_t* done, fkv_event* event);             // of the latest record
// Blocks at most `timeout_us` microseconds without burning a core; *done = 0 when time ran out.
FKV_API int32_t fkv_event_wait_sync(int32_t* done, fkv_event* event, uint64_t timeout_us);
FKV_API int32_t fkv_event_elapsed_ms(float* ms, fkv_event* start, fkv_event* end);  // both must have completed
// Thread-local-mode capture of everything issued to `stream` and to streams that fork from it through events; forks must join.
FKV_API int32_t fkv_capture_begin(fkv_stream* stream);
FKV_API int32_t fkv_capture_end(fkv_graph** graph, fkv_stream* stream);
FKV_API int32_t fkv_graph_launch(fkv_graph* graph, fkv_stream* stream);
FKV_API int32_t fkv_graph_destroy(fkv_graph* graph);
// *mark = the device's clock in ns, when the stream gets there.
FKV_API int32_t fkv_clock_start(uint64_t* mark, fkv_stream* stream);
// *total += clock − *mark.
FKV_API int32_t fkv_clock_stop(uint64_t* total, const uint64_t* mark, fkv_stream* stream);

// ---- the dense part ----
// out [n_rows][hidden] f32 = table[tokens[row]]; tokens outside 0..vocab−1 (an empty row) give zeros. tokens: device int32.
FKV_API int32_t fkv_embed(float* out, const int32_t* tokens, const void* table, int32_t dtype, int32_t hidden, int32_t vocab, int32_t n_rows, fkv_stream* stream);

// One phase: y = epilogue(W · prologue(x)), W [n_out][k] row-major of `dtype`, x and y f32.
// Prologue: with `norm`, x·rsqrt(mean(x²) + eps)·norm per row (RMSNorm). Epilogue, in this order: + bias; then
// STORE y = v · ADD y += v (residual) · SWIGLU with W's rows interleaved gate, up, gate, up…: y[i] = silu(v[2i])·v[2i+1], n_out/2 values.
enum { FKV_STORE = 0, FKV_ADD = 1, FKV_SWIGLU = 2 };
// Whose sums; on CUDA in f32 on tensor cores. DECODE: W exact (f32 W as the sum of two tf32 values); x as the sum of two tf32 values (2^-23 of it
// is lost), beside bf16 W of two bf16 values (2^-17; |x| above 3.38e38 is infinite). PREFILL: x as the sum
// of two values of W's type (a W that is infinite makes NaN); f32 W as DECODE. In both the order is fixed by k alone, never by n_rows (design
// section 5); how an instruction adds its products is the chip's own. FAST: few rows as DECODE, many with x rounded to W's type. The twin has one
// order for all. In PREFILL and FAST, the y of a SWIGLU phase that the next phase of the same call reads as its x is undefined afterwards.
enum { FKV_DECODE = 0, FKV_PREFILL = 1, FKV_FAST = 2 };
typedef struct fkv_phase {
  const void* weight;
  const void* bias;      // [n_out] of dtype, or null
  const void* norm;      // [k] of dtype, or null
  const float* x;        // [n_rows] rows, x_stride floats apart
  float* y;              // [n_rows] rows, y_stride floats apart
  int64_t x_stride, y_stride;
  int32_t n_out, k, dtype, epilogue;
  float eps;
  int32_t reserved;
} fkv_phase;
// Runs the phases in order, each seeing the ones before it. scratch: device memory, fkv_chain_scratch_bytes() of it, zeroed once before
// its first use, not shared with another chain in flight. k and n_out any positive number; k a multiple of 64, weights, norms and rows of
// x aligned to 16 bytes are fast. Calls of more than one phase that may run at one time belong on one stream (on CUDA their blocks wait for
// each other); a phase alone waits for nothing.
FKV_API int32_t fkv_dense_chain(const fkv_phase* phases, int32_t n_phases, int32_t n_rows, int32_t family, void* scratch, fkv_stream* stream);
FKV_API int32_t fkv_chain_scratch_bytes(uint64_t* bytes, int32_t n_rows, int32_t max_k, int32_t max_out);

// In place on qkv [n_rows][(Hq + 2·Hkv)·d] f32 (q heads, k heads, v heads): per head of q and k, QK-norm (RMSNorm over d) where a
// weight is given, then RoPE on pairs (i, i + d/2): angle = position·inv_freq[i] in float64; cos and sin rounded to f32, times `scale`.
typedef struct fkv_rope_params {
  uint32_t struct_bytes;
  int32_t n_rows, n_q_heads, n_kv_heads, head_dim, dtype;  // dtype of the norm weights
  float eps, scale;
  float* qkv;
  const int32_t* positions;   // device int32 [n_rows]
  const double* inv_freq;     // device f64 [d/2]
  const void* q_norm;         // [d] or null
  const void* k_norm;         // [d] or null
} fkv_rope_params;
FKV_API int32_t fkv_rope(const fkv_rope_params* params, fkv_stream* stream);

// ---- the cache ----
// Where pages live. Address of element i of (page index p, layer l, head h, kv 0 = K or 1 = V, token row r):
// origin + l·layer + h·head + kv·kv + r·row + i·bytes(dtype), origin = base + p·frame, or, with chunks,
// chunks[p >> shift] + (p & (1 << shift) − 1)·frame (chunks: device u64 array of addresses; blocks of the host pool).
// Strides in bytes, multiples of 16. HND: row = d, kv = P·d, head = 2·P·d; NHD: head = d, row = Hkv·d, kv = P·Hkv·d (times bytes).
typedef struct fkv_frames {
  uint64_t base;
  const uint64_t* chunks;
  int64_t layer, frame, head, kv, row;
  int32_t shift, reserved;
} fkv_frames;

// The device state of one sequence; written by the host (fkv_write_async) when the sequence is made or changed.
// Frames: not resident: page p < sink_pages → frame p; a window page p → sink_pages + p mod (window_pages + 1);
// slot s → sink_pages + window_pages + 1 + s. Resident (full, quest): page p → frame p, no slots.
// Window of a step at length len (the current token counted): pages from max(sink_pages, len/P − window_pages) to (len−1)/P.
// Candidates: pages sink_pages .. len/P − window_pages − 1.
typedef struct fkv_lane {
  uint64_t frames;          // device, [L][n_frames] frames of frame_bytes, device layout
  float* q_prev;            // [L][Hq][d] q of the token before, after RoPE
  float* logits;            // [vocab] after the sequence's last token
  const float* tau;         // [L]
  int32_t* slot_page;       // [L][Hkv][n_slots] page in the slot, −1 = empty
  int32_t* slot_used;       // [L][Hkv][n_slots] length at which it was last selected, 0 = never
  int32_t* n_selected;      // [L][Hkv]
  int32_t* selected_page;   // [L][Hkv][k] ascending
  int32_t* selected_slot;   // [L][Hkv][k]
  int32_t n_frames, sink_pages, window_pages, k, n_slots;
  int32_t resident;         // 1: frame p is page p
  int32_t attend_all;       // 1: attends every page (full); implies resident
  int32_t reserved;
} fkv_lane;

// What a row does in one step: an entry of the control ring.
enum { FKV_CORRECT_OFF = 0, FKV_CORRECT_THRESHOLD = 1, FKV_CORRECT_EXACT = 2 };
// NONE: no selection but the corrected one (retrieve, quest). NEXT: heads not flagged select for the next step, beside this one.
// LAZY: the same selection, made before attention instead (speculate: false).
enum { FKV_SPECULATE_NONE = 0, FKV_SPECULATE_NEXT = 1, FKV_SPECULATE_LAZY = 2 };
typedef struct fkv_row {
  uint64_t seed;
  int32_t sequence;      // lane, −1 = an empty row, which writes nothing
  int32_t position;      // of the token fed; the step's length is position + 1
  int32_t token;         // token to feed, or −1: the one sampled last for this lane
  int32_t target;        // token whose log-probability is wanted, or −1: of the sampled token
  int32_t block;         // host block of this position's page, −1: none
  int32_t correction, speculation, prefetch;
  int32_t top_k;         // 0 = all
  int32_t n_top;         // how many of the most probable tokens to report, 0..FKV_MAX_TOP
  float temperature;     // 0 = greedy
  float top_p;
  int32_t reserved[2];
} fkv_row;

// Counts of one step of one row, over all layers and heads.
typedef struct fkv_counters {
  int32_t heads, flagged;        // heads checked (policies that check), flagged
  int32_t selected, hits;        // pages selected; of them found in a slot (NEXT serving a flagged head again: not counted twice)
  int32_t misses_now;            // pages recalled from the host before attention
  int32_t misses_next;           // recalled for the next step
  int32_t moved;                 // copied from the window on the device: neither hit nor miss
  int32_t prefetched;
} fkv_counters;

// What a step tells the host about a row; an entry of the pinned output ring.
typedef struct fkv_result {
  int32_t token, argmax;
  float logprob;                 // of `target`, or of `token`; natural log, temperature not applied; NaN if no logit is above −inf
  int32_t n_top;
  uint64_t stall_ns;             // *stall at that moment (cumulative)
  fkv_counters counters;
  int32_t top_id[FKV_MAX_TOP];
  float top_logprob[FKV_MAX_TOP];
} fkv_result;

// For measurements on weights that mean nothing: selections whose changes are known. 0: as it is.
typedef struct fkv_forced {
  int32_t flagged;  // THRESHOLD flags this share of the heads, out of 1024, drawn by (position, layer, head)
  int32_t period;   // a page's pooled score is a number drawn anew every `period` tokens: of many candidates, 1/period of a selection is new
} fkv_forced;

// One engine's cache geometry and tables. All pointers are device memory.
typedef struct fkv_cache {
  uint32_t struct_bytes;
  int32_t dtype;                 // of K, V and digests
  int32_t n_layers, n_q_heads, n_kv_heads, head_dim, page_size;
  int32_t max_rows, max_pages, max_slots;   // widths of the tables below
  int32_t pooling;               // 0: mean over the group of each head's softmax; 1: mean over the group of raw scores
  float score_scale;             // of page scores; 1/√d by default
  float attention_scale;         // 1/√d
  int32_t reserved;
  int64_t frame_bytes;           // of one page of one layer: Hkv·2·P·d·bytes
  fkv_frames device;             // strides of a lane's frames (base, chunks, layer and shift unused; layer = n_frames·frame_bytes)
  fkv_frames host;               // the host pool: page index = block id
  fkv_frames digests;            // [2][d] a block, layer and head: frame, layer, head, kv (0 = min, 1 = max) strides; row unused
  const fkv_lane* lanes;         // [max lanes]
  int32_t* sampled;              // [max lanes] the token sampled last
  int32_t* block_table;          // [max lanes][max_pages]
  fkv_row* rows;                 // [max_rows] this step's control
  int32_t* tokens;               // [max_rows]
  int32_t* positions;            // [max_rows]; −1 for an empty row
  uint8_t* flags;                // [L][max_rows][Hkv] 1 = flagged
  fkv_counters* counters;        // [max_rows]
  const fkv_forced* forced;      // or null
  void* attend_scratch;          // fkv_attend_scratch_bytes() of it, zeros before its first use; for one fkv_attend at a time
} fkv_cache;

// First operation of a step: rows = ring[*step mod ring_entries]; resolves tokens (−1: sampled[sequence]) and positions, writes
// block_table[sequence][position/P] = block where block >= 0, zeroes counters. ring: pinned, [ring_entries][max_rows].
FKV_API int32_t fkv_control_load(const fkv_cache* cache, const fkv_row* ring, const uint32_t* step, int32_t ring_entries, int32_t n_rows, fkv_stream* stream);

// K and V of each row's token (from qkv, after RoPE) into its lane's frame of that page.
FKV_API int32_t fkv_append(const fkv_cache* cache, const float* qkv, int32_t layer, int32_t n_rows, fkv_stream* stream);

// flags: OFF 0 · EXACT 1 · THRESHOLD: 1 unless mean over the group of cos(q, q_prev) >= tau[layer] (NaN is flagged). Lanes that attend
// everything or have k = 0: 0. Source: FreeKV (fine-grained correction).
FKV_API int32_t fkv_check(const fkv_cache* cache, const float* qkv, int32_t layer, int32_t n_rows, fkv_stream* stream);

// Which heads a retrieval serves, with which query, over the candidates of which length.
// NOW: flagged heads with q (from qkv) at this step's length; of rows with speculation LAZY also the others, with q_prev.
// NEXT: rows with speculation NEXT: heads not flagged, or all if a page becomes a candidate with the next length or prefetch > 0,
//       with q_prev (fkv_attend has copied q there), at the next length (this step's + 1); then the prefetch.
// FIRST: every head of rows with speculation NEXT with q_prev, at length position + 1, the row's position being that of the token to
//       come: the selection that a sequence's first decode step starts from.
enum { FKV_NOW = 0, FKV_NEXT = 1, FKV_FIRST = 2 };

// A head page to bring: from the host block, or, where frame >= 0, from that frame of the same lane (a page leaving the window).
typedef struct fkv_miss { int32_t page, slot, block, frame; } fkv_miss;

// Memory of one retrieval in flight; NOW and NEXT have their own.
typedef struct fkv_workspace {
  float* scores;        // [max_rows][Hkv][max_pages]
  float* raw;           // [max_rows][Hkv][G][max_pages] of each query head, what an SM's shared memory does not hold
  int32_t* n_misses;    // [max_rows][Hkv]
  fkv_miss* misses;     // [max_rows][Hkv][max_slots]
} fkv_workspace;

// scores[row][head][candidate − sink_pages] of the heads that `stage` serves; skipped where candidates <= k and no prefetch wants a rank.
// Score of query head h = Σ_c max(q_c·min_c, q_c·max_c)·score_scale; pooled over the group (see `pooling`): softmax over the candidates
// (sums in one order that the page's number alone decides), then mean. Source: Quest §3; FreeKV §4.
FKV_API int32_t fkv_estimate(const fkv_cache* cache, const fkv_workspace* workspace, const float* qkv, int32_t layer, int32_t stage, int32_t n_rows, fkv_stream* stream);
// Selection: the k best scores (ties to the lower page; NaN ranks last), all candidates where they are at most k; then slots: a page
// already in a slot stays (hit), any other takes the slot used longest ago (ties to the lowest) that is not in the new selection.
// Prefetch (NEXT): of ranks k+1..k+prefetch those absent, each into a slot that is empty or unused for at least 8 lengths, outside the
// selection. Writes n_selected, selected_*, slot_*, and the miss lists (n_misses = 0 for heads not served).
FKV_API int32_t fkv_select(const fkv_cache* cache, const fkv_workspace* workspace, int32_t layer, int32_t stage, int32_t n_rows, fkv_stream* stream);
// Gather recall: reads the missed head pages straight from pinned memory (or the lane's frame) and writes device layout.
FKV_API int32_t fkv_recall_gather(const fkv_cache* cache, const fkv_workspace* workspace, int32_t layer, int32_t n_rows, fkv_stream* stream);
// The second half of a staged recall: head page i of `staging` (HND, contiguous 2·P·d values each) → slot of entry i.
// entries: device or pinned, [n] of {lane, head, slot, unused}.
typedef struct fkv_scatter_entry { int32_t lane, head, slot, reserved; } fkv_scatter_entry;
FKV_API int32_t fkv_recall_scatter(const fkv_cache* cache, const void* staging, const fkv_scatter_entry* entries, int32_t n, int32_t layer, fkv_stream* stream);
// estimate + select + gather as one operation, the same bits. With `prepare` (NOW only): first RoPE (rope, its qkv), append and check.
// With `finish` (NEXT only): last, fkv_page_finish. The scores are left in the workspace only where a kernel wants them there.
// stall (NOW): where not null, stall[0] += ns in which estimate, select or gather ran for some head; stall[1] is the clock at which they
// last ended (zero before the first).
typedef struct fkv_retrieve_params {
  uint32_t struct_bytes;
  int32_t layer, stage, n_rows, prepare, finish;
  int32_t digest_kind;  // of fkv_page_finish
  int32_t reserved;
  fkv_workspace workspace;
  float* qkv;
  uint64_t* stall;
  fkv_rope_params rope;
} fkv_retrieve_params;
FKV_API int32_t fkv_retrieve(const fkv_cache* cache, const fkv_retrieve_params* params, fkv_stream* stream);

// out [n_rows][Hq·d] f32: softmax(q·K·attention_scale)·V over sink, selected and window pages of each head (all pages: attend_all),
// pages in ascending order, tokens up to the row's position; split at fixed numbers of visited pages, partials combined in an order that
// their number fixes. On CUDA K and V of two bytes meet q and the weights as the sum of two values of that type, on tensor cores.
// Copies q to q_prev. Empty rows: zeros.
FKV_API int32_t fkv_attend(float* out, const fkv_cache* cache, float* qkv, int32_t layer, int32_t n_rows, fkv_stream* stream);
FKV_API int32_t fkv_attend_scratch_bytes(uint64_t* bytes, const fkv_cache* cache);  // attend_scratch is not read

// For each row whose token completed a page: digest it (into the page's block's digest) and copy it to its host block, this layer.
FKV_API int32_t fkv_page_finish(const fkv_cache* cache, int32_t digest_kind, int32_t layer, int32_t n_rows, fkv_stream* stream);

// Next tokens. Row r's logits: logits + r·vocab, or its lane's (logits null: the first token of a generation). Greedy: argmax, ties to the
// lower id. Else temperature, then top-k, then top-p (smallest set whose probability reaches it), then a draw from
// hash(seed, position + 1 of the fed token). Writes sampled[lane], lane logits, results[*step mod ring_entries][row], then ++*step.
typedef struct fkv_sample_params {
  uint32_t struct_bytes;
  int32_t n_rows, vocab, ring_entries;
  const float* logits;     // [n_rows][vocab] f32 or null
  fkv_result* results;     // pinned [ring_entries][max_rows]
  uint32_t* step;          // device
  const uint64_t* stall;   // device or pinned
  void* scratch;           // device, 8·vocab·n_rows + 64 bytes, zeros before its first use
} fkv_sample_params;
FKV_API int32_t fkv_sample(const fkv_cache* cache, const fkv_sample_params* params, fkv_stream* stream);

// ---- whole pages, all of them asynchronous; for prefill, forks and policy changes ----
// For n pairs (copied at the call, n <= 256): page from[i] of src → page to[i] of dst, `n_layers` layers from layer0 (src) and dst_layer0;
// K and V, all heads, rows 0..n_tokens−1 (n_tokens = P: whole pages). dtype and geometry: the cache's.
typedef struct fkv_pages_params {
  uint32_t struct_bytes;
  int32_t n, src_layer0, dst_layer0, n_layers, n_tokens;
  fkv_frames src, dst;
  const int32_t* from;
  const int32_t* to;
} fkv_pages_params;
FKV_API int32_t fkv_pages_copy(const fkv_cache* cache, const fkv_pages_params* params, fkv_stream* stream);
// Digests of n complete pages: page from[i] of src → digest of block to[i]. digest_kind 0: min, max (Quest); 1: mean − and + mean
// absolute deviation (ArkVale), rounded to dtype. Uses src, n, from, to, layers of params (dst unused).
FKV_API int32_t fkv_pages_digest(const fkv_cache* cache, const fkv_pages_params* params, int32_t digest_kind, fkv_stream* stream);

// A chunk of a prompt, one layer: n tokens at positions start.., qkv [n][(Hq+2Hkv)·d] after RoPE; frames: page p at index p.
typedef struct fkv_prefill_params {
  uint32_t struct_bytes;
  int32_t layer, start, n;
  int32_t family;       // of attend: FKV_FAST, or any other of a dense chain's
  const float* qkv;
  float* out;           // [n][Hq·d] (attend)
  fkv_frames frames;
} fkv_prefill_params;
FKV_API int32_t fkv_prefill_append(const fkv_cache* cache, const fkv_prefill_params* params, fkv_stream* stream);
// Causal attention of the chunk to every token 0..start+i, keys in blocks of fixed absolute positions (64 or 128, by d), ascending: a token's
// bits do not depend on where chunks begin. On CUDA with K and V of two bytes it runs on tensor cores: q and the weights enter as the sum
// of two values of that type, or, FAST, rounded to it (then outputs are within 2^-7 for bf16, 2^-10 for f16, of the largest V).
FKV_API int32_t fkv_prefill_attend(const fkv_cache* cache, const fkv_prefill_params* params, fkv_stream* stream);

// ---- modules: kernels that are not ours ----
// CUDA only: the twin refuses all of these with UNSUPPORTED.
typedef struct fkv_module fkv_module;
typedef struct fkv_kernel fkv_kernel;    // belongs to its module
typedef struct fkv_program fkv_program;  // what a compiler made; belongs to whoever had it made

// image: `bytes` of a cubin, a fatbin or PTX, copied at the call; PTX is compiled for the device now. BAD_ARGUMENT for what the driver
// cannot load, with its log.
FKV_API int32_t fkv_module_load(fkv_module** module, const void* image, uint64_t bytes, fkv_device* device);
// Waits for the device's work. The module's kernels are invalid afterwards; graphs that hold launches of them must not be launched again.
FKV_API int32_t fkv_module_unload_sync(fkv_module* module);
// A kernel by its name in the image (`extern "C"`, or the mangled one), zero-terminated. sizes [n_arguments]: bytes of each argument,
// of a scalar or of a struct by value. BAD_ARGUMENT where the module has no such kernel (the text lists those it has), or it takes
// arguments of other sizes.
FKV_API int32_t fkv_module_kernel(fkv_kernel** kernel, const char* name, const int32_t* sizes, int32_t n_arguments, fkv_module* module);

typedef struct fkv_launch_params {
  uint32_t struct_bytes;
  uint32_t grid[3];        // blocks
  uint32_t block[3];       // threads of a block
  uint32_t cluster[3];     // blocks of a cluster; all 0: no clusters
  uint32_t shared_bytes;   // dynamic shared memory of a block
  int32_t reserved;
} fkv_launch_params;
// arguments: the values in order, each from the next multiple of 8 bytes on, copied at the call. BAD_ARGUMENT where the kernel cannot
// run in this shape.
FKV_API int32_t fkv_kernel_launch(fkv_kernel* kernel, const fkv_launch_params* params, const void* arguments, fkv_stream* stream);

// Compiles CUDA C++ for the device with NVRTC, which is looked for when this is called: UNSUPPORTED where it is not installed. All texts
// are zero-terminated. name: of the source, in messages. options: one text after another, then an empty one; without an architecture
// among them, the device's. library: NVRTC's file, or empty: the system's. A source that does not compile is no error of the call: the
// program has a log, and no image.
FKV_API int32_t fkv_program_compile_sync(fkv_program** program, const char* source, const char* name, const char* options, const char* library, fkv_device* device);
FKV_API int32_t fkv_program_sizes(uint64_t* image_bytes, uint64_t* log_bytes, fkv_program* program);
// image [image_bytes] (a cubin, or PTX where options ask for a virtual architecture) and log [log_bytes]; either may be null.
FKV_API int32_t fkv_program_read(void* image, char* log, fkv_program* program);
FKV_API int32_t fkv_program_destroy(fkv_program* program);

#ifdef __cplusplus
}
#endif
#endif
