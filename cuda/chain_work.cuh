// chain_work.cuh: what a chain consists of, and which block does what.
#pragma once
#include <cuda.h>

#include "dense.cuh"

namespace fkv {

constexpr int kMaxPhases = 16;  // of one launch
constexpr int kMaxChainRows = 16;

// 16 rows of W (a tile), along all of k or one slice of it.
struct Unit {
  int32_t tile, first, end;
};

struct Phase {
  const char* weight;
  const void* norm;
  const float* x;
  int64_t x_stride;
  Output to;
  int32_t k;
  float eps;
  // Whole: x of all rows lies in shared memory, a block takes tiles along all of k and finishes them itself. Split: x would
  // not fit; a block takes tiles along a slice, leaves sums in global memory, and blocks meet once more to add them up.
  int32_t split;

  __device__ __forceinline__ int32_t tiles() const { return tiles_of(to.n_out); }
  __device__ __forceinline__ int32_t units() const { return split ? tiles() * slices_of(k) : tiles(); }
  __device__ __forceinline__ Unit unit(int32_t u) const {
    if (!split) return {u, 0, k};
    const int32_t slice = u / tiles();
    return {u - slice * tiles(), slice * kSlice, min(k, (slice + 1) * kSlice)};
  }
};

// Offsets in shared memory, of which x lies at the start.
struct SharedLayout {
  int32_t norm_at, squares_at, parts_at, barriers_at, ring_at;
  int32_t n_stages;
};

struct Chain {
  CUtensorMap maps[kMaxPhases];  // W of each phase: [k / 64][n_out][64]
  Phase phases[kMaxPhases];
  unsigned* done;   // [2 · kMaxPhases + 1] how many blocks have come to a meeting, then how many have left; zero between launches
  float* partials;  // [slice][tile][row][16] of a split phase
  float* squares;   // [slice][row] of a split phase with a norm
  int32_t n_phases, n_rows;
  SharedLayout shared;
  bool multiplies, finishes;  // of split phases, where each step is a launch of its own
};
static_assert(sizeof(Chain) <= 4096);

// Bytes from one row of x in shared memory to the next: neighbours lie 16 bytes apart in the banks.
__host__ __device__ constexpr int32_t x_pitch(int32_t k) { return k / kChunk * kChunkBytes + 16; }

struct Run {
  int32_t begin, end, step;
};
// This block's share of a phase's units. Blocks that get one more than others follow on those of the phases before, of which
// `dealt` keeps count: over a chain no block has more than one unit more than another. Strided where a block may take any:
// then all of them read the same neighbourhood of W at a time, which memory serves 1.5% faster.
__device__ __forceinline__ Run deal(int32_t units, bool strided, int32_t& dealt) {
  const int32_t grid = static_cast<int32_t>(gridDim.x), each = units / grid, extra = units % grid;
  int32_t i = static_cast<int32_t>(blockIdx.x) - dealt;
  if (i < 0) i += grid;
  dealt = (dealt + extra) % grid;
  if (strided) return {i, units, grid};
  const int32_t begin = i * each + min(i, extra);
  return {begin, begin + each + (i < extra ? 1 : 0), 1};
}

}  // namespace fkv
