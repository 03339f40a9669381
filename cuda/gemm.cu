// gemm.cu: one phase of the dense part in two plain launches, for any shape on any device: x is laid out (times norm,
// padded to whole chunks), then the eight warps of a block are the parts of 16 rows of W by 8 or 32 rows of x, and read both
// through L1. What a chain does in one launch where it can (chain.cu); many rows are better off with tensor.cuh's kernels.
//
// Few rows are bound by memory. floor: n_out·k·bytes at HBM read speed → 33.5 MB (4096 × 4096 bf16) 10 us on an H100.
#include <algorithm>

#include "dense.cuh"

namespace fkv {
namespace {

constexpr const char* kCall = "fkv_dense_chain";
constexpr int kFew = 8, kMany = 32;  // rows of x that a block takes together

struct Lay {
  const float* x;
  const void* norm;  // or null
  float* factors;
  char* out;
  int64_t x_stride;
  int32_t k, padded;
  float eps;
};

// One block a row.
template <class T>
__global__ void __launch_bounds__(kPartsThreads) lay_out(const Lay job) {
  __shared__ float parts[kParts];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const float* x = job.x + blockIdx.x * job.x_stride;
  char* out = job.out + static_cast<int64_t>(blockIdx.x) * job.padded * 4;
  float squares = 0.0f;
  for (int32_t slice = 0; slice < job.padded; slice += kSlice) {
    float sum = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t at = slice + square_place(warp, half);
      if (at >= job.padded) continue;
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = at + i < job.k ? x[at + i] : 0.0f;
      sum = add_squares(sum, make_float4(v[0], v[1], v[2], v[3]));
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (job.norm != nullptr && at + i < job.k) v[i] *= to_f32(static_cast<const T*>(job.norm)[at + i]);
      Column<T>::store(out + at / kChunk * kChunkBytes, at % kChunk, v);
    }
    sum = warp_sum(sum);
    if (lane == 0) parts[warp] = sum;
    __syncthreads();
    squares += sum_parts(parts, 1);
    __syncthreads();
  }
  if (threadIdx.x == 0) job.factors[blockIdx.x] = job.norm == nullptr ? 1.0f : norm_factor(squares, job.k, job.eps);
}

// ---------------------------------------------------------------------------------------------------------------------

struct Multiply {
  const void* weight;
  const float* factors;
  const char* x;  // as lay_out leaves it: rows of whole chunks
  Output to;
  int32_t k, padded;
};

// Values at .. at + 7 of a row of W, zeros past k. Aligned rows start at, and have a length of, multiples of 16 bytes.
template <class T, bool kAligned>
__device__ __forceinline__ Piece<T> load_piece(const T* row, int32_t at, int32_t k) {
  alignas(16) T values[8];
  if constexpr (kAligned) {
    uint4 bits[sizeof values / 16] = {};
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof values / 16); ++i)
      if (at < k) bits[i] = __ldg(reinterpret_cast<const uint4*>(row + at) + i);
    memcpy(values, bits, sizeof values);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = at + i < k ? row[at + i] : from_f32<T>(0.0f);
  }
  Piece<T> piece;
  memcpy(&piece, values, sizeof piece);
  return piece;
}

// Blocks that share rows of W follow each other, so that W comes from memory once and then from L2.
template <class T, bool kAligned, int N>
__global__ void __launch_bounds__(kPartsThreads, 2) multiply(const Multiply job) {
  constexpr int kRows = N * kTileRows<T>, kPartFloats = kRows * kPartPitch;
  constexpr int kOutputs = (kRows * kTileOuts - 1) / kPartsThreads + 1;   // of one thread
  constexpr int kAhead = sizeof(T) == 2 && kRows <= kFew ? 4 : 2;         // chunks of W in flight
  __shared__ float parts[2][kParts][kPartFloats];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int32_t k = job.k, row_tiles = (job.to.n_rows - 1) / kRows + 1;
  const int64_t tiles = static_cast<int64_t>(row_tiles) * tiles_of(job.to.n_out);
  const T* weight = static_cast<const T*>(job.weight);
  int buffer = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int32_t row0 = static_cast<int32_t>(tile % row_tiles) * kRows;
    const int32_t out0 = static_cast<int32_t>(tile / row_tiles) * kTileOuts;
    const int32_t n_rows = min(kRows, job.to.n_rows - row0);
    // Past the last row, that row again: its sums are dropped.
    const T* upper = weight + static_cast<int64_t>(min(out0 + g, job.to.n_out - 1)) * k;
    const T* lower = weight + static_cast<int64_t>(min(out0 + g + 8, job.to.n_out - 1)) * k;
    float totals[kOutputs] = {};
    for (int32_t slice = 0; slice < k; slice += kSlice) {
      Part<T, N> part;
#pragma unroll 1
      for (int first = 0; first < kSlice / kChunk / kParts; first += kAhead) {
        Piece<T> a[kAhead], b[kAhead];
#pragma unroll
        for (int c = 0; c < kAhead; ++c) {
          const int32_t at = slice + (warp + (first + c) * kParts) * kChunk + t * 8;
          a[c] = load_piece<T, kAligned>(upper, at, k);
          b[c] = load_piece<T, kAligned>(lower, at, k);
        }
#pragma unroll
        for (int c = 0; c < kAhead; ++c) {
          const int32_t at = slice + (warp + (first + c) * kParts) * kChunk;
          if (at >= k) break;
          Column<T> v[N] = {};
#pragma unroll
          for (int n = 0; n < N; ++n)
            if (const int32_t row = n * kTileRows<T> + column_row<T>(); row < n_rows)
              v[n].load(job.x + (int64_t{row0} + row) * job.padded * 4 + at / kChunk * kChunkBytes);
          part.add(a[c], b[c], v);
        }
      }
      part.write(parts[buffer][warp], n_rows, g);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) {
        const int output = static_cast<int>(threadIdx.x) + i * kPartsThreads;
        if (output < kRows * kTileOuts)
          totals[i] += sum_parts(&parts[buffer][0][output / kTileOuts * kPartPitch + output % kTileOuts], kPartFloats);
      }
      buffer ^= 1;
    }
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      const int output = static_cast<int>(threadIdx.x) + i * kPartsThreads;
      const int32_t row = row0 + output / kTileOuts;
      const bool inside = output < kRows * kTileOuts && row < job.to.n_rows;
      const Ending<T> ending(job.to, inside ? row : job.to.n_rows, out0 + output % kTileOuts);
      ending.end(job.to, totals[i], inside ? job.factors[row] : 1.0f);
    }
  }
}

template <class T, bool kAligned>
void launch_multiply(const Multiply& job, cudaStream_t stream) {
  const bool many = job.to.n_rows > kFew;
  const int64_t tiles = divide_up(job.to.n_rows, many ? kMany : kFew) * tiles_of(job.to.n_out);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, 1 << 30));
  if (many)
    multiply<T, kAligned, kMany / kTileRows<T>><<<blocks, kPartsThreads, 0, stream>>>(job);
  else
    multiply<T, kAligned, kFew / kTileRows<T>><<<blocks, kPartsThreads, 0, stream>>>(job);
}

}  // namespace

int32_t launch_phase(const fkv_phase& phase, int32_t n_rows, float* x_memory, fkv_stream* stream) {
  Lay lay;
  lay.x = phase.x;
  lay.norm = phase.norm;
  lay.factors = x_memory;
  lay.out = reinterpret_cast<char*>(x_memory + divide_up(n_rows, 4) * 4);
  lay.x_stride = phase.x_stride;
  lay.k = phase.k;
  lay.padded = static_cast<int32_t>(divide_up(phase.k, kChunk) * kChunk);
  lay.eps = phase.eps;

  Multiply job;
  job.weight = phase.weight;
  job.factors = lay.factors;
  job.x = lay.out;
  job.to = {phase.bias, phase.y, phase.y_stride, n_rows, phase.n_out, phase.epilogue};
  job.k = phase.k;
  job.padded = lay.padded;
  return with_dtype(phase.dtype, [&](auto type) {
    using T = decltype(type);
    lay_out<T><<<static_cast<unsigned>(n_rows), kPartsThreads, 0, stream->handle>>>(lay);
    if (const int32_t status = launched(stream, kCall)) return status;
    if (reinterpret_cast<uintptr_t>(phase.weight) % 16 == 0 && phase.k % 8 == 0)
      launch_multiply<T, true>(job, stream->handle);
    else
      launch_multiply<T, false>(job, stream->handle);
    return launched(stream, kCall);
  });
}

}  // namespace fkv
