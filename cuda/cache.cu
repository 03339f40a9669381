// cache.cu: what a step does with its token: the control that tells what each row is, K and V into their pages, the check.
//
// floors: each moves less than a launch costs: control 64 B a row from pinned memory, one round trip of the bus (about 1.5 us);
// append 2·Hkv·d values a token, written once; check 2·Hq·d floats a row at HBM read speed (32 KiB → 0.01 us on an H100).
#include "stages.cuh"
#include "token.cuh"

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

// ---- K and V of a chunk ----

constexpr int kChunkThreads = 256;

// Block (token, part of its K and V): a thread takes eight values, of which a token has all heads' K and then their V.
template <class T>
__global__ void __launch_bounds__(kChunkThreads)
    append_chunk_kernel(const __grid_constant__ fkv_cache cache, const __grid_constant__ fkv_prefill_params params) {
  const int32_t eights = cache.head_dim / 8, i = static_cast<int32_t>(blockIdx.y * kChunkThreads + threadIdx.x), row = i / eights;
  if (row >= 2 * cache.n_kv_heads) return;
  const int32_t kv = row >= cache.n_kv_heads, head = row - kv * cache.n_kv_heads, c = 8 * (i - row * eights);
  const int32_t position = params.start + static_cast<int32_t>(blockIdx.x);
  T* to = reinterpret_cast<T*>(frame_address(params.frames, position / cache.page_size, params.layer, head, kv,
                                             position % cache.page_size));
  store8(to + c, load8(kv_of(cache, params.qkv, blockIdx.x, head, kv) + c));
}

// ---- a step's token ----

constexpr int kTokenThreads = 128;

// One block a KV head and row; of the check a warp a query head.
template <class T, bool kAppend, bool kCheck>
__global__ void __launch_bounds__(kTokenThreads)
    token_kernel(const __grid_constant__ fkv_cache cache, const float* qkv, int32_t layer) {
  __shared__ float cosines[kMaxGroup];
  const int32_t head = blockIdx.x, row_index = blockIdx.y, group = cache.n_q_heads / cache.n_kv_heads, d = cache.head_dim;
  const fkv_row& row = cache.rows[row_index];
  const fkv_lane* lane = lane_of(cache, row);
  if (kAppend && lane != nullptr) {
    append_head<T>(cache, row, *lane, kv_of(cache, qkv, row_index, head, 0), kv_of(cache, qkv, row_index, head, 1), layer, head);
  }
  if constexpr (kCheck) {
    for (int32_t h = threadIdx.x / kWarp; h < group && compares(row, lane); h += kTokenThreads / kWarp) {
      const Before before = take_before(group_query_before(cache, *lane, layer, head) + h * d, d);
      const float value = cosine(group_query(cache, qkv, row_index, head) + h * d, before, d);
      if (threadIdx.x % kWarp == 0) cosines[h] = value;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    const float tau = compares(row, lane) ? lane->tau[layer] : 0.0f;
    store_flag(cache, row, lane, flag_of(cache, row, lane, cosines, tau, layer, head), layer, row_index, head);
  }
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
  if (params->n == 0) return FKV_OK;
  const int64_t eights = int64_t{2} * cache->n_kv_heads * (cache->head_dim / 8);
  const dim3 blocks(static_cast<unsigned>(params->n), static_cast<unsigned>(divide_up(eights, kChunkThreads)));
  return with_dtype(cache->dtype, [&](auto zero) {
    using T = decltype(zero);
    append_chunk_kernel<T><<<blocks, kChunkThreads, 0, stream->handle>>>(*cache, *params);
    return launched(stream, call);
  });
}
