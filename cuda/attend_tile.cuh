// attend_tile.cuh: attention of a group of query heads over a tile, the sixteen tokens that a warp takes at a time.
//
// Half-precision K and V are multiplied on tensor cores (m16n8k16): all of a tile's K and V go straight from memory into the
// registers that the instruction reads, so that a warp has 16 16-byte loads a lane in flight and needs no barrier. q and the
// weights enter as the sum of two halves of the stored type, in neighbouring columns: a set of four query heads is the
// instruction's eight columns. A tile's sums are relative to its own largest score, in powers of two.
#pragma once
#include "mma.cuh"
#include "pages.cuh"

namespace fkv {

constexpr int32_t kTile = 16;     // tokens; a page has whole tiles
constexpr int kSetHeads = 4;      // query heads taken together
constexpr int kPartPad = 4;       // floats between the heads of a part, for the banks

// Where a tile lies: its K, the bytes from there to its V and between token rows; rows past `rows` are not attended, nor read.
struct TilePlace {
  const char* keys;
  int64_t kv, row;
  int32_t rows, head_dim;
};

// What a query head has of some tokens: the largest score (times log2 e) and Σ 2^(score − largest).
struct Sums {
  float maximum, total;
};

// Sixteen bytes of K or V: read once a step, so they should push nothing else out; their neighbours follow.
__device__ __forceinline__ uint4 load_stream(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

template <class T>
__device__ __forceinline__ float rounded(float v) {
  if constexpr (Stored<T>::kDtype == FKV_BF16) return __bfloat162float(__float2bfloat16_rn(v));
  else return __half2float(__float2half_rn(v));
}

// A warp's tile of halves; D: head_dim rounded up to 64, 128 or 256; S sets of heads. Lane = 4·g + t.
template <class T, int D, int S>
class Tile {
 public:
  // The block's q as the instruction's columns: [set][D/32][lane] eight channels 32·j + 8·t of column g, which is head g/2 of the
  // set, high (even) or low part.
  struct alignas(16) Query {
    uint4 columns[S * D / 32 * kWarp];
  };
  // By all threads of the block; a barrier must follow.
  static __device__ __forceinline__ void load_query(Query& query, const float* q, int32_t group, int32_t head_dim, float scale) {
    for (int i = threadIdx.x; i < S * D / 32 * kWarp; i += blockDim.x) {
      const int g = i % kWarp / 4, head = i / (D / 32 * kWarp) * kSetHeads + g / 2, c = i / kWarp % (D / 32) * 32 + i % 4 * 8;
      uint4 out = make_uint4(0, 0, 0, 0);
      if (head < group && c < head_dim) {
        Eight v = load8(q + head * head_dim + c);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          v.v[e] *= scale;
          if (g % 2 == 1) v.v[e] -= rounded<T>(v.v[e]);
        }
        out = make_uint4(pack2<T>(v.v[0], v.v[1]), pack2<T>(v.v[2], v.v[3]), pack2<T>(v.v[4], v.v[5]),
                         pack2<T>(v.v[6], v.v[7]));
      }
      query.columns[i] = out;
    }
  }

  // Starts reading; what is not attended is zero, so that nothing that lies there counts.
  __device__ __forceinline__ void load_keys(const TilePlace& place) {
    loaded_rows_ = place.rows;
    const int g = lane() / 4, t = lane() % 4;
    const char* first = place.keys + g * place.row + t * 16;
    const char* second = first + 8 * place.row;
#pragma unroll
    for (int j = 0; j < D / 32; ++j) {
      const bool inside = 32 * j + 8 * t < place.head_dim;
      keys_[j][0] = inside && g < place.rows ? load_stream(first + j * 64) : make_uint4(0, 0, 0, 0);
      keys_[j][1] = inside && g + 8 < place.rows ? load_stream(second + j * 64) : make_uint4(0, 0, 0, 0);
    }
  }
  __device__ __forceinline__ void load_values(const TilePlace& place) {
    const int g = lane() / 4, t = lane() % 4;
    const char* first = place.keys + place.kv + t * place.row + g * 16;
#pragma unroll
    for (int j = 0; j < D / 64; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool inside = 64 * j + 8 * g < place.head_dim && 4 * i + t < place.rows;
        values_[j][i] = inside ? load_stream(first + 4 * i * place.row + j * 128) : make_uint4(0, 0, 0, 0);
      }
    }
  }

  // The tile's scores, from its keys, which are free again afterwards.
  __device__ __forceinline__ void score(const Query& query) {
    rows_ = loaded_rows_;
    float sums[S][2][4] = {};  // two chains of instructions, then their sum
#pragma unroll
    for (int j = 0; j < D / 32; ++j) {
      const uint4 &a = keys_[j][0], &b = keys_[j][1];
#pragma unroll
      for (int set = 0; set < S; ++set) {
        const uint4 q = query.columns[(set * (D / 32) + j) * kWarp + lane()];
        multiply_16x8<T>(sums[set][0], a.x, b.x, a.y, b.y, q.x, q.y);
        multiply_16x8<T>(sums[set][1], a.z, b.z, a.w, b.w, q.z, q.w);
      }
    }
#pragma unroll
    for (int set = 0; set < S; ++set) {
      weights_[set][0] = (sums[set][0][0] + sums[set][1][0]) + (sums[set][0][1] + sums[set][1][1]);
      weights_[set][1] = (sums[set][0][2] + sums[set][1][2]) + (sums[set][0][3] + sums[set][1][3]);
    }
  }

  // Scores → weights; sums [S·4] of the warp.
  __device__ __forceinline__ void weigh(Sums* sums) {
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int set = 0; set < S; ++set) {
      float maximum = fmaxf(g < rows_ ? weights_[set][0] : -INFINITY, g + 8 < rows_ ? weights_[set][1] : -INFINITY);
#pragma unroll
      for (int step = 16; step >= 4; step /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, step));
      weights_[set][0] = g < rows_ ? exp2f(weights_[set][0] - maximum) : 0.0f;
      weights_[set][1] = g + 8 < rows_ ? exp2f(weights_[set][1] - maximum) : 0.0f;
      float total = weights_[set][0] + weights_[set][1];
#pragma unroll
      for (int step = 16; step >= 4; step /= 2) total += __shfl_xor_sync(kAllLanes, total, step);
      if (g == 0) sums[set * kSetHeads + t] = {maximum, total};
    }
  }

  // Σ weight·V of one set's heads over channels 128·panel .. into part [4 heads], `width` floats each.
  __device__ __forceinline__ void sum_values(float* part, int width, int set, int panel) const {
    const int g = lane() / 4, t = lane() % 4;
    float column[4];  // of tokens t, 4 + t, 8 + t, 12 + t
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float weight = __shfl_sync(kAllLanes, weights_[set][i / 2], 4 * (i % 2 * 4 + t) + g / 2);
      column[i] = g % 2 == 0 ? weight : weight - rounded<T>(weight);
    }
    const uint32_t b0 = pack2<T>(column[0], column[1]), b1 = pack2<T>(column[2], column[3]);
    constexpr int kHalves = D < 128 ? 1 : 2;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      float out[8];
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = word(values_[panel * 2 + half][i], u);
        float c[4] = {};
        multiply_16x8<T>(c, __byte_perm(x[0], x[1], 0x5410), __byte_perm(x[0], x[1], 0x7632), __byte_perm(x[2], x[3], 0x5410),
                    __byte_perm(x[2], x[3], 0x7632), b0, b1);
        out[2 * u] = c[0] + c[1];
        out[2 * u + 1] = c[2] + c[3];
      }
      float* to = part + t * width + half * 64 + 8 * g;
      *reinterpret_cast<float4*>(to) = make_float4(out[0], out[1], out[2], out[3]);
      *reinterpret_cast<float4*>(to + 4) = make_float4(out[4], out[5], out[6], out[7]);
    }
  }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

  uint4 keys_[D / 32][2];        // channels 32·j + 8·t of tokens g and g + 8
  uint4 values_[D / 64][4];      // channels 64·j + 8·g of tokens 4·i + t
  float weights_[S][2];          // scores, then weights, of head t of the set: tokens g and g + 8
  int32_t loaded_rows_ = 0, rows_ = 0;
};

// The same of floats, on the ordinary units: a lane scores a token over every other four channels, and sums V over four channels.
template <int D, int S>
class Tile<float, D, S> {
 public:
  struct alignas(16) Query {
    float heads[S * kSetHeads][D];
  };
  static __device__ __forceinline__ void load_query(Query& query, const float* q, int32_t group, int32_t head_dim, float scale) {
    for (int i = threadIdx.x; i < S * kSetHeads * D; i += blockDim.x) {
      const int head = i / D, c = i % D;
      const bool inside = head < group && c < head_dim;
      const float v = inside ? q[head * head_dim + c] : 0.0f;
      query.heads[head][c] = v * scale;
    }
  }
  __device__ __forceinline__ void load_keys(const TilePlace& place) { keys_ = place; }
  __device__ __forceinline__ void load_values(const TilePlace& place) { values_ = place; }

  __device__ __forceinline__ void score(const Query& query) {
    const int token = lane() % kTile;
    rows_ = keys_.rows;
    float sums[S * kSetHeads] = {};
    if (token < rows_) {
      const char* key = keys_.keys + token * keys_.row;
#pragma unroll 4
      for (int c = lane() / kTile * 4; c < keys_.head_dim; c += 8) {
        const float4 k = *reinterpret_cast<const float4*>(key + c * 4);
#pragma unroll
        for (int h = 0; h < S * kSetHeads; ++h) {
          const float4 q = *reinterpret_cast<const float4*>(&query.heads[h][c]);
          sums[h] = fmaf(q.w, k.w, fmaf(q.z, k.z, fmaf(q.y, k.y, fmaf(q.x, k.x, sums[h]))));
        }
      }
    }
#pragma unroll
    for (int h = 0; h < S * kSetHeads; ++h) weights_[h] = sums[h] + __shfl_xor_sync(kAllLanes, sums[h], kTile);
  }

  __device__ __forceinline__ void weigh(Sums* sums) {
    const bool inside = lane() % kTile < rows_;
#pragma unroll
    for (int h = 0; h < S * kSetHeads; ++h) {
      float maximum = inside ? weights_[h] : -INFINITY;
#pragma unroll
      for (int step = kTile / 2; step > 0; step /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, step));
      weights_[h] = inside ? exp2f(weights_[h] - maximum) : 0.0f;
      float total = weights_[h];
#pragma unroll
      for (int step = kTile / 2; step > 0; step /= 2) total += __shfl_xor_sync(kAllLanes, total, step);
      if (lane() == 0) sums[h] = {maximum, total};
    }
  }

  __device__ __forceinline__ void sum_values(float* part, int width, int set, int panel) const {
    const int c = 4 * lane(), channel = 128 * panel + c;
    float4 sums[kSetHeads] = {};
    for (int token = 0; token < rows_; ++token) {
      float4 v{};
      if (channel < values_.head_dim)
        v = *reinterpret_cast<const float4*>(values_.keys + values_.kv + token * values_.row + channel * 4);
#pragma unroll
      for (int h = 0; h < kSetHeads; ++h) {
        const float weight = __shfl_sync(kAllLanes, weights_[set * kSetHeads + h], token);
        sums[h] = make_float4(fmaf(weight, v.x, sums[h].x), fmaf(weight, v.y, sums[h].y), fmaf(weight, v.z, sums[h].z),
                              fmaf(weight, v.w, sums[h].w));
      }
    }
    if (c >= (D < 128 ? D : 128)) return;
#pragma unroll
    for (int h = 0; h < kSetHeads; ++h) *reinterpret_cast<float4*>(part + h * width + c) = sums[h];
  }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

  TilePlace keys_{}, values_{};
  float weights_[S * kSetHeads];
  int32_t rows_ = 0;
};

}  // namespace fkv
