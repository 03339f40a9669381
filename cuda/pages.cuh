// pages.cuh: how kernels of the cache touch rows of pages: eight values as one access, a head page as one copy.
#pragma once
#include "common.cuh"

namespace fkv {

// Most query heads of one KV head, and values of one head, that the kernels which hold queries in registers are compiled for.
constexpr int32_t kMaxGroup = 16;
constexpr int32_t kMaxHeadDim = 256;

inline int32_t group_of(const fkv_cache& cache) { return cache.n_q_heads / cache.n_kv_heads; }

inline int32_t require_query_shape(const char* call, const fkv_cache& cache) {
  FKV_REQUIRE(group_of(cache) <= kMaxGroup && cache.head_dim <= kMaxHeadDim, FKV_UNSUPPORTED,
              "%s: %d query heads a KV head of %d values each; CUDA kernels take up to %d of %d", call, group_of(cache),
              cache.head_dim, kMaxGroup, kMaxHeadDim);
  return FKV_OK;
}

// Rows of qkv are read sixteen bytes at a time.
inline int32_t require_aligned(const char* call, const char* name, const void* memory) {
  FKV_REQUIRE(reinterpret_cast<uintptr_t>(memory) % 16 == 0, FKV_BAD_ARGUMENT, "%s: %s is not aligned to 16 bytes", call,
              name);
  return FKV_OK;
}

// Ends the kernel, and with it the device, where device memory holds what no call could check: going on would touch memory that
// belongs to others.
__device__ __forceinline__ void require(bool condition) {
  if (!condition) __trap();
}

// K and V of one page of one head: its first byte, and the bytes from K to V and between token rows.
struct HeadPage {
  char* start;
  int64_t kv, row;
};
__device__ __forceinline__ HeadPage page_in(const fkv_frames& frames, int64_t page, int32_t layer, int32_t head) {
  return {frame_address(frames, page, layer, head, 0, 0), frames.kv, frames.row};
}
__device__ __forceinline__ HeadPage page_in(const fkv_cache& cache, const fkv_lane& lane, int32_t layer, int32_t frame,
                                            int32_t head) {
  return {lane_address(cache, lane, layer, frame, head, 0, 0), cache.device.kv, cache.device.row};
}

// Token rows 0..rows−1 of K and V, by all threads of the block; each has four 16-byte loads in flight.
__device__ __forceinline__ void copy_head_page(const HeadPage& to, const HeadPage& from, int32_t rows, int32_t row_bytes) {
  constexpr int kLoads = 4;
  const uint32_t width = row_bytes / 16, half = rows * width, n = 2 * half, step = blockDim.x;
  const auto place = [width, half](const HeadPage& page, uint32_t piece) {
    const uint32_t kv = piece >= half, rest = piece - kv * half, row = rest / width;
    return reinterpret_cast<uint4*>(page.start + kv * page.kv + row * page.row) + (rest - row * width);
  };
  for (uint32_t first = threadIdx.x; first < n; first += kLoads * step) {
    uint4 data[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (first + i * step < n) data[i] = *place(from, first + i * step);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (first + i * step < n) *place(to, first + i * step) = data[i];
    }
  }
}

}  // namespace fkv
