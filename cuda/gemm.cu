// gemm.cu: one phase of the dense part in two plain launches, for any shape on any device: x is laid out (normalised,
// padded), then warps multiply register tiles of R rows of x by O rows of W, reading both through L1.
//
// Few rows are bound by memory: W is read once, D steps ahead. floor: n_out·k·bytes at HBM read speed → 33.5 MB (4096 ×
// 4096 bf16) 10 us on an H100. Many rows are bound by f32 multiply-adds, because the order of a sum must not depend on
// the number of rows. floor: n_rows·n_out·k multiply-adds at 33.5 T/s → 512 rows of 4096 × 4096 256 us on an H100.
#include <algorithm>

#include "dense.cuh"

namespace fkv {
namespace {

struct Lay {
  const float* x;
  const void* norm;  // or null
  float* out;
  int64_t x_stride;
  int32_t k, dtype;
  float eps;
  bool vectors;
};

// One block a row: x·factor·norm, or x, in the layout of place_of, zeros past k.
__global__ void __launch_bounds__(kRowThreads) lay_out(const Lay job) {
  __shared__ float shared[kRowWarps];
  const float* x = job.x + blockIdx.x * job.x_stride;
  float factor[1] = {1.0f};
  if (job.norm != nullptr) row_factors<1>(factor, x, 0, 1, job.k, job.eps, job.vectors, shared);
  const int64_t vectors = int64_t{steps_of(job.k)} * kStepVectors;
  float4* out = reinterpret_cast<float4*>(job.out) + blockIdx.x * vectors;
  for (int64_t vector = threadIdx.x; vector < vectors; vector += kRowThreads) {
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = vector * 4 + i;
      v[i] = at < job.k ? x[at] : 0.0f;
      if (job.norm != nullptr && at < job.k) v[i] = v[i] * factor[0] * load(job.norm, at, job.dtype);
    }
    out[place_of(vector)] = make_float4(v[0], v[1], v[2], v[3]);
  }
}

// ---------------------------------------------------------------------------------------------------------------------

struct Multiply {
  const void* weight;
  const float4* x;  // as lay_out leaves it
  Output to;
  int32_t k;
  int32_t row_warps;  // warps of a block side by side along x's rows; the others along W's
};

// 16 bytes of W, which nobody else on this multiprocessor needs where there are few rows.
template <bool kOnce>
__device__ __forceinline__ uint4 load_weight(const void* p) {
  uint4 v;
  if constexpr (kOnce)
    asm("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(p));
  else
    v = __ldg(static_cast<const uint4*>(p));
  return v;
}

// Values at .. at + 7 of a row of W, zeros past k. Aligned rows start at, and have a length of, multiples of 16 bytes.
template <class T, bool kAligned, bool kOnce>
__device__ __forceinline__ Piece<T> load_piece(const T* row, int64_t at, int32_t k) {
  Piece<T> piece;
  constexpr int kVector = 16 / sizeof(T);
  alignas(16) T values[8];
#pragma unroll
  for (int i = 0; i < 8; i += kVector) {
    uint4 bits = make_uint4(0, 0, 0, 0);
    if constexpr (kAligned) {
      if (at + i < k) bits = load_weight<kOnce>(row + at + i);
    } else {
      T some[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j) some[j] = at + i + j < k ? row[at + i + j] : from_f32<T>(0.0f);
      memcpy(&bits, some, sizeof bits);
    }
    memcpy(values + i, &bits, sizeof bits);
  }
  memcpy(&piece, values, sizeof piece);
  return piece;
}

// Tiles of (row_warps·R) rows of x by (other warps·O) rows of W; the blocks that share rows of W follow each other, so
// that W comes from memory once and then from L2. D: steps of W in flight.
template <class T, bool kAligned, int R, int O, int D, int kWarps>
__global__ void __launch_bounds__(kWarps * kWarp) multiply(const Multiply job) {
  constexpr bool kOnce = R < 8;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int32_t n_rows = job.to.n_rows, n_out = job.to.n_out, k = job.k, steps = steps_of(k);
  const int32_t tile_rows = job.row_warps * R, tile_outs = kWarps / job.row_warps * O;
  const int64_t row_tiles = (int64_t{n_rows} + tile_rows - 1) / tile_rows;
  const int64_t tiles = row_tiles * ((int64_t{n_out} + tile_outs - 1) / tile_outs);
  const T* weight = static_cast<const T*>(job.weight);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first_row = tile % row_tiles * tile_rows + warp % job.row_warps * R;
    const int64_t first_out = tile / row_tiles * tile_outs + warp / job.row_warps * O;
    if (first_row >= n_rows || first_out >= n_out) continue;
    const int32_t row0 = static_cast<int32_t>(first_row), out0 = static_cast<int32_t>(first_out);

    Ending<T, R, O> ending;
    ending.begin(job.to, row0, out0);
    const T* rows[O];  // past the last row, that row again: its sums are dropped
#pragma unroll
    for (int o = 0; o < O; ++o) rows[o] = weight + (o < n_out - out0 ? out0 + o : int64_t{n_out} - 1) * k;
    const float4* x[R];
#pragma unroll
    for (int r = 0; r < R; ++r)
      x[r] = job.x + (r < n_rows - row0 ? row0 + r : int64_t{n_rows} - 1) * steps * kStepVectors + lane;

    Piece<T> ahead[D][O];
#pragma unroll
    for (int d = 0; d < D; ++d)
#pragma unroll
      for (int o = 0; o < O; ++o)
        ahead[d][o] = load_piece<T, kAligned, kOnce>(rows[o], int64_t{d} * kStep + lane * 8, k);
    float sums[R * O] = {};
#pragma unroll 1
    for (int32_t first = 0; first < steps; first += D) {
#pragma unroll
      for (int d = 0; d < D; ++d) {
        const int64_t step = int64_t{first} + d;
        if (step < steps) {
          accumulate<T, R, O>(sums, ahead[d], x, step * kStepVectors);
#pragma unroll
          for (int o = 0; o < O; ++o)
            ahead[d][o] = load_piece<T, kAligned, kOnce>(rows[o], (step + D) * kStep + lane * 8, k);
        }
      }
    }
    ending.end(sums, job.to, row0, out0);
  }
}

template <class T, bool kAligned, int R, int O, int D, int kWarps>
void launch_multiply(Multiply job, cudaStream_t stream) {
  job.row_warps = job.to.n_rows > R ? 2 : 1;  // more rows than a tile has: only where R is the largest
  const int64_t tiles = divide_up(job.to.n_rows, job.row_warps * R) *
                        divide_up(job.to.n_out, kWarps / job.row_warps * O);
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(tiles, 1 << 30));
  multiply<T, kAligned, R, O, D, kWarps><<<blocks, kWarps * kWarp, 0, stream>>>(job);
}

template <class T>
void launch_multiply(const Multiply& job, cudaStream_t stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(job.weight) % 16 == 0 && job.k * sizeof(T) % 16 == 0;
  const int32_t n_rows = job.to.n_rows;
  if (!aligned) {
    if (n_rows == 1) return launch_multiply<T, false, 1, 4, 1, 4>(job, stream);
    return launch_multiply<T, false, 8, 4, 1, 8>(job, stream);
  }
  if (n_rows == 1) return launch_multiply<T, true, 1, 4, 4, 4>(job, stream);
  if (n_rows <= 4) return launch_multiply<T, true, 4, 4, 2, 4>(job, stream);
  // As wide as registers allow without spilling.
  return launch_multiply<T, true, 8, sizeof(T) == 2 ? 8 : 4, 1, 8>(job, stream);
}

}  // namespace

int32_t launch_phase(const fkv_phase& phase, int32_t n_rows, float* x_memory, fkv_stream* stream) {
  Lay lay;
  lay.x = phase.x;
  lay.norm = phase.norm;
  lay.out = x_memory;
  lay.x_stride = phase.x_stride;
  lay.k = phase.k;
  lay.dtype = phase.dtype;
  lay.eps = phase.eps;
  lay.vectors = reinterpret_cast<uintptr_t>(phase.x) % 16 == 0 && phase.x_stride % 4 == 0 && phase.k % 4 == 0;
  lay_out<<<static_cast<unsigned>(n_rows), kRowThreads, 0, stream->handle>>>(lay);
  FKV_LAUNCH_CHECK(stream, "fkv_dense_chain");

  Multiply job;
  job.weight = phase.weight;
  job.x = reinterpret_cast<const float4*>(x_memory);
  job.to = {phase.bias, phase.y, phase.y_stride, n_rows, phase.n_out, phase.epilogue};
  job.k = phase.k;
  return with_dtype(phase.dtype, [&](auto type) {
    launch_multiply<decltype(type)>(job, stream->handle);
    return launched(stream, "fkv_dense_chain");
  });
}

}  // namespace fkv
