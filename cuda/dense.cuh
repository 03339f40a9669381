// dense.cuh: the one order in which every kernel of the DECODE family sums, so that a row has the same bits alone, in any
// batch, as one phase of a chain or as a launch of its own.
//
// A sum over k falls into slices of 2048 values. Of a slice, chunk c of 32 values belongs to part c mod 8, and a part is
// summed by tensor cores, chunks ascending, one chain of f32 accumulators for W·high and one for W·low: x is taken as the
// sum of two numbers of a type that multiplies with W exactly. Beside bf16 they are bf16 (up to 2^-17 of x is lost, and
// beyond bf16's largest value x is infinite): both are columns of one product, so that W goes to the tensor cores as it
// lies. Beside f16 and f32 they are tf32 (2^-23). A slice is its parts, ascending; the sum is the slices, ascending. Values
// past k count as zeros. How many rows of x go side by side decides how often W is read, never the order: tensor cores
// compute each column for itself.
//
// Tensor cores because multiply-adds would bind from 4 rows on: at HBM speed an H200's multiprocessor gets 9 values of W a
// clock and has 128 multiply-adds, which also unpack W and fetch x. Here 4 rows are multiplied at what 1 row costs.
#pragma once
#include "mma.cuh"

namespace fkv {

constexpr int kSlice = 2048, kChunk = 32, kParts = 8;
constexpr int kTileOuts = 16, kTileColumns = 8;  // of the tensor cores' tile: rows of W by columns of x
constexpr int kPartsThreads = kParts * kWarp;

__host__ __device__ constexpr int32_t slices_of(int32_t k) { return (k - 1) / kSlice + 1; }
__host__ __device__ constexpr int32_t tiles_of(int32_t n_out) { return (n_out - 1) / kTileOuts + 1; }

// ---- eight consecutive values of a row of W, or of a column of x ----

template <class T>
struct Piece {  // of W: as tf32
  uint4 bits;
  static constexpr bool kExact = true;  // in one tf32 number
  // Values 2i and 2i + 1.
  __device__ __forceinline__ void pair(int i, uint32_t (&out)[2]) const {
    const float2 values = unpack2<T>(word(bits, i));
    out[0] = __float_as_uint(values.x);
    out[1] = __float_as_uint(values.y);
  }
};
template <>
struct Piece<__nv_bfloat16> {
  uint4 bits;
};
template <>
struct Piece<float> {
  float v[8];
  static constexpr bool kExact = false;
  __device__ __forceinline__ void pair(int i, uint32_t (&out)[2]) const {
    out[0] = __float_as_uint(v[2 * i]);
    out[1] = __float_as_uint(v[2 * i + 1]);
  }
};

// Eight values of a column of x, of which a row has one or two. A chunk of a row is 128 bytes: f32, or its high parts and then its low
// parts, each a column of its own.
constexpr int kChunkBytes = kChunk * 4;
template <class T>
struct Column {
  static constexpr int kOfRow = 1;
  float v[8];
  // From a chunk: of lane 4g + t values 8t .. 8t + 7 of column g.
  __device__ __forceinline__ void load(const char* chunk) {
    const float4* from = reinterpret_cast<const float4*>(chunk) + threadIdx.x % 4 * 2;
    *reinterpret_cast<float4*>(v) = from[0];
    *reinterpret_cast<float4*>(v + 4) = from[1];
  }
  // Values at .. at + 3 into a chunk.
  static __device__ __forceinline__ void store(char* chunk, int at, const float (&v)[4]) {
    *reinterpret_cast<float4*>(chunk + at * 4) = make_float4(v[0], v[1], v[2], v[3]);
  }
};
template <>
struct Column<__nv_bfloat16> {
  static constexpr int kOfRow = 2;
  uint4 bits;
  __device__ __forceinline__ void load(const char* chunk) {
    bits = reinterpret_cast<const uint4*>(chunk)[threadIdx.x % kWarp / 4 % kOfRow * 4 + threadIdx.x % 4];
  }
  static __device__ __forceinline__ void store(char* chunk, int at, const float (&v)[4]) {
    uint2 high, low;
    split4<__nv_bfloat16>(v, high, low);
    *reinterpret_cast<uint2*>(chunk + at * 2) = high;
    *reinterpret_cast<uint2*>(chunk + kChunkBytes / 2 + at * 2) = low;
  }
};
template <class T>
constexpr int kTileRows = kTileColumns / Column<T>::kOfRow;  // rows of x in a tile
// Of which row of a tile a lane takes a column.
template <class T>
__device__ __forceinline__ int column_row() {
  return static_cast<int>(threadIdx.x) % kWarp / 4 / Column<T>::kOfRow;
}

// value = high + low, up to 2^-23 of it. Tensor cores ignore the lower 13 bits of a tf32 number.
__device__ __forceinline__ uint32_t high_of(uint32_t value) { return value & 0xffffe000u; }
__device__ __forceinline__ uint32_t low_of(uint32_t value, uint32_t high) {
  return __float_as_uint(__uint_as_float(value) - __uint_as_float(high)) + 0x1000u;
}

// sums [16 rows of W][8 columns] += W [16][8 of k] · x [8 of k][8], as tf32.
__device__ __forceinline__ void multiply_16x8_tf32(float (&sums)[4], const uint32_t (&w)[4], uint32_t x0, uint32_t x1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(x0), "r"(x1));
}

// Where high is not finite, low is a difference of infinities, or such a one times W.
__device__ __forceinline__ float whole(float high, float low) { return fabsf(high) < INFINITY ? high + low : high; }

// ---- one part of one slice: 16 rows of W by N tiles of x, in one warp ----
// Lane 4g + t holds values 8t .. 8t + 7 of a chunk: of two rows of W that are eight apart, and of column g of each tile. The tensor
// cores' own k runs over (2i, 2i + 1) of the four t, which permutes k within a chunk alike for W and x.

constexpr int kPartPitch = 20;  // floats of shared memory for the 16 sums of one row of x: no bank is hit twice

template <class T, int N>
class Part {
 public:
  __device__ __forceinline__ void add(const Piece<T>& upper, const Piece<T>& lower, const Column<T> (&x)[N]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t a[2], b[2];
      upper.pair(i, a);
      lower.pair(i, b);
      const uint32_t w[4] = {a[0], b[0], a[1], b[1]};
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const uint32_t x0 = __float_as_uint(x[n].v[2 * i]), x1 = __float_as_uint(x[n].v[2 * i + 1]);
        const uint32_t high0 = high_of(x0), high1 = high_of(x1);
        multiply_16x8_tf32(high_[n], w, high0, high1);
        multiply_16x8_tf32(low_[n], w, low_of(x0, high0), low_of(x1, high1));
        if constexpr (!Piece<T>::kExact) {
          uint32_t rest[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) rest[j] = low_of(w[j], high_of(w[j]));
          multiply_16x8_tf32(low_[n], rest, high0, high1);
        }
      }
    }
  }

  // To `parts` [row of x < n_rows][kPartPitch] of shared memory. out: which row of W the upper one was.
  __device__ __forceinline__ void write(float* parts, int32_t n_rows, int out) const {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = n * kTileColumns + 2 * t + i % 2;
        if (row < n_rows) parts[row * kPartPitch + out + i / 2 * 8] = whole(high_[n][i], low_[n][i]);
      }
  }

 private:
  float high_[N][4] = {}, low_[N][4] = {};
};
template <int N>
class Part<__nv_bfloat16, N> {
  typedef __nv_bfloat16 T;

 public:
  __device__ __forceinline__ void add(const Piece<T>& upper, const Piece<T>& lower, const Column<T> (&x)[N]) {
    const uint4 &a = upper.bits, &b = lower.bits;
#pragma unroll
    for (int n = 0; n < N; ++n) multiply_16x8<T>(sums_[n], a.x, b.x, a.y, b.y, x[n].bits.x, x[n].bits.y);
#pragma unroll
    for (int n = 0; n < N; ++n) multiply_16x8<T>(sums_[n], a.z, b.z, a.w, b.w, x[n].bits.z, x[n].bits.w);
  }
  __device__ __forceinline__ void write(float* parts, int32_t n_rows, int out) const {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int row = n * kTileRows<T> + static_cast<int>(threadIdx.x) % 4;
      if (row >= n_rows) continue;
      parts[row * kPartPitch + out] = whole(sums_[n][0], sums_[n][1]);
      parts[row * kPartPitch + out + 8] = whole(sums_[n][2], sums_[n][3]);
    }
  }

 private:
  float sums_[N][4] = {};  // of row t's high and low part: rows g and g + 8 of W
};

// The sum of one output's parts, which lie `stride` floats apart.
__device__ __forceinline__ float sum_parts(const float* parts, int32_t stride) {
  float sum = parts[0];
#pragma unroll
  for (int i = 1; i < kParts; ++i) sum += parts[i * stride];
  return sum;
}

// ---- the prologue: RMSNorm ----
// x·norm goes into the products, 1/√(mean(x²) + eps) to the finished sum. Squares are summed like products, slices and
// parts alike; within a part lane 8q + v takes values 4v .. 4v + 3 of the part's chunks q and q + 4, then the lanes' tree.

// Where this lane's piece `half` of part `part` is, from the start of the slice.
__device__ __forceinline__ int32_t square_place(int part, int half) {
  const int lane = threadIdx.x % kWarp;
  return (part + kParts * (lane / 8 + 4 * half)) * kChunk + lane % 8 * 4;
}
__device__ __forceinline__ float add_squares(float sum, const float4& v) {
  return fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, sum))));
}
__device__ __forceinline__ float norm_factor(float squares, int32_t k, float eps) {
  return 1.0f / sqrtf(__fadd_rn(squares / static_cast<float>(k), eps));
}

// ---- the epilogue ----

struct Output {
  const void* bias;  // [n_out] or null
  float* y;
  int64_t y_stride;
  int32_t n_rows, n_out, epilogue;
};

// One output for each lane, those of a pair of gate and up rows in lanes 2i and 2i + 1. What is read beside the sum is
// fetched first, long before it is needed. y is read past L1: in a chain another multiprocessor wrote it during this very launch.
template <class T>
class Ending {
 public:
  __device__ __forceinline__ Ending(const Output& to, int32_t row, int32_t out)
      : row_(row), out_(out), valid_(row < to.n_rows && out < to.n_out) {
    if (to.bias != nullptr && valid_) bias_ = to_f32(static_cast<const T*>(to.bias)[out]);
    if (to.epilogue == FKV_ADD && valid_) before_ = __ldcg(to.y + row * to.y_stride + out);
  }
  // All lanes take part. factor: 1 where there is no norm.
  __device__ __forceinline__ void end(const Output& to, float sum, float factor) const {
    sum = __fmul_rn(sum, factor);
    if (to.bias != nullptr) sum = __fadd_rn(sum, bias_);
    if (to.epilogue == FKV_SWIGLU) {
      const float up = __shfl_xor_sync(kAllLanes, sum, 1);
      if (valid_ && out_ % 2 == 0) to.y[row_ * to.y_stride + out_ / 2] = sum / __fadd_rn(1.0f, expf(-sum)) * up;
    } else if (valid_) {
      to.y[row_ * to.y_stride + out_] = to.epilogue == FKV_ADD ? __fadd_rn(before_, sum) : sum;
    }
  }

 private:
  int32_t row_, out_;
  bool valid_;
  float bias_ = 0.0f, before_ = 0.0f;
};

// ---- phases in one launch (chain.cu), or one phase in plain launches (gemm.cu) ----
// Scratch starts with kHeadBytes that are zero between calls, and that the caller zeroes before the first one.

constexpr uint64_t kHeadBytes = 4096;
// What either needs after the head.
uint64_t decode_scratch_bytes(int32_t n_rows, int32_t max_k, int32_t max_out);

// Whether one launch may run these phases.
bool chains(const fkv_phase* phases, int32_t n_phases, int32_t n_rows, const fkv_stream* stream);
// Only what `chains` allows.
int32_t run_chain(const fkv_phase* phases, int32_t n_phases, int32_t n_rows, void* scratch, fkv_stream* stream);

// Bytes of x laid out for the plain kernels: a factor for each row, then [n_rows][k in whole chunks].
inline uint64_t laid_out_bytes(int64_t n_rows, int32_t k) {
  const int64_t floats = divide_up(n_rows, 4) * 4 + n_rows * divide_up(k, kChunk) * kChunk;
  return static_cast<uint64_t>(floats) * sizeof(float);
}
// Any shape, any device. x_memory: laid_out_bytes() on the device, aligned to 16 bytes.
int32_t launch_phase(const fkv_phase& phase, int32_t n_rows, float* x_memory, fkv_stream* stream);

}  // namespace fkv
