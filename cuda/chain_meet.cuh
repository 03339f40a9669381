// chain_meet.cuh: how the blocks of a chain meet at the end of a phase, and what is left to do after a split one.
#pragma once
#include "chain_work.cuh"

namespace fkv {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// The multiplying warps of a block.
__device__ __forceinline__ void sync_parts() { asm volatile("bar.sync 1, %0;" ::"n"(kPartsThreads) : "memory"); }

// All blocks have come here, and what they wrote before can be seen.
__device__ __forceinline__ void meet(unsigned* done) {
  sync_parts();
  if (threadIdx.x == 0) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(done) : "memory");
    unsigned arrived;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(done) : "memory");
    } while (arrived < gridDim.x);
  }
  sync_parts();
}

// The last block to leave zeroes the counters for the next launch.
__device__ __forceinline__ void leave(unsigned* done, int meetings) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(done + 2 * kMaxPhases) : "memory");
  if (before + 1 < gridDim.x) return;
  for (int i = 0; i < meetings; ++i) done[i] = 0;
  done[2 * kMaxPhases] = 0;
}

constexpr int kAtOnce = 4;  // outputs of a thread whose sums are fetched together

// The block's share of the outputs of a split phase, once all slices are there.
template <class T>
__device__ __forceinline__ void finish_phase(const Chain& chain, const Phase& phase, char* memory) {
  const int32_t n_rows = chain.n_rows, slices = slices_of(phase.k), tile_sums = n_rows * kTileOuts;
  float* factors = reinterpret_cast<float*>(memory + chain.shared.squares_at);
  if (threadIdx.x < n_rows) {
    float all = 0.0f;
    if (phase.norm != nullptr)
      for (int32_t s = 0; s < slices; ++s) all += __ldcg(chain.squares + s * n_rows + threadIdx.x);
    factors[threadIdx.x] = phase.norm == nullptr ? 1.0f : norm_factor(all, phase.k, phase.eps);
  }
  sync_parts();
  int32_t dealt = 0;
  const Run run = deal(phase.tiles(), false, dealt);
  const int64_t slice_sums = static_cast<int64_t>(phase.tiles()) * tile_sums;
  const int32_t sums = (run.end - run.begin) * tile_sums;
#pragma unroll 1
  for (int32_t first = 0; first < sums; first += kAtOnce * kPartsThreads) {
    float totals[kAtOnce] = {};
    const float* from[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      from[j] = chain.partials + static_cast<int64_t>(run.begin) * tile_sums +
                min(first + j * kPartsThreads + static_cast<int32_t>(threadIdx.x), sums - 1);
#pragma unroll 4
    for (int32_t s = 0; s < slices; ++s)
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) totals[j] += __ldcg(from[j] + s * slice_sums);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int32_t i = first + j * kPartsThreads + static_cast<int32_t>(threadIdx.x);
      const int32_t tile = run.begin + i / tile_sums, row = i % tile_sums / kTileOuts;
      const Ending<T> ending(phase.to, i < sums ? row : n_rows, tile * kTileOuts + i % kTileOuts);
      ending.end(phase.to, totals[j], factors[row]);
    }
  }
}

#endif

}  // namespace fkv
