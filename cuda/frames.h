// frames.h: where a page's rows lie, and which pages a step of a lane has. The address rules of fkv_frames and
// fkv_lane, in one place, for the twin and for kernels.
#pragma once
#include <cstdint>

#include "freekv.h"

// Inlined into every caller, on the host and in kernels.
#ifdef __CUDACC__
#define FKV_INLINE __host__ __device__ __forceinline__
#else
#define FKV_INLINE inline __attribute__((always_inline))
#endif

namespace fkv {

FKV_INLINE int64_t dtype_bytes(int32_t dtype) { return dtype == FKV_F32 ? 4 : 2; }

// First byte of page `page` (a frame index, or a block id of the host pool). Read `chunks` only while work runs.
FKV_INLINE char* frame_origin(const fkv_frames& frames, int64_t page) {
  if (frames.chunks == nullptr) return reinterpret_cast<char*>(frames.base) + page * frames.frame;
  const int64_t chunk = page >> frames.shift, rest = page & ((int64_t{1} << frames.shift) - 1);
  return reinterpret_cast<char*>(frames.chunks[chunk]) + rest * frames.frame;
}

// First byte of token row `row` of K (kv 0) or V (kv 1) of one head and layer; for digests kv is 0 = min, 1 = max, and
// row 0.
FKV_INLINE char* frame_address(const fkv_frames& frames, int64_t page, int32_t layer, int32_t head, int32_t kv,
                               int32_t row) {
  return frame_origin(frames, page) + layer * frames.layer + head * frames.head + kv * frames.kv + row * frames.row;
}

// The same in frame `frame` of a lane.
FKV_INLINE char* lane_address(const fkv_cache& cache, const fkv_lane& lane, int32_t layer, int32_t frame, int32_t head,
                              int32_t kv, int32_t row) {
  const int64_t index = static_cast<int64_t>(layer) * lane.n_frames + frame;
  return reinterpret_cast<char*>(lane.frames) + index * cache.frame_bytes + head * cache.device.head +
         kv * cache.device.kv + row * cache.device.row;
}

// Frame of a sink or window page (of any page where the lane is resident).
FKV_INLINE int32_t lane_frame_of_window_page(const fkv_lane& lane, int32_t page) {
  if (lane.resident || page < lane.sink_pages) return page;
  return lane.sink_pages + page % (lane.window_pages + 1);
}

// Frame of a slot; lanes that are not resident only.
FKV_INLINE int32_t lane_frame_of_slot(const fkv_lane& lane, int32_t slot) {
  return lane.sink_pages + lane.window_pages + 1 + slot;
}

// First window page of a step at length `len` (the token of the step counted).
FKV_INLINE int32_t window_begin(const fkv_lane& lane, int32_t len, int32_t page_size) {
  const int32_t page = len / page_size - lane.window_pages;
  return page > lane.sink_pages ? page : lane.sink_pages;
}

// One past the last candidate page; the candidates are sink_pages .. candidate_end − 1, none where that is empty.
FKV_INLINE int32_t candidate_end(const fkv_lane& lane, int32_t len, int32_t page_size) {
  return window_begin(lane, len, page_size);
}

// Index of [layer][head] in a lane's per-head tables; times k or n_slots it is the start of that head's entries.
FKV_INLINE int64_t lane_head(const fkv_cache& cache, int32_t layer, int32_t head) {
  return static_cast<int64_t>(layer) * cache.n_kv_heads + head;
}

}  // namespace fkv
