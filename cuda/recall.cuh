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

// Division by a number that is nearly always a power of two, which the compiler cannot know.
struct Divisor {
  uint32_t value, shift;  // shift: 32 where it is none

  __device__ explicit Divisor(uint32_t by) : value(by), shift(32) {
    if ((by & (by - 1)) == 0) shift = __popc(by - 1);
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t x) const { return shift < 32 ? x >> shift : x / value; }
};

// Sixteen bytes of a head page.
struct Spot {
  uint32_t kv, row, column;

  __device__ __forceinline__ uint4* in(const HeadPage& page) const {
    return reinterpret_cast<uint4*>(page.start + kv * page.kv + row * page.row) + column;
  }
};

// A head page in pieces of sixteen bytes, K's rows and then V's.
struct Pieces {
  Divisor width;      // of a row
  uint32_t half, all;  // of K, of both

  __device__ explicit Pieces(const fkv_cache& cache)
      : width(cache.head_dim * static_cast<uint32_t>(dtype_bytes(cache.dtype)) / 16), half(cache.page_size * width.value), all(2 * half) {}
  __device__ __forceinline__ Spot spot(uint32_t piece) const {
    const uint32_t kv = piece >= half, rest = piece - kv * half, row = width.quotient(rest);
    return {kv, row, rest - row * width.value};
  }
};

constexpr int kPieceLoads = 4;  // in flight a thread

}  // namespace fkv
