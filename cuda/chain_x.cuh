// chain_x.cuh: how a block of a chain gets x. Each multiplying warp brings the chunks of k that it multiplies into the shared memory of
// the block, times norm and in the parts that the tensor cores take.
#pragma once
#include "chain_ring.cuh"

namespace fkv {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

template <class T>
struct alignas(8) Quad {
  T v[4];
};

// This warp's chunks of x from `first` to `end` of k, times norm, and the squares of its parts. All copies are under way before any is
// waited for; then a lane works on what it copied, in place: eight lanes share a chunk.
template <class T>
__device__ __forceinline__ void load_x(char* out, int32_t pitch, T* norm, float* squares, const Phase& phase, int32_t n_rows,
                                       int32_t first, int32_t end) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int32_t length = end - first;  // whole chunks
  const float* x = phase.x + first;
  if (phase.norm != nullptr) {
#pragma unroll 2
    for (int32_t slice = 0; slice < length; slice += kSlice)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t at = slice + square_place(warp, half);
        if (at < length) copy_async<8>(norm + at, static_cast<const T*>(phase.norm) + first + at, true);
      }
  }
  for (int32_t row = 0; row < n_rows; ++row, x += phase.x_stride) {
#pragma unroll 2
    for (int32_t slice = 0; slice < length; slice += kSlice)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t at = slice + square_place(warp, half);
        if (at < length) copy_async<16>(out + row * pitch + at * 4, x + at, true);
      }
  }
  await_copies();
  if (phase.norm == nullptr && Column<T>::kOfRow == 1) return __syncwarp();
  for (int32_t slice = 0; slice < length; slice += kSlice) {
    float by[2][4] = {{1.0f, 1.0f, 1.0f, 1.0f}, {1.0f, 1.0f, 1.0f, 1.0f}};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t at = slice + square_place(warp, half);
      if (phase.norm == nullptr || at >= length) continue;
      const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(norm + at);
#pragma unroll
      for (int i = 0; i < 4; ++i) by[half][i] = to_f32(quad.v[i]);
    }
#pragma unroll 4
    for (int32_t row = 0; row < n_rows; ++row) {
      char* const places = out + row * pitch;
      float4 v[2] = {};
      float sum = 0.0f;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t at = slice + square_place(warp, half);
        if (at < length) v[half] = *reinterpret_cast<const float4*>(places + at * 4);
        sum = add_squares(sum, v[half]);
      }
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t at = slice + square_place(warp, half);
        const float4& u = v[half];
        const float scaled[4] = {u.x * by[half][0], u.y * by[half][1], u.z * by[half][2], u.w * by[half][3]};
        if (at < length) Column<T>::store(places + at / kChunk * kChunkBytes, at % kChunk, scaled);
      }
      if (phase.norm == nullptr) continue;
      sum = warp_sum(sum);
      if (lane == 0) squares[(slice / kSlice * kParts + warp) * n_rows + row] = sum;
    }
  }
  __syncwarp();
}

// Asks L2 for what a phase needs beside W and x, while it waits for the phase before.
template <class T>
__device__ __forceinline__ void prefetch_norm(const Phase& phase) {
  constexpr int kLine = 128 / sizeof(T);
  if (phase.norm == nullptr) return;
  for (int64_t at = int64_t{threadIdx.x} * kLine; at < phase.k; at += kPartsThreads * kLine)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const T*>(phase.norm) + at));
}

#endif

}  // namespace fkv
