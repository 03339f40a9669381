// dense.cuh: the one order in which every kernel of the dense part sums, so that a row has the same bits alone, in any
// batch, as one phase of a chain or as a launch of its own.
//
// A sum over k: lane j of a warp takes values 8j .. 8j+7 of every step of 256, ascending, by fused multiply-adds into
// one f32, then the lanes' sums meet in the tree 16, 8, 4, 2, 1. Values past k count as zeros. A warp works at R rows
// of x and O rows of W at a time; R and O decide how often a value is loaded, never the order.
#pragma once
#include "common.cuh"

namespace fkv {

constexpr int kStep = 256;        // values of k that a warp takes at a time
constexpr int kStepVectors = 64;  // float4s of a row of x in one step

__host__ __device__ constexpr int32_t steps_of(int32_t k) { return k / kStep + (k % kStep != 0); }

// Rows of x lie in steps of [2][32 lanes][4]: value 8·lane + 4·half + i of a step at [half][lane][i], so that a warp
// reads 512 consecutive bytes. Where float4 `vector` of a row goes, in float4s:
__device__ __forceinline__ int64_t place_of(int64_t vector) {
  return (vector & ~int64_t{63}) | (vector & 1) << 5 | (vector & 63) >> 1;
}

// ---- eight stored values of one row of W ----

template <class T>
struct Piece {
  uint4 bits;
  // Values 4·half .. 4·half + 3.
  __device__ __forceinline__ void widen(float (&out)[4], int half) const {
    const uint32_t words[2] = {half ? bits.z : bits.x, half ? bits.w : bits.y};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (Stored<T>::kDtype == FKV_BF16) {
        out[2 * i] = __uint_as_float(words[i] << 16);
        out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      } else {
        out[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] & 0xffffu)));
        out[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] >> 16)));
      }
    }
  }
};
template <>
struct Piece<float> {
  float4 halves[2];
  __device__ __forceinline__ void widen(float (&out)[4], int half) const {
    const float4 v = half ? halves[1] : halves[0];
    out[0] = v.x;
    out[1] = v.y;
    out[2] = v.z;
    out[3] = v.w;
  }
};

// Adds one step to sums[r·O + o], which stay in registers. x: this lane's first vector of the step in each row.
template <class T, int R, int O>
__device__ __forceinline__ void accumulate(float (&sums)[R * O], const Piece<T> (&w)[O], const float4* const (&x)[R],
                                           int64_t offset) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float values[O][4];
#pragma unroll
    for (int o = 0; o < O; ++o) w[o].widen(values[o], half);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float4 v = x[r][offset + half * kWarp];
#pragma unroll
      for (int o = 0; o < O; ++o) {
        float sum = sums[r * O + o];
        sum = fmaf(values[o][0], v.x, sum);
        sum = fmaf(values[o][1], v.y, sum);
        sum = fmaf(values[o][2], v.z, sum);
        sums[r * O + o] = fmaf(values[o][3], v.w, sum);
      }
    }
  }
}

// The lane tree of N sums at once: at each level a lane keeps half of the values and gives the other half away, until
// it has one; then it only adds. Afterwards lane l holds value l / (32 / N), or, of 64, values 2l and 2l + 1.
template <int Left, int Step, int N>
__device__ __forceinline__ void sum_lanes_from(float (&v)[N]) {
  if constexpr (Left > 1) {
    const bool upper = (threadIdx.x & Step) != 0;
#pragma unroll
    for (int i = 0; i < Left / 2; ++i) {
      const float kept = upper ? v[i + Left / 2] : v[i];
      const float given = upper ? v[i] : v[i + Left / 2];
      v[i] = kept + __shfl_xor_sync(kAllLanes, given, Step);
    }
  } else {
    v[0] += __shfl_xor_sync(kAllLanes, v[0], Step);
  }
  if constexpr (Step > 1) sum_lanes_from<Left == 1 ? 1 : Left / 2, Step / 2>(v);
}
template <int N>
__device__ __forceinline__ void sum_lanes(float (&v)[N]) {
  static_assert(N >= 1 && N <= 64 && (N & (N - 1)) == 0);
  sum_lanes_from<N, kWarp / 2>(v);
}

// ---- the epilogue ----

struct Output {
  const void* bias;  // [n_out] or null
  float* y;
  int64_t y_stride;
  int32_t n_rows, n_out, epilogue;
};

// Bias, residual, SwiGLU and the store of R·O sums. What the epilogue reads is fetched by begin(), long before end()
// needs it. y is read past L1: in a chain another multiprocessor wrote it during this very launch.
template <class T, int R, int O>
class Ending {
 public:
  static_assert(O % 2 == 0, "gate and up rows are summed together");
  static constexpr int kValues = R * O, kPerLane = kValues > kWarp ? kValues / kWarp : 1;
  static constexpr int kSharers = kValues < kWarp ? kWarp / kValues : 1;  // lanes that hold the same value

  __device__ __forceinline__ void begin(const Output& to, int32_t row0, int32_t out0) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int32_t row = row0 + index(i) / O, out = out0 + index(i) % O;
      valid_[i] = row < to.n_rows && out < to.n_out && threadIdx.x % kSharers == 0;
      bias_[i] = before_[i] = 0.0f;
      if (to.bias != nullptr && out < to.n_out) bias_[i] = to_f32(static_cast<const T*>(to.bias)[out]);
      if (to.epilogue == FKV_ADD && valid_[i]) before_[i] = __ldcg(to.y + row * to.y_stride + out);
    }
  }

  // All lanes take part.
  __device__ __forceinline__ void end(float (&sums)[kValues], const Output& to, int32_t row0, int32_t out0) const {
    sum_lanes(sums);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (to.bias != nullptr) sums[i] += bias_[i];
    if (to.epilogue == FKV_SWIGLU) {
      float up;
      if constexpr (kPerLane == 1)
        up = __shfl_xor_sync(kAllLanes, sums[0], kSharers);
      else
        up = sums[1];
      const int32_t row = row0 + index(0) / O, out = out0 + index(0) % O;
      if (valid_[0] && out % 2 == 0) {
        const float gate = sums[0];
        to.y[row * to.y_stride + out / 2] = gate / __fadd_rn(1.0f, expf(-gate)) * up;  // never fused with exp's last step
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int32_t row = row0 + index(i) / O, out = out0 + index(i) % O;
      if (valid_[i]) to.y[row * to.y_stride + out] = to.epilogue == FKV_ADD ? before_[i] + sums[i] : sums[i];
    }
  }

 private:
  static_assert(kPerLane <= 2);
  // Which of the R·O values this lane's i-th is after sum_lanes.
  static __device__ __forceinline__ int index(int i) {
    return static_cast<int>(threadIdx.x % kWarp) / kSharers * kPerLane + i;
  }
  float bias_[kPerLane], before_[kPerLane];
  bool valid_[kPerLane];
};

// ---- the prologue ----

constexpr int kRowThreads = 256;  // of every block that normalises: part of the order of its sums
constexpr int kRowWarps = kRowThreads / kWarp;
constexpr int kAhead = 4;  // 16-byte reads of x in flight a thread

// Values at .. at + 3 of a row of x, zeros past k. `vectors`: the row is aligned to 16 bytes and k a multiple of 4.
// x is read past L1, as y is (see Ending).
__device__ __forceinline__ float4 load_x4(const float* x, int64_t at, int32_t k, bool vectors) {
  if (vectors) return at < k ? __ldcg(reinterpret_cast<const float4*>(x + at)) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = at + i < k ? __ldcg(x + at + i) : 0.0f;
  return make_float4(v[0], v[1], v[2], v[3]);
}

// factors[r] = 1/√(mean(x²) + eps) of rows r < n_rows, in every thread. Thread t sums the squares of values 4t .. 4t+3
// of every 1024, ascending; then the lane tree; then the warps in order. `vectors`: of every row, see load_x4.
// `shared`: R·8 floats, free until the next barrier after it.
template <int R>
__device__ __forceinline__ void row_factors(float (&factors)[R], const float* x, int64_t x_stride, int32_t n_rows,
                                            int32_t k, float eps, bool vectors, float* shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float squares[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    squares[r] = 0.0f;
    if (r >= n_rows) continue;
    const float* from = x + r * x_stride;
    for (int64_t first = 4 * threadIdx.x; first < k; first += kAhead * 4 * kRowThreads) {
      float4 v[kAhead];  // all in flight before the first is used
#pragma unroll
      for (int j = 0; j < kAhead; ++j) v[j] = load_x4(from, first + j * 4 * kRowThreads, k, vectors);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        squares[r] = fmaf(v[j].x, v[j].x, squares[r]);
        squares[r] = fmaf(v[j].y, v[j].y, squares[r]);
        squares[r] = fmaf(v[j].z, v[j].z, squares[r]);
        squares[r] = fmaf(v[j].w, v[j].w, squares[r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const float sum = warp_sum(squares[r]);
    if (lane == 0) shared[r * kRowWarps + warp] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < R; ++r) {
    float total = 0.0f;
    for (int i = 0; i < kRowWarps; ++i) total += shared[r * kRowWarps + i];
    factors[r] = 1.0f / sqrtf(total / static_cast<float>(k) + eps);
  }
}

// ---- phases in one launch (chain.cu) ----

// Whether one launch may run these phases.
bool chains(const fkv_phase* phases, int32_t n_phases, int32_t n_rows, const fkv_stream* stream);
// chain_scratch_bytes() of scratch. Only what `chains` allows.
int32_t run_chain(const fkv_phase* phases, int32_t n_phases, int32_t n_rows, void* scratch, fkv_stream* stream);
uint64_t chain_scratch_bytes();

// ---- one phase in plain launches (gemm.cu) ----

// Bytes of x laid out for the kernels: [n_rows][steps of k] of 1 KiB each.
inline uint64_t laid_out_bytes(int64_t n_rows, int32_t k) {
  return static_cast<uint64_t>(n_rows) * static_cast<uint64_t>(steps_of(k)) * kStep * sizeof(float);
}
// Any shape, any device. x_memory: laid_out_bytes() on the device, aligned to 16 bytes.
int32_t launch_phase(const fkv_phase& phase, int32_t n_rows, float* x_memory, fkv_stream* stream);

}  // namespace fkv
