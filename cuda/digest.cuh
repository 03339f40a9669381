// digest.cuh: a page's digest, and what becomes of a page that a step has completed: what fkv_page_finish, whole lists of pages and the
// fused retrieval share.
// Source of the digests: Quest (channel-wise minimum and maximum of K); ArkVale (centre ± mean absolute deviation).
#pragma once
#include "checks_pages.h"
#include "pages.cuh"

namespace fkv {

struct Channel {
  float low, high;
};

// A NaN among a channel's keys makes both NaN: the page's score is NaN then, and ranks last.
template <class T>
__device__ __forceinline__ Channel min_max(const char* keys, int64_t stride, int32_t rows) {
  float low = to_f32(*reinterpret_cast<const T*>(keys)), high = low;
  for (int32_t r = 1; r < rows; ++r) {
    const float k = to_f32(*reinterpret_cast<const T*>(keys + r * stride));
    low = k < low || k != k ? k : low;
    high = k > high || k != k ? k : high;
  }
  return {low, high};
}

// Mean −/+ mean absolute deviation; both sums over ascending rows.
template <class T>
__device__ __forceinline__ Channel mean_deviation(const char* keys, int64_t stride, int32_t rows) {
  const float share = 1.0f / static_cast<float>(rows);  // exact: pages hold a power of two of rows
  float sum = 0.0f, deviation = 0.0f;
  for (int32_t r = 0; r < rows; ++r) sum += to_f32(*reinterpret_cast<const T*>(keys + r * stride));
  const float mean = sum * share;
  for (int32_t r = 0; r < rows; ++r) deviation += fabsf(to_f32(*reinterpret_cast<const T*>(keys + r * stride)) - mean);
  deviation *= share;
  return {mean - deviation, mean + deviation};
}

// One head's digest by the whole block: low and high [d] of `block` from a page's K rows; a thread a channel.
template <class T>
__device__ __forceinline__ void digest_page(const fkv_cache& cache, int32_t kind, const HeadPage& page, int64_t block, int32_t layer,
                                            int32_t head) {
  T* low = reinterpret_cast<T*>(frame_address(cache.digests, block, layer, head, 0, 0));
  T* high = reinterpret_cast<T*>(frame_address(cache.digests, block, layer, head, 1, 0));
  for (int32_t c = threadIdx.x; c < cache.head_dim; c += blockDim.x) {
    const char* keys = page.start + c * static_cast<int64_t>(sizeof(T));
    const Channel channel =
        kind == kQuest ? min_max<T>(keys, page.row, cache.page_size) : mean_deviation<T>(keys, page.row, cache.page_size);
    low[c] = from_f32<T>(channel.low);
    high[c] = from_f32<T>(channel.high);
  }
}

// Whether this step's token is the last of its page, and the page has a place on the host.
__device__ __forceinline__ bool completes_page(const fkv_cache& cache, const fkv_row& row) {
  return row.sequence >= 0 && row.block >= 0 && (row.position + 1) % cache.page_size == 0;
}

// The completed page of one head: its digest, and its copy in the host's block, by the whole block of threads.
template <class T>
__device__ __forceinline__ void finish_head(const fkv_cache& cache, const fkv_row& row, const fkv_lane& lane, int32_t kind, int32_t layer,
                                            int32_t head) {
  const int32_t frame = lane_frame_of_window_page(lane, row.position / cache.page_size);
  require(frame < lane.n_frames);
  const HeadPage page = page_in(cache, lane, layer, frame, head);
  digest_page<T>(cache, kind, page, row.block, layer, head);
  copy_head_page(page_in(cache.host, row.block, layer, head), page, cache.page_size,
                 cache.head_dim * static_cast<int32_t>(sizeof(T)));
}

}  // namespace fkv
