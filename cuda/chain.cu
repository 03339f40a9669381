// chain.cu: the dense chain. Phases of few rows with aligned half-precision weights run as ONE launch of one block per
// multiprocessor; everything else, and a phase that comes alone, runs as plain launches (gemm.cu), with the same bits.
//
// The launch: a warp owns O rows of W at a time and reads them through a ring of its own in shared memory, each lane
// copying (cp.async) exactly the 16-byte pieces that it will multiply, so that a ring needs no barrier. It copies ahead
// across the ends of phases, because W never changes: while blocks wait for each other, memory stays busy. x of all
// rows lies in shared memory, whole or, where it is too long, in tiles of k that the block passes through together.
// A phase ends with one counter that every block adds to, and that one thread of each block polls; the launch is
// cooperative, so that all blocks are resident and the wait ends.
//
// floor: the bytes of W at HBM read speed → a layer of Llama-3.1-8B (436 MB bf16) 130 us on an H100.
#include <algorithm>

#include "dense.cuh"

namespace fkv {
namespace {

constexpr const char* kCall = "fkv_dense_chain";
constexpr int kChainThreads = kRowThreads, kChainWarps = kRowWarps;
constexpr int kMaxPhases = 16;   // of one launch
constexpr int kMaxChainRows = 8;
constexpr uint64_t kCounterBytes = 256;  // at the start of scratch: phases done, one counter each
constexpr int kPieceBytes = 16, kRowStepBytes = kWarp * kPieceBytes;
// Ring and x together: what side kernels of up to 33 KiB fit beside on one multiprocessor.
constexpr int kSharedBytes = 192 * 1024;

struct Phase {
  const char* weight;
  const void* norm;
  const float* x;
  int64_t x_stride;
  Output to;
  int32_t k;
  float eps;
};
struct Chain {
  Phase phases[kMaxPhases];
  unsigned* done;
  int32_t n_phases, n_rows;
};
static_assert(sizeof(Chain) <= 4096);

// How R rows of x divide shared memory, and how many rows of W a warp takes: enough for x's values, read once per unit,
// not to be what shared memory is busy with; few enough for units to spread evenly.
template <int R>
struct Shape {
  static constexpr int kOuts = R <= 2 ? 2 : 4;
  static constexpr int kXBytes = (R == 8 ? 128 : 64) * 1024;
  static constexpr int kTileSteps = kXBytes / (R * kStepVectors * 16);
  static constexpr int kStepBytes = kOuts * kRowStepBytes;
  static constexpr int kDepth = (kSharedBytes - kXBytes) / kChainWarps / kStepBytes;  // steps in a warp's ring
  static_assert(kDepth >= 4 && (kDepth & (kDepth - 1)) == 0);
};

__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {  // the rest of 16 are zeros
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// The steps of W that a warp multiplies, in order: of every phase, of its units, along k. A unit is kOuts rows of W.
// Warps of one index follow each other over the blocks, so that every multiprocessor has its share of the last units.
template <int R>
class Feed {
 public:
  __device__ __forceinline__ Feed(const Chain& chain, char* ring) : chain_(chain), ring_(ring) {
    enter_phases();
#pragma unroll 1
    for (int i = 0; i < Shape<R>::kDepth - 1; ++i) issue();
  }

  // Starts copying the next step, if any is left, into the slot after the last one filled.
  __device__ __forceinline__ void issue() {
    if (phase_ < chain_.n_phases) {
      const int lane = threadIdx.x % kWarp;
      const int64_t at = int64_t{step_} * kStep + lane * 8;
      const bool inside = at < k_;
      char* slot = ring_ + slot_ * Shape<R>::kStepBytes + lane * kPieceBytes;
#pragma unroll
      for (int o = 0; o < Shape<R>::kOuts; ++o)
        copy_async(slot + o * kRowStepBytes, rows_[o] + (inside ? at * 2 : 0), inside ? kPieceBytes : 0);
      if (++step_ == steps_) {
        unit_ += n_warps();
        if (unit_ < units_)
          enter_unit();
        else {
          ++phase_;
          enter_phases();
        }
      }
    }
    commit_copies();  // an empty group where nothing is left: the count of groups is the count of steps
    slot_ = (slot_ + 1) % Shape<R>::kDepth;
  }

  static __device__ __forceinline__ int32_t first_unit() {
    return static_cast<int32_t>(threadIdx.x / kWarp * gridDim.x + blockIdx.x);
  }
  static __device__ __forceinline__ int32_t n_warps() { return static_cast<int32_t>(kChainWarps * gridDim.x); }
  static __device__ __forceinline__ int32_t units_of(const Phase& phase) {
    return (phase.to.n_out - 1) / Shape<R>::kOuts + 1;
  }

 private:
  // From phase_ on, the first in which this warp has a unit.
  __device__ __forceinline__ void enter_phases() {
    unit_ = first_unit();
    while (phase_ < chain_.n_phases && unit_ >= units_of(chain_.phases[phase_])) ++phase_;
    if (phase_ == chain_.n_phases) return;
    units_ = units_of(chain_.phases[phase_]);
    k_ = chain_.phases[phase_].k;
    steps_ = steps_of(k_);
    enter_unit();
  }
  __device__ __forceinline__ void enter_unit() {
    const Phase& phase = chain_.phases[phase_];
    step_ = 0;
#pragma unroll
    for (int o = 0; o < Shape<R>::kOuts; ++o) {  // past the last row, that row again: its sums are dropped
      const int32_t row = min(unit_ * Shape<R>::kOuts + o, phase.to.n_out - 1);
      rows_[o] = phase.weight + int64_t{row} * phase.k * 2;
    }
  }

  const Chain& chain_;
  char* ring_;
  const char* rows_[Shape<R>::kOuts];
  int32_t phase_ = 0, unit_ = 0, units_ = 0, step_ = 0, steps_ = 0, k_ = 0, slot_ = 0;
};

template <class T>
struct alignas(8) Quad {
  T v[4];
};

// Steps first .. end − 1 of the rows of x into shared memory, normalised where the phase has a norm; zeros past k and
// n_rows.
template <class T, int R>
__device__ __forceinline__ void load_x(float4* out, const Phase& phase, int32_t n_rows, const float (&factors)[R],
                                       int32_t first, int32_t end) {
  const int32_t vectors = (end - first) * kStepVectors;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const float* x = phase.x + r * phase.x_stride;
    float4* row = out + r * Shape<R>::kTileSteps * kStepVectors;
#pragma unroll 1
    for (int32_t i0 = threadIdx.x; i0 < vectors; i0 += kAhead * kChainThreads) {
      float4 v[kAhead];  // all in flight before the first is used
      Quad<T> norm[kAhead] = {};
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int32_t i = i0 + j * kChainThreads;
        const int64_t at = (int64_t{first} * kStepVectors + i) * 4;
        const bool inside = i < vectors && r < n_rows && at < phase.k;
        v[j] = load_x4(x, inside ? at : phase.k, phase.k, true);
        if (inside && phase.norm != nullptr) norm[j] = static_cast<const Quad<T>*>(phase.norm)[at / 4];
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int32_t i = i0 + j * kChainThreads;
        if (phase.norm != nullptr) {
          v[j].x = v[j].x * factors[r] * to_f32(norm[j].v[0]);
          v[j].y = v[j].y * factors[r] * to_f32(norm[j].v[1]);
          v[j].z = v[j].z * factors[r] * to_f32(norm[j].v[2]);
          v[j].w = v[j].w * factors[r] * to_f32(norm[j].v[3]);
        }
        if (i < vectors) row[place_of(i)] = v[j];
      }
    }
  }
}

// Asks L2 for what a phase needs beside W and x, while it waits for the phase before.
template <class T>
__device__ __forceinline__ void prefetch_norm(const Phase& phase) {
  constexpr int kLine = 128 / sizeof(T);
  if (phase.norm == nullptr) return;
  for (int64_t at = int64_t{threadIdx.x} * kLine; at < phase.k; at += kChainThreads * kLine)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const T*>(phase.norm) + at));
}

// 128 registers a thread at most: a side kernel of 128 × 256 fits beside.
template <class T, int R>
__global__ void __launch_bounds__(kChainThreads, 2) dense_chain(const __grid_constant__ Chain chain) {
  typedef Shape<R> S;
  extern __shared__ __align__(128) char memory[];
  __shared__ float shared[R * kRowWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float4* x_tile = reinterpret_cast<float4*>(memory);
  char* ring = memory + S::kXBytes + warp * (S::kDepth * S::kStepBytes);
  const float4* x[R];
#pragma unroll
  for (int r = 0; r < R; ++r) x[r] = x_tile + r * S::kTileSteps * kStepVectors + lane;

  Feed<R> feed(chain, ring);
  int slot = 0;
  for (int32_t p = 0; p < chain.n_phases; ++p) {
    const Phase& phase = chain.phases[p];
    prefetch_norm<T>(phase);
    if (p > 0 && threadIdx.x == 0) {
      unsigned arrived;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(chain.done + p - 1) : "memory");
      } while (arrived < gridDim.x);
    }
    __syncthreads();
    float factors[R];
    if (phase.norm != nullptr)
      row_factors<R>(factors, phase.x, phase.x_stride, chain.n_rows, phase.k, phase.eps, true, shared);
    const int32_t steps = steps_of(phase.k), units = Feed<R>::units_of(phase);
    // Every warp goes through as many rounds as the first, to meet the others where x comes in tiles.
    for (int32_t round = 0, unit = Feed<R>::first_unit(); round * Feed<R>::n_warps() < units;
         ++round, unit += Feed<R>::n_warps()) {
      const bool works = unit < units;
      Ending<T, R, S::kOuts> ending;
      if (works) ending.begin(phase.to, 0, unit * S::kOuts);
      float sums[R * S::kOuts] = {};
      for (int32_t first = 0; first < steps; first += S::kTileSteps) {
        const int32_t end = min(steps, first + S::kTileSteps);
        if (round == 0 || steps > S::kTileSteps) {
          __syncthreads();  // the tile before has been read
          load_x<T, R>(x_tile, phase, chain.n_rows, factors, first, end);
          __syncthreads();
        }
        if (!works) continue;
#pragma unroll 1
        for (int32_t step = first; step < end; ++step) {
          wait_copies<S::kDepth - 2>();
          Piece<T> w[S::kOuts];
          const char* from = ring + slot * S::kStepBytes + lane * kPieceBytes;
#pragma unroll
          for (int o = 0; o < S::kOuts; ++o) w[o].bits = *reinterpret_cast<const uint4*>(from + o * kRowStepBytes);
          accumulate<T, R, S::kOuts>(sums, w, x, int64_t{step - first} * kStepVectors);
          feed.issue();  // into the slot read one step ago
          slot = (slot + 1) % S::kDepth;
        }
      }
      if (works) ending.end(sums, phase.to, 0, unit * S::kOuts);
    }
    if (p + 1 == chain.n_phases) break;
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(chain.done + p) : "memory");
    }
  }
}

template <class T, int R>
int32_t launch_chain(const Chain& chain, fkv_stream* stream) {
  int64_t most = 1;
  for (int32_t p = 0; p < chain.n_phases; ++p)
    most = std::max(most, divide_up(divide_up(chain.phases[p].to.n_out, Shape<R>::kOuts), kChainWarps));
  if (const int32_t status = allow_shared(stream, kCall, dense_chain<T, R>, kSharedBytes)) return status;
  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(
      std::min<int64_t>(most, stream->device->properties.multiProcessorCount)));
  config.blockDim = dim3(kChainThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream->handle;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  return status_of(stream->device, cudaLaunchKernelEx(&config, dense_chain<T, R>, chain), kCall);
}

template <class T>
int32_t launch_chain(const Chain& chain, fkv_stream* stream) {
  if (chain.n_rows == 1) return launch_chain<T, 1>(chain, stream);
  if (chain.n_rows == 2) return launch_chain<T, 2>(chain, stream);
  if (chain.n_rows <= 4) return launch_chain<T, 4>(chain, stream);
  return launch_chain<T, 8>(chain, stream);
}

// Whether rows of x and of y share memory: then some blocks would still read what others write.
bool overlap(const fkv_phase& phase, int32_t n_rows) {
  const int64_t y_width = phase.epilogue == FKV_SWIGLU ? phase.n_out / 2 : phase.n_out;
  const uintptr_t x = reinterpret_cast<uintptr_t>(phase.x), y = reinterpret_cast<uintptr_t>(phase.y);
  const uintptr_t x_end = x + 4 * static_cast<uintptr_t>((n_rows - 1) * phase.x_stride + phase.k);
  const uintptr_t y_end = y + 4 * static_cast<uintptr_t>((n_rows - 1) * phase.y_stride + y_width);
  return x < y_end && y < x_end;
}

}  // namespace

bool chains(const fkv_phase* phases, int32_t n_phases, int32_t n_rows, const fkv_stream* stream) {
  const cudaDeviceProp& device = stream->device->properties;
  if (stream->device->plain || n_phases < 2 || n_rows > kMaxChainRows || !device.cooperativeLaunch) return false;
  if (device.sharedMemPerBlockOptin < kSharedBytes + 1024) return false;
  for (int32_t i = 0; i < n_phases; ++i) {
    const fkv_phase& phase = phases[i];
    if (phase.dtype == FKV_F32 || phase.dtype != phases[0].dtype || phase.k % 8 != 0) return false;
    if (reinterpret_cast<uintptr_t>(phase.weight) % 16 != 0) return false;
    if (reinterpret_cast<uintptr_t>(phase.norm) % 8 != 0) return false;
    if (reinterpret_cast<uintptr_t>(phase.x) % 16 != 0 || phase.x_stride % 4 != 0) return false;
    if (overlap(phase, n_rows)) return false;
  }
  return true;
}

int32_t run_chain(const fkv_phase* phases, int32_t n_phases, int32_t n_rows, void* scratch, fkv_stream* stream) {
  for (int32_t first = 0; first < n_phases; first += kMaxPhases) {
    Chain chain = {};
    chain.done = static_cast<unsigned*>(scratch);
    chain.n_phases = std::min(n_phases - first, kMaxPhases);
    chain.n_rows = n_rows;
    for (int32_t i = 0; i < chain.n_phases; ++i) {
      const fkv_phase& from = phases[first + i];
      chain.phases[i] = {static_cast<const char*>(from.weight),
                         from.norm,
                         from.x,
                         from.x_stride,
                         {from.bias, from.y, from.y_stride, n_rows, from.n_out, from.epilogue},
                         from.k,
                         from.eps};
    }
    if (const int32_t status =
            status_of(stream->device, cudaMemsetAsync(scratch, 0, kCounterBytes, stream->handle), kCall))
      return status;
    const int32_t status = phases[0].dtype == FKV_BF16 ? launch_chain<__nv_bfloat16>(chain, stream)
                                                       : launch_chain<__half>(chain, stream);
    if (status != FKV_OK) return status;
  }
  return FKV_OK;
}

uint64_t chain_scratch_bytes() { return kCounterBytes; }

}  // namespace fkv
