// chain_ring.cuh: a ring of stages in shared memory that one warp fills with W, a copy each, and eight warps empty. The
// filling warp waits for a free stage and for what is on its way, never for a phase to end, so that memory stays busy while
// blocks meet.
#pragma once
#include "chain_work.cuh"
#include "hopper.cuh"

namespace fkv {

constexpr int kStageK = 512;                           // values of k in a stage
constexpr int kStageBytes = kTileOuts * kStageK * 2;
constexpr int kPanelK = 64, kPanelBytes = kTileOuts * kPanelK * 2;  // a stage is panels of 16 rows, swizzled: see hopper.cuh
constexpr int kMaxStages = 16;
// Stages on their way at a time. More of them queue at the L2, and what blocks tell each other at the end of a phase waits behind them:
// 28672 × 4096 by one row takes 55 us with 3, 57 with 4, 59 with as many as there are, and 59 with 2 (H200, 2026-11-29).
constexpr int kInFlight = 3;
constexpr int kStageChunks = kStageK / kChunk / kParts;  // of one warp
static_assert(kSlice % kStageK == 0 && kStageK % (kChunk * kParts) == 0 && kPanelK == 2 * kChunk);

// Which row of W lane 4g + t takes from a stage, and where values 8t .. 8t + 7 of the warp's first chunk of it lie; the lower row is
// eight rows on. Neighbouring g take rows that are four apart: swizzled, they meet in no bank.
__device__ __forceinline__ int stage_row() {
  const int g = threadIdx.x % kWarp / 4;
  return g / 2 + g % 2 * 4;
}
__device__ __forceinline__ int32_t stage_place() {
  const int warp = threadIdx.x / kWarp, row = stage_row(), piece = warp % 2 * 4 + threadIdx.x % 4;
  return warp / 2 * kPanelBytes + row * kPanelK * 2 + (piece ^ row) * 16;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

struct Ring {
  uint64_t* full;   // [n_stages] a stage has arrived
  uint64_t* empty;  // [n_stages] all warps have read it
  char* stages;
  int32_t n_stages;

  // By one thread, before anybody waits.
  __device__ __forceinline__ void begin() const {
    for (int i = 0; i < n_stages; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, kParts);
    }
    fence_barriers();
  }
};

// A place in the ring, which both sides pass in the same order.
class RingPlace {
 public:
  int32_t stage = 0;
  unsigned parity = 0;  // of the round
  __device__ __forceinline__ void advance(const Ring& ring) {
    if (++stage == ring.n_stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// What the filling warp does: W of every phase, unit after unit, k ascending. A copy for each row of a stage would take as long to issue
// as the stage takes to arrive from memory that reads 3 TB/s.
__device__ __forceinline__ void fill_ring(const Ring& ring, const Chain& chain) {
  const bool one = elect_one();
  uint64_t policy;  // W is read once
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  RingPlace place, arriving;
  int32_t dealt = 0, issued = 0;
  if (one) prefetch_map(chain.maps);
#pragma unroll 1
  for (int32_t p = 0; p < chain.n_phases; ++p) {
    const Phase& phase = chain.phases[p];
    const Run run = deal(phase.units(), !phase.split, dealt);
    if (one && p + 1 < chain.n_phases) prefetch_map(chain.maps + p + 1);
#pragma unroll 1
    for (int32_t u = run.begin; u < run.end; u += run.step) {
      const Unit unit = phase.unit(u);
#pragma unroll 1
      for (int32_t at = unit.first; at < unit.end; at += kStageK) {
        barrier_wait(ring.empty + place.stage, place.parity ^ 1);  // at once in the first round
        if (issued < min(kInFlight, ring.n_stages)) {
          ++issued;
        } else {
          barrier_wait(ring.full + arriving.stage, arriving.parity);
          arriving.advance(ring);
        }
        if (one) {
          barrier_expect(ring.full + place.stage, kStageBytes);
          copy_box(ring.stages + place.stage * kStageBytes, chain.maps + p, ring.full + place.stage,
                   {0, unit.tile * kTileOuts, at / kPanelK}, policy);
        }
        __syncwarp();
        place.advance(ring);
      }
    }
  }
}

#endif

}  // namespace fkv
