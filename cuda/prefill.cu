// prefill.cu: causal attention of a chunk of a prompt to itself and to everything before it: the entry, and the kernel for K and
// V of four bytes, f32 throughout on the CUDA cores.
//
// Keys come in blocks of fixed absolute positions, ascending, with an online softmax between blocks. A score adds products over
// ascending channels, an output channel adds weight·V over ascending keys, and every query runs through the same code whatever
// its place in a tile: its bits do not depend on where chunks begin, on the layout or on its neighbours.
//
// floor: 2·d multiply-adds for each query head and key at or before it, at the FMA rate (a chunk of 2048 tokens at 32K, d 128, 32
// heads: 0.54 T multiply-adds → 16 ms a layer at 33 T/s on an H100).
#include "prefill.cuh"

namespace fkv {
namespace {

constexpr int32_t kBlockKeys = 64;  // part of the numerics
constexpr int kSlice = 64;          // channels of K or V that are in shared memory at a time
constexpr int kThreads = 256;
constexpr int kSide = 16;                // threads along keys or channels, and along queries
constexpr int kKeys = kBlockKeys / kSide;  // keys, and channels of a slice, of one thread
constexpr int kPitch = kSlice + 4;       // floats between rows in shared memory: reads of a column of rows spread over the banks

// A tile of kQueries·16 query rows (token, query head of the group) under one KV head. kSlices·64 channels hold d.
template <int kSlices>
struct Tile {
  static constexpr int kQueries = kSlices <= 2 ? 4 : 2;  // of one thread: kQueries·kSlices·4 sums stay in registers
  static constexpr int kRows = kQueries * kSide;
};

// Sixty-four rows of one slice of K or V on their way to shared memory: a thread moves eight channels at a time.
struct Fetched {
  static constexpr int kPieces = kBlockKeys * kSlice / 8 / kThreads;
  Eight pieces[kPieces];
};

// Rows of keys first .. first + 63 that lie before `length`, zeros past it: what follows a prompt's tokens is never read.
__device__ __forceinline__ void fetch(Fetched& fetched, const fkv_cache& cache, const fkv_prefill_params& params, int32_t head,
                                      int32_t kv, int32_t first, int32_t length, int32_t slice) {
#pragma unroll
  for (int i = 0; i < Fetched::kPieces; ++i) {
    const int32_t piece = threadIdx.x + i * kThreads, position = first + piece / (kSlice / 8);
    const int32_t c = slice * kSlice + piece % (kSlice / 8) * 8;
    fetched.pieces[i] = Eight{};
    if (position >= length || c >= cache.head_dim) continue;
    const int32_t page = position / cache.page_size;
    const char* row = frame_address(params.frames, page, params.layer, head, kv, position % cache.page_size);
    fetched.pieces[i] = load8(reinterpret_cast<const float*>(row) + c);
  }
}
__device__ __forceinline__ void put(float* rows, const Fetched& fetched) {
#pragma unroll
  for (int i = 0; i < Fetched::kPieces; ++i) {
    const int32_t piece = threadIdx.x + i * kThreads;
    store8(rows + piece / (kSlice / 8) * kPitch + piece % (kSlice / 8) * 8, fetched.pieces[i]);
  }
}

__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ __forceinline__ float fma4(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// scores[i][j] += q of the thread's query i · K of its key j (kSide apart) over one slice.
template <int kQueries>
__device__ __forceinline__ void score(float (&scores)[kQueries][kKeys], const float* q, int32_t q_pitch, const float* keys,
                                      int32_t channels) {
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
  for (int32_t c = 0; c < channels; c += 4) {
    float4 a[kQueries], b[kKeys];
#pragma unroll
    for (int i = 0; i < kQueries; ++i) a[i] = load4(q + (y * kQueries + i) * q_pitch + c);
#pragma unroll
    for (int j = 0; j < kKeys; ++j) b[j] = load4(keys + (x + j * kSide) * kPitch + c);
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
#pragma unroll
      for (int j = 0; j < kKeys; ++j) scores[i][j] = fma4(a[i], b[j], scores[i][j]);
    }
  }
}

// sums[i][j] += Σ weight of query i and key t · V[t][channel 4x + j] over the keys t < seen[i], ascending. kMasked: some query
// does not see all of them; what it does not see is left out rather than given no weight, because it may be NaN.
template <bool kMasked, int kQueries>
__device__ __forceinline__ void weigh(float (&sums)[kQueries][kKeys], const float* weights, const float* values,
                                      const int32_t (&seen)[kQueries]) {
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
  for (int t = 0; t < kBlockKeys; t += 4) {
    float4 w[kQueries];
#pragma unroll
    for (int i = 0; i < kQueries; ++i) w[i] = load4(weights + (y * kQueries + i) * kPitch + t);
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const float4 v = load4(values + (t + u) * kPitch + 4 * x);
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        const float weight = u == 0 ? w[i].x : u == 1 ? w[i].y : u == 2 ? w[i].z : w[i].w;
        if (kMasked && t + u >= seen[i]) continue;
        sums[i][0] = fmaf(weight, v.x, sums[i][0]);
        sums[i][1] = fmaf(weight, v.y, sums[i][1]);
        sums[i][2] = fmaf(weight, v.z, sums[i][2]);
        sums[i][3] = fmaf(weight, v.w, sums[i][3]);
      }
    }
  }
}

// A block a KV head and tile of queries; tiles with the most keys go first.
template <int kSlices>
__global__ void __launch_bounds__(kThreads, 2)
    f32_kernel(const __grid_constant__ fkv_cache cache, const __grid_constant__ fkv_prefill_params params, int32_t tiles) {
  constexpr int kQueries = Tile<kSlices>::kQueries, kRows = Tile<kSlices>::kRows;
  extern __shared__ __align__(16) float memory[];  // q [kRows][d + 4], rows of K or V [64][kPitch], weights [kRows][kPitch]
  const int32_t d = cache.head_dim, group = cache.n_q_heads / cache.n_kv_heads, q_pitch = d + 4;
  const int32_t head = static_cast<int32_t>(blockIdx.x) % cache.n_kv_heads;
  const int32_t tile = tiles - 1 - static_cast<int32_t>(blockIdx.x) / cache.n_kv_heads;
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
  float* const q = memory;
  float* const rows = q + kRows * q_pitch;
  float* const weights = rows + kBlockKeys * kPitch;

  // Query rows past the chunk's last are computed like the last and not written.
  const int64_t first_query = static_cast<int64_t>(tile) * kRows, last_query = static_cast<int64_t>(params.n) * group - 1;
  const auto query_at = [&](int i) { return min(first_query + i, last_query); };
  for (int i = threadIdx.x / kWarp; i < kRows; i += kThreads / kWarp) {
    const int64_t query = query_at(i);
    const float* from = params.qkv + query / group * qkv_width(cache) + (head * static_cast<int64_t>(group) + query % group) * d;
    for (int32_t c = threadIdx.x % kWarp; c < d; c += kWarp) q[i * q_pitch + c] = from[c] * cache.attention_scale;
  }
  const int32_t first_position = params.start + static_cast<int32_t>(query_at(0) / group);
  const int32_t length = params.start + static_cast<int32_t>(query_at(kRows - 1) / group) + 1;

  float sums[kSlices][kQueries][kKeys] = {}, maximum[kQueries], total[kQueries] = {};
  int32_t position[kQueries];
#pragma unroll
  for (int i = 0; i < kQueries; ++i) {
    maximum[i] = -INFINITY;
    position[i] = params.start + static_cast<int32_t>(query_at(y * kQueries + i) / group);
  }
  Fetched fetched;
  fetch(fetched, cache, params, head, 0, 0, length, 0);
  for (int32_t first = 0; first < length; first += kBlockKeys) {
    float scores[kQueries][kKeys] = {};
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      put(rows, fetched);
      __syncthreads();
      // While these rows are used the next are on their way.
      fetch(fetched, cache, params, head, slice + 1 < kSlices ? 0 : 1, first, length, slice + 1 < kSlices ? slice + 1 : 0);
      score(scores, q + slice * kSlice, q_pitch, rows, min(kSlice, d - slice * kSlice));
      __syncthreads();
    }
    int32_t seen[kQueries];
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      seen[i] = position[i] + 1 - first;  // of this block's keys
      float best = -INFINITY, sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        if (x + j * kSide >= seen[i]) scores[i][j] = -INFINITY;
        best = fmaxf(best, scores[i][j]);
      }
      best = fmaxf(maximum[i], warp_max<kSide>(best));
      const float fade = expf(maximum[i] - best);
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const float weight = expf(scores[i][j] - best);
        weights[(y * kQueries + i) * kPitch + x + j * kSide] = weight;
        sum += weight;
      }
      maximum[i] = best;
      total[i] = fmaf(total[i], fade, warp_sum<kSide>(sum));
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
        for (int j = 0; j < kKeys; ++j) sums[slice][i][j] *= fade;
      }
    }
    const bool masked = first_position + 1 - first < kBlockKeys;
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      put(rows, fetched);
      __syncthreads();
      if (slice + 1 < kSlices) fetch(fetched, cache, params, head, 1, first, length, slice + 1);
      else fetch(fetched, cache, params, head, 0, first + kBlockKeys, length, 0);
      if (masked) weigh<true>(sums[slice], weights, rows, seen);
      else weigh<false>(sums[slice], weights, rows, seen);
      __syncthreads();
    }
  }
#pragma unroll
  for (int i = 0; i < kQueries; ++i) {
    const int64_t query = first_query + y * kQueries + i;
    if (query > last_query) continue;
    float* to = params.out + (query / group * cache.n_q_heads + head * static_cast<int64_t>(group) + query % group) * d;
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const int32_t c = slice * kSlice + 4 * x + j;
        if (c < d) to[c] = sums[slice][i][j] / total[i];
      }
    }
  }
}

template <int kSlices>
int32_t issue(const char* call, const fkv_cache& cache, const fkv_prefill_params& params, fkv_stream* stream) {
  constexpr int kRows = Tile<kSlices>::kRows;
  const int64_t tiles = divide_up(int64_t{params.n} * group_of(cache), kRows);
  const size_t shared = (static_cast<size_t>(kRows) * (cache.head_dim + 4) + (kBlockKeys + kRows) * kPitch) * sizeof(float);
  if (const int32_t status = allow_shared(stream, call, f32_kernel<kSlices>, shared)) return status;
  const auto blocks = static_cast<unsigned>(tiles * cache.n_kv_heads);
  f32_kernel<kSlices><<<blocks, kThreads, shared, stream->handle>>>(cache, params, static_cast<int32_t>(tiles));
  return launched(stream, call);
}

int32_t attend_f32(const char* call, const fkv_cache& cache, const fkv_prefill_params& params, fkv_stream* stream) {
  if (cache.head_dim <= kSlice) return issue<1>(call, cache, params, stream);
  if (cache.head_dim <= 2 * kSlice) return issue<2>(call, cache, params, stream);
  return issue<4>(call, cache, params, stream);
}

}  // namespace
}  // namespace fkv

using namespace fkv;

int32_t fkv_prefill_attend(const fkv_cache* cache, const fkv_prefill_params* params, fkv_stream* stream) {
  const char* call = "fkv_prefill_attend";
  if (const int32_t status = check_chunk(call, cache, params)) return status;
  FKV_REQUIRE(params->out != nullptr, FKV_BAD_ARGUMENT, "%s: params.out is null", call);
  if (const int32_t status = require_query_shape(call, *cache)) return status;
  if (const int32_t status = require_aligned(call, "params.qkv", params->qkv)) return status;
  if (const int32_t status = require_aligned(call, "params.out", params->out)) return status;
  // Queries, and tiles of them under all heads, are counted in 32 bits.
  FKV_REQUIRE(int64_t{params->n} * cache->n_q_heads <= INT32_MAX, FKV_BAD_SHAPE, "%s: %d tokens of %d query heads in one chunk",
              call, params->n, cache->n_q_heads);
  if (const int32_t status = ready(stream, call)) return status;
  if (params->n == 0) return FKV_OK;
  if (cache->dtype == FKV_F32) return attend_f32(call, *cache, *params, stream);
  const int parts = params->family == FKV_FAST ? 1 : 2;
  if (has_warpgroups(stream, *params)) return attend_warpgroups(call, *cache, *params, parts, stream);
  return attend_mma(call, *cache, *params, parts, stream);
}
