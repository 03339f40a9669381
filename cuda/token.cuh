// token.cuh: what a step does with its token in one layer, head by head: K and V into their pages, and the check: what the separate
// operations and the fused retrieval share.
#pragma once
#include "pages.cuh"

namespace fkv {

// K (kv 0) or V (kv 1) of KV head `head` in token `token`'s row of qkv.
__device__ __forceinline__ const float* kv_of(const fkv_cache& cache, const float* qkv, int64_t token, int32_t head, int32_t kv) {
  return qkv + token * qkv_width(cache) + static_cast<int64_t>(cache.n_q_heads + kv * cache.n_kv_heads + head) * cache.head_dim;
}

// K and V of one head of one row, by the whole block.
template <class T>
__device__ __forceinline__ void append_head(const fkv_cache& cache, const fkv_row& row, const fkv_lane& lane, const float* key,
                                            const float* value, int32_t layer, int32_t head) {
  const int32_t frame = lane_frame_of_window_page(lane, row.position / cache.page_size), eights = cache.head_dim / 8;
  require(row.position >= 0 && frame < lane.n_frames);
  for (int32_t i = threadIdx.x; i < 2 * eights; i += blockDim.x) {
    const int32_t kv = i >= eights, c = 8 * (i - kv * eights);
    T* to = reinterpret_cast<T*>(lane_address(cache, lane, layer, frame, head, kv, row.position % cache.page_size));
    store8(to + c, load8((kv == 0 ? key : value) + c));
  }
}

// One head's q of the token before, in a warp's registers while other things happen: lane + 32 i.
struct Before {
  float v[kMaxHeadDim / kWarp];
};
__device__ __forceinline__ Before take_before(const float* q, int32_t head_dim) {
  Before before;
#pragma unroll
  for (int i = 0; i < kMaxHeadDim / kWarp; ++i) {
    const int32_t c = static_cast<int32_t>(threadIdx.x) % kWarp + i * kWarp;
    before.v[i] = c < head_dim ? q[c] : 0.0f;
  }
  return before;
}

// cos(q, before) by one warp: a lane's products over ascending channels, then the warp's tree. NaN where either is zero or not finite.
__device__ __forceinline__ float cosine(const float* q, const Before& before, int32_t head_dim) {
  float ab = 0.0f, aa = 0.0f, bb = 0.0f;
#pragma unroll
  for (int i = 0; i < kMaxHeadDim / kWarp; ++i) {
    const int32_t c = static_cast<int32_t>(threadIdx.x) % kWarp + i * kWarp;
    if (c >= head_dim) break;
    const float x = q[c], y = before.v[i];
    ab = fmaf(x, y, ab);
    aa = fmaf(x, x, aa);
    bb = fmaf(y, y, bb);
  }
  return warp_sum(ab) * rsqrtf(warp_sum(aa)) * rsqrtf(warp_sum(bb));
}

// Whether a row's heads are compared with the token before at all.
__device__ __forceinline__ bool compares(const fkv_row& row, const fkv_lane* lane) {
  return lane != nullptr && selects(*lane) && row.correction == FKV_CORRECT_THRESHOLD;
}

// The flag of one head from its group's cosines (shared memory), their sum in head order; tau: the lane's of the layer.
__device__ __forceinline__ bool flag_of(const fkv_cache& cache, const fkv_row& row, const fkv_lane* lane, const float* cosines, float tau,
                                        int32_t layer, int32_t head) {
  if (lane == nullptr || !selects(*lane)) return false;
  if (row.correction != FKV_CORRECT_THRESHOLD) return row.correction == FKV_CORRECT_EXACT;
  if (cache.forced != nullptr && cache.forced->flagged > 0) return forced_flag(*cache.forced, row, layer, head);
  const int32_t group = cache.n_q_heads / cache.n_kv_heads;
  float sum = 0.0f;
  for (int32_t h = 0; h < group; ++h) sum += cosines[h];
  return !(sum / static_cast<float>(group) >= tau);
}

// Stores and counts it, by one thread. A row that always selects with its own q has nothing to correct: its flags are not counted.
__device__ __forceinline__ void store_flag(const fkv_cache& cache, const fkv_row& row, const fkv_lane* lane, bool flagged, int32_t layer,
                                           int32_t row_index, int32_t head) {
  flags_of(cache, layer, row_index)[head] = flagged;
  if (lane == nullptr || !selects(*lane) || row.speculation == FKV_SPECULATE_NONE) return;
  atomicAdd(&cache.counters[row_index].heads, 1);
  if (flagged) atomicAdd(&cache.counters[row_index].flagged, 1);
}

}  // namespace fkv
