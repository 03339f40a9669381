// tensor.cuh: the dense part on tensor cores, for many rows: x as tensor cores read it, and what happens to the sums.
//
// A sum over k: steps of 16 values, ascending, one instruction each, into one f32; where x has two parts (PREFILL), a
// step's high parts and then its low parts. Values past k are zeros. Tiles, stages and blocks decide who does the work,
// never the order; how the instruction itself adds its 16 products belongs to the chip.
#pragma once
#include "dense.cuh"
#include "mma.cuh"

namespace fkv {

constexpr int kOperandStep = 64;  // an operand's rows are padded to a multiple of this many values, with zeros

// x in the type of the weights, rows of `width` values: high + low is nearly x, high alone is x rounded. F16's range is
// small: there a row was divided by its scale, a power of two.
struct Operand {
  void* high;
  void* low;      // or null
  float* scales;  // [n_rows] or null
  int64_t width;
};
inline int64_t operand_width(int64_t k) { return divide_up(k, kOperandStep) * kOperandStep; }

// y = epilogue(weight · x). Where `next` has rows, SWIGLU's values go there, split, and y stays as it is.
struct Product {
  Operand x, next;
  const void* weight;
  Output to;
  int32_t k, dtype;
  bool wide;  // rows of y are aligned to 16 bytes
};

// ---- x in parts ----

// Four values of a row of an operand, aligned to 8 bytes.
template <class T, int kParts>
__device__ __forceinline__ void store_parts(const Operand& to, int64_t at, const float (&v)[4]) {
  uint2 high, low;
  split4<T>(v, high, low);
  *reinterpret_cast<uint2*>(static_cast<T*>(to.high) + at) = high;
  if constexpr (kParts == 2) *reinterpret_cast<uint2*>(static_cast<T*>(to.low) + at) = low;
}

// ---- the epilogue ----

// Whether rows row0 .. row0 + rows − 1 and outputs out0 .. out0 + outs − 1 all exist and nothing but the epilogue's own
// happens to them: finish() may then be `plain`.
__device__ __forceinline__ bool is_plain(const Product& job, int64_t row0, int rows, int32_t out0, int outs) {
  return job.wide && job.to.bias == nullptr && job.x.scales == nullptr && row0 + rows <= job.to.n_rows &&
         out0 <= job.to.n_out - outs;
}

// Of 32 consecutive outputs of a row, four lanes (lane % 4) hold two of every eight, as tensor cores leave them: v[2j] and
// v[2j + 1] are outputs 8j + 2·(lane % 4) + {0, 1}. All four take part.
template <class T, int kParts, bool kIsPlain>
__device__ __forceinline__ void finish(const Product& job, int64_t row, int32_t first, float (&v)[8], const float2 (&before)[4]) {
  const Output& to = job.to;
  const int q = threadIdx.x % 4;
  const bool valid = kIsPlain || row < to.n_rows;
  if constexpr (!kIsPlain) {
    const float scale = job.x.scales != nullptr && valid ? job.x.scales[row] : 1.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int32_t out = first + i / 2 * 8 + 2 * q + i % 2;
      v[i] *= scale;
      if (to.bias != nullptr && out < to.n_out) v[i] += to_f32(static_cast<const T*>(to.bias)[out]);
    }
  }
  if (to.epilogue != FKV_SWIGLU) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int32_t out = first + 8 * j + 2 * q;
      if (!kIsPlain && (!valid || out >= to.n_out)) continue;
      float2 pair = make_float2(v[2 * j], v[2 * j + 1]);
      if (to.epilogue == FKV_ADD) pair = make_float2(before[j].x + pair.x, before[j].y + pair.y);
      float* y = to.y + row * to.y_stride + out;
      if (kIsPlain || (job.wide && out + 1 < to.n_out)) {
        *reinterpret_cast<float2*>(y) = pair;
      } else {
        y[0] = pair.x;
        if (out + 1 < to.n_out) y[1] = pair.y;
      }
    }
    return;
  }
  float g[4];  // output first / 2 + 4j + q
#pragma unroll
  for (int j = 0; j < 4; ++j) g[j] = __fdividef(v[2 * j], 1.0f + __expf(-v[2 * j])) * v[2 * j + 1];
  // The lanes exchange them, so that each has four in a row: first / 2 + 4q + {0, 1, 2, 3}.
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const float got = __shfl_xor_sync(kAllLanes, q % 2 ? g[j] : g[j + 1], 1);
    (q % 2 ? g[j] : g[j + 1]) = got;
  }
  float given[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) given[i] = __shfl_xor_sync(kAllLanes, q < 2 ? g[2 + i] : g[i], 2);
#pragma unroll
  for (int i = 0; i < 2; ++i) (q < 2 ? g[2 + i] : g[i]) = given[i];
  const int32_t out = first / 2 + 4 * q, n = to.n_out / 2;
  if (!kIsPlain && (!valid || out >= n)) return;
  if (job.next.high != nullptr) return store_parts<T, kParts>(job.next, row * job.next.width + out, g);
  float* y = to.y + row * to.y_stride + out;
  if (kIsPlain || (job.wide && out + 4 <= n)) {
    *reinterpret_cast<float4*>(y) = make_float4(g[0], g[1], g[2], g[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (out + i < n) y[i] = g[i];
  }
}

// What ADD adds to: the same outputs of y, to be read long before finish() needs them.
template <bool kIsPlain>
__device__ __forceinline__ void read_before(float2 (&before)[4], const Product& job, int64_t row, int32_t first) {
  const Output& to = job.to;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int32_t out = first + 8 * j + 2 * static_cast<int>(threadIdx.x % 4);
    before[j] = make_float2(0.0f, 0.0f);
    if (to.epilogue != FKV_ADD || (!kIsPlain && (row >= to.n_rows || out >= to.n_out))) continue;
    const float* y = to.y + row * to.y_stride + out;
    if (kIsPlain || (job.wide && out + 1 < to.n_out))
      before[j] = *reinterpret_cast<const float2*>(y);
    else
      before[j] = make_float2(y[0], out + 1 < to.n_out ? y[1] : 0.0f);
  }
}

// ---- who does it ----

// Tiles are gone through in bands of `kBand` tiles of rows, so that blocks at work at one time share rows of x and of W in L2.
constexpr int kBand = 8;
struct Tile {
  int32_t row, out;  // in tiles
};
__host__ __device__ inline Tile tile_at(int64_t index, int32_t row_tiles, int32_t out_tiles) {
  const int64_t band = index / (int64_t{kBand} * out_tiles), within = index % (int64_t{kBand} * out_tiles);
  const int32_t left = row_tiles - static_cast<int32_t>(band) * kBand, height = left < kBand ? left : kBand;
  return {static_cast<int32_t>(band * kBand + within % height), static_cast<int32_t>(within / height)};
}

// Any chip, any shape of bf16 or f16 weights (tensor_mma.cu).
int32_t launch_mma(const Product& job, fkv_stream* stream);
// Hopper's own instructions (tensor_hopper.cu), same bits, and whether they can: a matter of the weights, never of n_rows.
bool takes_hopper(const Product& job, const fkv_stream* stream);
int32_t launch_hopper(const Product& job, fkv_stream* stream);

// Phases in order (tensor.cu), those that takes_tensor(). Scratch: tensor_scratch_bytes() of it.
bool takes_tensor(const fkv_phase* phases, int32_t n_phases);
uint64_t tensor_scratch_bytes(int64_t n_rows, int32_t max_k);
int32_t run_tensor(const fkv_phase* phases, int32_t n_phases, int32_t n_rows, int32_t family, void* scratch, fkv_stream* stream);

}  // namespace fkv
