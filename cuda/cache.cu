// cache.cu: what a step does with its token: the control that tells what each row is, K and V into their pages, the check.
//
// floors: each moves less than a launch costs: control 64 B a row from pinned memory, one round trip of the bus (about 1.5 us);
// append 2·Hkv·d values a token, written once; check 2·Hq·d floats a row at HBM read speed (32 KiB → 0.01 us on an H100).
#include "pages.cuh"
#include "stages.cuh"

namespace fkv {
namespace {

// ---- control ----

constexpr int kControlThreads = 64;

// One block: a thread a row. The block table takes a new block before anything reads it.
__global__ void __launch_bounds__(kControlThreads)
    control_kernel(const __grid_constant__ fkv_cache cache, const fkv_row* ring, const uint32_t* step, int32_t ring_entries,
                   int32_t n_rows) {
  const fkv_row* entry = ring + static_cast<int64_t>(*step % static_cast<uint32_t>(ring_entries)) * cache.max_rows;
  for (int32_t i = threadIdx.x; i < n_rows; i += kControlThreads) {
    const fkv_row row = entry[i];
    cache.rows[i] = row;
    cache.counters[i] = fkv_counters{};
    if (row.sequence < 0) {
      cache.tokens[i] = -1;
      cache.positions[i] = -1;
      continue;
    }
    const int32_t page = row.position / cache.page_size;
    require(row.position >= 0 && page < cache.max_pages);
    cache.tokens[i] = row.token >= 0 ? row.token : cache.sampled[row.sequence];
    cache.positions[i] = row.position;
    if (row.block >= 0) cache.block_table[static_cast<int64_t>(row.sequence) * cache.max_pages + page] = row.block;
  }
}

// ---- K and V of a token ----

// K (kv 0) or V (kv 1) of KV head `head` in token `token`'s row of qkv.
__device__ __forceinline__ const float* key_of(const fkv_cache& cache, const float* qkv, int64_t token, int32_t head, int32_t kv) {
  return qkv + token * qkv_width(cache) + static_cast<int64_t>(cache.n_q_heads + kv * cache.n_kv_heads + head) * cache.head_dim;
}

// One head of one row, by the whole block.
template <class T>
__device__ void append_head(const fkv_cache& cache, const fkv_row& row, const fkv_lane& lane, const float* qkv, int32_t layer,
                            int32_t row_index, int32_t head) {
  const int32_t frame = lane_frame_of_window_page(lane, row.position / cache.page_size), eights = cache.head_dim / 8;
  require(row.position >= 0 && frame < lane.n_frames);
  for (int32_t i = threadIdx.x; i < 2 * eights; i += blockDim.x) {
    const int32_t kv = i >= eights, c = 8 * (i - kv * eights);
    T* to = reinterpret_cast<T*>(lane_address(cache, lane, layer, frame, head, kv, row.position % cache.page_size));
    store8(to + c, load8(key_of(cache, qkv, row_index, head, kv) + c));
  }
}

constexpr int kChunkThreads = 256;

// A thread takes eight values of K or V of one head of one token of the chunk.
template <class T>
__global__ void __launch_bounds__(kChunkThreads)
    append_chunk_kernel(const __grid_constant__ fkv_cache cache, const __grid_constant__ fkv_prefill_params params, int64_t n) {
  int64_t i = static_cast<int64_t>(blockIdx.x) * kChunkThreads + threadIdx.x;
  if (i >= n) return;
  const int32_t eights = cache.head_dim / 8, c = 8 * static_cast<int32_t>(i % eights);
  i /= eights;
  const int32_t head = static_cast<int32_t>(i % cache.n_kv_heads);
  i /= cache.n_kv_heads;
  const int32_t kv = static_cast<int32_t>(i % 2);
  const int64_t token = i / 2;
  const int32_t position = params.start + static_cast<int32_t>(token);
  T* to = reinterpret_cast<T*>(frame_address(params.frames, position / cache.page_size, params.layer, head, kv,
                                             position % cache.page_size));
  store8(to + c, load8(key_of(cache, params.qkv, token, head, kv) + c));
}

// ---- check ----

constexpr int kTokenThreads = 128;

// cos(a, b) by one warp: a lane's products over ascending channels, then the warp's tree. NaN where either is zero or not finite.
__device__ __forceinline__ float cosine(const float* a, const float* b, int32_t n) {
  float ab = 0.0f, aa = 0.0f, bb = 0.0f;
  for (int32_t i = threadIdx.x % kWarp; i < n; i += kWarp) {
    const float x = a[i], y = b[i];
    ab = fmaf(x, y, ab);
    aa = fmaf(x, x, aa);
    bb = fmaf(y, y, bb);
  }
  return warp_sum(ab) / (sqrtf(warp_sum(aa)) * sqrtf(warp_sum(bb)));
}

// The flag of one head of one row, by the whole block: a warp a query head, then their sum in head order. A row that always selects
// with its own q has nothing to correct: its flags are not counted. Source: FreeKV (fine-grained correction).
__device__ void check_head(const fkv_cache& cache, const fkv_row& row, const fkv_lane* lane, const float* qkv, int32_t layer,
                           int32_t row_index, int32_t head) {
  __shared__ float cosines[kMaxGroup];
  const bool checks = lane != nullptr && selects(*lane);
  bool flagged = checks && row.correction == FKV_CORRECT_EXACT;
  if (checks && row.correction == FKV_CORRECT_THRESHOLD) {
    const int32_t group = cache.n_q_heads / cache.n_kv_heads, d = cache.head_dim;
    const float* q = group_query(cache, qkv, row_index, head);
    const float* before = group_query_before(cache, *lane, layer, head);
    for (int32_t h = threadIdx.x / kWarp; h < group; h += kTokenThreads / kWarp) {
      const float value = cosine(q + h * d, before + h * d, d);
      if (threadIdx.x % kWarp == 0) cosines[h] = value;
    }
    __syncthreads();
    float sum = 0.0f;
    for (int32_t h = 0; h < group; ++h) sum += cosines[h];
    flagged = !(sum / static_cast<float>(group) >= lane->tau[layer]);
  }
  if (threadIdx.x != 0) return;
  flags_of(cache, layer, row_index)[head] = flagged;
  if (!checks || row.speculation == FKV_SPECULATE_NONE) return;
  atomicAdd(&cache.counters[row_index].heads, 1);
  atomicAdd(&cache.counters[row_index].flagged, flagged ? 1 : 0);
}

// One block a KV head and row.
template <class T, bool kAppend, bool kCheck>
__global__ void __launch_bounds__(kTokenThreads)
    token_kernel(const __grid_constant__ fkv_cache cache, const float* qkv, int32_t layer) {
  const int32_t head = blockIdx.x, row_index = blockIdx.y;
  const fkv_row& row = cache.rows[row_index];
  const fkv_lane* lane = lane_of(cache, row);
  if (kAppend && lane != nullptr) append_head<T>(cache, row, *lane, qkv, layer, row_index, head);
  if (kCheck) check_head(cache, row, lane, qkv, layer, row_index, head);
}

}  // namespace

int32_t issue_token(const char* call, const fkv_cache& cache, const float* qkv, int32_t layer, int32_t n_rows, bool append, bool check,
                    fkv_stream* stream) {
  if (n_rows == 0) return FKV_OK;
  return with_dtype(cache.dtype, [&](auto zero) {
    using T = decltype(zero);
    const dim3 grid(cache.n_kv_heads, n_rows);
    if (append && check) token_kernel<T, true, true><<<grid, kTokenThreads, 0, stream->handle>>>(cache, qkv, layer);
    if (append && !check) token_kernel<T, true, false><<<grid, kTokenThreads, 0, stream->handle>>>(cache, qkv, layer);
    if (!append && check) token_kernel<T, false, true><<<grid, kTokenThreads, 0, stream->handle>>>(cache, qkv, layer);
    return launched(stream, call);
  });
}

}  // namespace fkv

using namespace fkv;

int32_t fkv_control_load(const fkv_cache* cache, const fkv_row* ring, const uint32_t* step, int32_t ring_entries, int32_t n_rows,
                         fkv_stream* stream) {
  const char* call = "fkv_control_load";
  if (const int32_t status = require_tables(call, cache, 0, n_rows)) return status;
  FKV_REQUIRE(ring != nullptr && step != nullptr, FKV_BAD_ARGUMENT, "%s: ring or step is null", call);
  FKV_REQUIRE(ring_entries > 0, FKV_BAD_ARGUMENT, "%s: ring_entries is %d; it must be positive", call, ring_entries);
  if (const int32_t status = ready(stream, call)) return status;
  control_kernel<<<1, kControlThreads, 0, stream->handle>>>(*cache, ring, step, ring_entries, n_rows);
  return launched(stream, call);
}

int32_t fkv_append(const fkv_cache* cache, const float* qkv, int32_t layer, int32_t n_rows, fkv_stream* stream) {
  const char* call = "fkv_append";
  if (const int32_t status = check_step(call, cache, layer, n_rows)) return status;
  FKV_REQUIRE(qkv != nullptr, FKV_BAD_ARGUMENT, "%s: qkv is null", call);
  if (const int32_t status = require_aligned(call, "qkv", qkv)) return status;
  if (const int32_t status = ready(stream, call)) return status;
  return issue_token(call, *cache, qkv, layer, n_rows, true, false, stream);
}

int32_t fkv_check(const fkv_cache* cache, const float* qkv, int32_t layer, int32_t n_rows, fkv_stream* stream) {
  const char* call = "fkv_check";
  if (const int32_t status = require_tables(call, cache, layer, n_rows)) return status;
  FKV_REQUIRE(qkv != nullptr, FKV_BAD_ARGUMENT, "%s: qkv is null", call);
  if (const int32_t status = require_query_shape(call, *cache)) return status;
  if (const int32_t status = ready(stream, call)) return status;
  return issue_token(call, *cache, qkv, layer, n_rows, false, true, stream);
}

int32_t fkv_prefill_append(const fkv_cache* cache, const fkv_prefill_params* params, fkv_stream* stream) {
  const char* call = "fkv_prefill_append";
  if (const int32_t status = check_chunk(call, cache, params)) return status;
  if (const int32_t status = require_aligned(call, "params.qkv", params->qkv)) return status;
  if (const int32_t status = ready(stream, call)) return status;
  const int64_t n = int64_t{params->n} * cache->n_kv_heads * 2 * (cache->head_dim / 8);
  if (n == 0) return FKV_OK;
  return with_dtype(cache->dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto blocks = static_cast<unsigned>(divide_up(n, kChunkThreads));
    append_chunk_kernel<T><<<blocks, kChunkThreads, 0, stream->handle>>>(*cache, *params, n);
    return launched(stream, call);
  });
}
