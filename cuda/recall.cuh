// recall.cuh: one miss, from and to where.
#pragma once
#include "pages.cuh"

namespace fkv {

struct Route {
  HeadPage to, from;
};

__device__ __forceinline__ Route route_of(const fkv_cache& cache, const fkv_lane& lane, const fkv_miss& miss, int32_t layer, int32_t head) {
  require(miss.slot >= 0 && miss.slot < lane.n_slots && miss.frame < lane.n_frames && (miss.frame >= 0 || miss.block >= 0));
  return {page_in(cache, lane, layer, lane_frame_of_slot(lane, miss.slot), head),
          miss.frame >= 0 ? page_in(cache, lane, layer, miss.frame, head) : page_in(cache.host, miss.block, layer, head)};
}

// A head page in pieces of sixteen bytes, K's rows and then V's.
struct Pieces {
  uint32_t width, half, all;  // of a row, of K, of both

  __device__ Pieces(const fkv_cache& cache)
      : width(cache.head_dim * static_cast<uint32_t>(dtype_bytes(cache.dtype)) / 16), half(cache.page_size * width), all(2 * half) {}
  __device__ __forceinline__ uint4* place(const HeadPage& page, uint32_t piece) const {
    const uint32_t kv = piece >= half, rest = piece - kv * half, row = rest / width;
    return reinterpret_cast<uint4*>(page.start + kv * page.kv + row * page.row) + (rest - row * width);
  }
};

constexpr int kPieceLoads = 4;  // in flight a thread

}  // namespace fkv
