// tile.cuh: scores of sixteen pages for the query heads of one group, by one warp.
//
// max(q·min, q·max) = q⁻·min + q⁺·max, as min <= max: a dot product of length 2d, so that sixteen pages and four heads are one
// tensor-core product. Its eight columns are the heads' q as the sum of two values of the digests' type: to f32's selection nothing is
// lost. Digests of four bytes, and pages whose product is no finite number, are summed one by one instead.
//
// Lane (r, c) = (lane / 4, lane % 4) gets, of a set of four heads, heads 2·(c % 2) and 2·(c % 2) + 1 of pages r and r + 8.
#pragma once
#include "mma.cuh"
#include "pages.cuh"

namespace fkv {

constexpr int kTilePages = 16;
constexpr int kSetHeads = 4;
// Of the 2d, what one step of a tile takes: two products of sixteen, eight values (16 bytes) a lane and page.
constexpr int kStepValues = 32;

FKV_INLINE int32_t tile_steps(int32_t head_dim) { return (2 * head_dim + kStepValues - 1) / kStepValues; }

struct TileScores {
  float v[4];  // page r: two heads; page r + 8: the same two
};

// The power of two that brings a head's greatest |q| to 2^12, and its inverse: the second of two f16 would underflow otherwise.
__device__ __forceinline__ float2 scale_of(const float* q, int32_t head_dim) {
  float most = 0.0f;
  for (int32_t i = threadIdx.x % kWarp; i < head_dim; i += kWarp) most = fmaxf(most, fabsf(q[i]));
  most = warp_max(most);
  const int32_t exponent = static_cast<int32_t>(__float_as_uint(most) >> 23 & 255u) - 127;
  if (exponent < -100 || exponent > 100) return {1.0f, 1.0f};  // zero, or nearly; or not finite
  return {__int_as_float((12 - exponent + 127) << 23), __int_as_float((exponent - 12 + 127) << 23)};
}

// Columns of a product: [step][lane] of eight values: of head first_head + lane / 4 % 4, the first part where lane < 16, else the second.
// `scales` [group]: where not null, what q is multiplied with.
template <class T>
__device__ __forceinline__ void make_columns(uint4* columns, const float* q, const float2* scales, int32_t group, int32_t head_dim,
                                             int32_t first_head) {
  for (int32_t i = threadIdx.x; i < tile_steps(head_dim) * kWarp; i += blockDim.x) {
    const int32_t lane = i % kWarp, head = first_head + lane / 4 % kSetHeads, at = i / kWarp * kStepValues + 8 * (lane % 4);
    const bool greatest = at >= head_dim, there = head < group && at < 2 * head_dim;
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (there) {
      Eight x = load8(q + head * head_dim + at - (greatest ? head_dim : 0));
      const float scale = scales == nullptr ? 1.0f : scales[head].x;
      uint32_t* pairs = reinterpret_cast<uint32_t*>(&bits);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        x.v[j] *= scale;
        if (greatest ? x.v[j] < 0.0f : x.v[j] > 0.0f) x.v[j] = 0.0f;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        pairs[j] = pack2<T>(x.v[2 * j], x.v[2 * j + 1]);
        const T* first = reinterpret_cast<const T*>(pairs + j);
        if (lane >= 16) pairs[j] = pack2<T>(x.v[2 * j] - to_f32(first[0]), x.v[2 * j + 1] - to_f32(first[1]));
      }
    }
    columns[i] = bits;
  }
}

// Where the minima of pages r and r + 8 lie; the maxima, `kv` bytes behind them.
struct Rows {
  const char *low, *high;
};

// One by one: a lane's channels ascending, then over the four lanes of a page.
template <class T>
__device__ __forceinline__ TileScores sum_tile(const Rows& rows, int64_t kv, const float* q, int32_t heads, int32_t head_dim) {
  const int32_t c = threadIdx.x % 4;
  float sums[2][kSetHeads] = {};
  for (int32_t at = 8 * c; at < head_dim; at += kStepValues) {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const T* page = reinterpret_cast<const T*>(p == 0 ? rows.low : rows.high) + at;
      const Eight least = load8(page), greatest = load8(reinterpret_cast<const T*>(reinterpret_cast<const char*>(page) + kv));
#pragma unroll
      for (int h = 0; h < kSetHeads; ++h) {
        if (h >= heads) break;
        const Eight x = load8(q + h * head_dim + at);
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[p][h] = fmaf(x.v[i], x.v[i] > 0.0f ? greatest.v[i] : least.v[i], sums[p][h]);
      }
    }
  }
#pragma unroll
  for (int p = 0; p < 2; ++p) {
#pragma unroll
    for (int h = 0; h < kSetHeads; ++h) {
      sums[p][h] += __shfl_xor_sync(kAllLanes, sums[p][h], 1);
      sums[p][h] += __shfl_xor_sync(kAllLanes, sums[p][h], 2);
    }
  }
  const bool odd = c % 2 != 0;
  return {{odd ? sums[0][2] : sums[0][0], odd ? sums[0][3] : sums[0][1], odd ? sums[1][2] : sums[1][0],
           odd ? sums[1][3] : sums[1][1]}};
}

// By tensor cores. Eight 16-byte loads a lane are in flight: 32 KiB a block. Two sums, so that a product need not wait for the one before.
template <class T>
__device__ __forceinline__ TileScores multiply_tile(const Rows& rows, int64_t kv, const uint4* columns, int32_t head_dim) {
  constexpr int kAhead = 4;
  const int32_t lane = threadIdx.x % kWarp, steps = tile_steps(head_dim);
  const int64_t behind = kv - head_dim * static_cast<int64_t>(sizeof(T));  // 0 where maxima follow minima
  TileScores scores{}, others{};
  for (int32_t first = 0; first < steps; first += kAhead) {
    uint4 low[kAhead], high[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int32_t at = (first + j) * kStepValues + 8 * (lane % 4);
      const int64_t offset = at * static_cast<int64_t>(sizeof(T)) + (at >= head_dim ? behind : 0);
      const bool there = at < 2 * head_dim;
      low[j] = there ? __ldg(reinterpret_cast<const uint4*>(rows.low + offset)) : make_uint4(0, 0, 0, 0);
      high[j] = there ? __ldg(reinterpret_cast<const uint4*>(rows.high + offset)) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (first + j >= steps) break;
      const uint4 column = columns[(first + j) * kWarp + lane];
      multiply_16x8<T>(scores.v, low[j].x, high[j].x, low[j].y, high[j].y, column.x, column.y);
      multiply_16x8<T>(others.v, low[j].z, high[j].z, low[j].w, high[j].w, column.z, column.w);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    scores.v[i] += others.v[i];
    scores.v[i] += __shfl_xor_sync(kAllLanes, scores.v[i], 2);  // the two parts of q
  }
  return scores;
}

}  // namespace fkv
