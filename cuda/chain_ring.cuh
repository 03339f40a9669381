// chain_ring.cuh: a ring of stages in shared memory that one warp fills with bulk copies of W and eight warps empty. The
// filling warp waits for free stages only, never for a phase to end, so that memory stays busy while blocks meet.
#pragma once
#include "chain_work.cuh"
#include "hopper.cuh"

namespace fkv {

constexpr int kStageK = 512;                           // values of k in a stage
constexpr int kStagePitch = kStageK * 2 + 64;          // bytes of a row of W: neighbours 64 bytes apart in the banks
constexpr int kStageBytes = kTileOuts * kStagePitch;
constexpr int kMaxStages = 16;
constexpr int kStageChunks = kStageK / kChunk / kParts;  // of one warp
static_assert(kSlice % kStageK == 0 && kStageK % (kChunk * kParts) == 0);

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

// What the filling warp does: W of every phase, unit after unit, k ascending.
__device__ __forceinline__ void fill_ring(const Ring& ring, const Chain& chain) {
  const int lane = threadIdx.x % kWarp;
  uint64_t policy;  // W is read once
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  RingPlace place;
  int32_t dealt = 0;
#pragma unroll 1
  for (int32_t p = 0; p < chain.n_phases; ++p) {
    const Phase& phase = chain.phases[p];
    const Run run = deal(phase.units(), !phase.split, dealt);
#pragma unroll 1
    for (int32_t u = run.begin; u < run.end; u += run.step) {
      const Unit unit = phase.unit(u);
      const int32_t rows = min(kTileOuts, phase.to.n_out - unit.tile * kTileOuts);
      const char* from = phase.weight + (static_cast<int64_t>(unit.tile * kTileOuts + lane) * phase.k + unit.first) * 2;
#pragma unroll 1
      for (int32_t at = unit.first; at < unit.end; at += kStageK, from += kStageK * 2) {
        barrier_wait(ring.empty + place.stage, place.parity ^ 1);  // at once in the first round
        const unsigned bytes = min(kStageK, unit.end - at) * 2;
        const uint32_t full = shared_address(ring.full + place.stage);
        if (lane == 0) barrier_expect(full, bytes * rows);
        __syncwarp();
        if (lane < rows)
          asm volatile(
              "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                  shared_address(ring.stages + place.stage * kStageBytes + lane * kStagePitch)),
              "l"(from), "r"(bytes), "r"(full), "l"(policy)
              : "memory");
        place.advance(ring);
      }
    }
  }
}

#endif

}  // namespace fkv
