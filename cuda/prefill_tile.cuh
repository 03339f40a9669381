// prefill_tile.cuh: what the two tensor-core kernels of prefill attention share: where a tile's queries come from, the online
// softmax over a warp's fragments, the rows of V that nobody may see. Both do these operations in one order, so that they differ
// in speed alone.
//
// A tile is rows (token, query head of the group) under one KV head. Fragments are those of mma.m16n8k16: of sixteen rows a
// thread has rows lane / 4 and that + 8, and of eight columns 2·(lane mod 4) and that + 1.
#pragma once
#include "mma.cuh"
#include "pages.cuh"

namespace fkv {

// In shared memory a tile is panels: rows of 64 values, 128 bytes, whose 16-byte pieces are exchanged so that neither rows nor
// columns of pieces fall into one bank.
constexpr int kPanel = 64, kRowBytes = 128;
__device__ __forceinline__ uint32_t panel_offset(int row, int piece) { return row * kRowBytes + ((piece ^ (row & 7)) << 4); }

// Keys of a block for heads of up to kD values: part of the numerics, and what of K and V fits shared memory twice.
template <int kD>
constexpr int kBlockKeys = kD <= 128 ? 128 : 64;
template <int kD>
constexpr int kPanels = (kD + kPanel - 1) / kPanel;
template <int kD>
constexpr int kTileBytes = kPanels<kD> * kBlockKeys<kD> * kRowBytes;  // of a block's K, or V

// ---- queries ----

struct QueryTile {
  // A query is token of the chunk × group + head of the group. Rows past the chunk's last are computed like the last.
  int32_t first, last;
  int32_t group, start, head;

  __device__ __forceinline__ int32_t at(int row) const { return min(first + row, last); }
  __device__ __forceinline__ int32_t position(int row) const { return start + at(row) / group; }
};
// Tile `index` counts from the one with the most keys, which goes first.
__device__ __forceinline__ QueryTile query_tile(const fkv_cache& cache, const fkv_prefill_params& params, int32_t tiles,
                                                int rows) {
  const auto block = static_cast<int32_t>(blockIdx.x);
  const int32_t group = cache.n_q_heads / cache.n_kv_heads, index = block / cache.n_kv_heads;
  return {(tiles - 1 - index) * rows, params.n * group - 1, group, params.start, block % cache.n_kv_heads};
}
// Where q of a query, or its output, begins.
__device__ __forceinline__ const float* query_in(const fkv_cache& cache, const fkv_prefill_params& params, const QueryTile& tile,
                                                 int32_t query) {
  const int32_t token = query / tile.group, h = tile.head * tile.group + query - token * tile.group;
  return params.qkv + token * qkv_width(cache) + h * static_cast<int64_t>(cache.head_dim);
}
__device__ __forceinline__ float* output_of(const fkv_cache& cache, const fkv_prefill_params& params, const QueryTile& tile,
                                            int32_t query) {
  const int32_t token = query / tile.group, h = tile.head * tile.group + query - token * tile.group;
  return params.out + (token * static_cast<int64_t>(cache.n_q_heads) + h) * cache.head_dim;
}

// out[0]: both rounded to T; out[1], of two parts: what the rounding left, rounded.
template <class T, int kParts>
__device__ __forceinline__ void split2(uint32_t (&out)[kParts], float low, float high) {
  out[0] = pack2<T>(low, high);
  if constexpr (kParts == 2) {
    const float2 kept = unpack2<T>(out[0]);
    out[1] = pack2<T>(low - kept.x, high - kept.y);
  }
}

// Rows of q into shared memory, [part][panel][kRows] of panels, by threads `thread` of `threads`: rows first_row .. first_row +
// rows − 1. Scaled so that a score is a power of two.
template <class T, int kD, int kParts, int kRows>
__device__ __forceinline__ void load_queries(char* to, const fkv_cache& cache, const fkv_prefill_params& params,
                                             const QueryTile& tile, int first_row, int rows, int thread, int threads) {
  constexpr int kPieces = kPanels<kD> * kPanel / 8;
  const float scale = cache.attention_scale * 1.4426950408889634f;
  for (int i = thread; i < rows * kPieces; i += threads) {
    const int row = first_row + i / kPieces, piece = i % kPieces;
    const Eight q = piece * 8 < cache.head_dim ? load8(query_in(cache, params, tile, tile.at(row)) + piece * 8) : Eight{};
    uint4 parts[kParts];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t two[kParts];
      split2<T, kParts>(two, q.v[2 * j] * scale, q.v[2 * j + 1] * scale);
#pragma unroll
      for (int part = 0; part < kParts; ++part) reinterpret_cast<uint32_t*>(&parts[part])[j] = two[part];
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      char* panel = to + (part * kPanels<kD> + piece / 8) * kRows * kRowBytes;
      *reinterpret_cast<uint4*>(panel + panel_offset(row, piece % 8)) = parts[part];
    }
  }
}

// ---- softmax of a thread's two rows ----

struct Rows {
  int32_t position[2];
  float maximum[2] = {-INFINITY, -INFINITY};  // of the scores so far
  float total[2] = {};                        // this thread's share of Σ 2^(score − maximum)
};

// Scores of keys that a row does not see become −∞.
template <int n>
__device__ __forceinline__ void hide(float (&scores)[n], const Rows& rows, int32_t first) {
  const int32_t column = first + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if (column + i / 4 * 8 + i % 2 > rows.position[i / 2 % 2]) scores[i] = -INFINITY;
  }
}

__device__ __forceinline__ float power(float exponent) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(exponent));
  return out;
}

// Scores become weights under the maximum of all keys so far; fade: what sums under the maximum before are to be multiplied by. A
// block that a row does not see at all leaves its state as it was, and its fade is 1.
template <int n>
__device__ __forceinline__ void weigh(float (&scores)[n], Rows& rows, float (&fade)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float best = rows.maximum[r];
#pragma unroll
    for (int i = 2 * r; i < n; i += 4) best = fmaxf(best, fmaxf(scores[i], scores[i + 1]));
    best = fmaxf(best, __shfl_xor_sync(kAllLanes, best, 1));
    best = fmaxf(best, __shfl_xor_sync(kAllLanes, best, 2));
    fade[r] = power(rows.maximum[r] - best);
    float even = 0.0f, odd = 0.0f;
#pragma unroll
    for (int i = 2 * r; i < n; i += 4) {
      scores[i] = power(scores[i] - best);
      scores[i + 1] = power(scores[i + 1] - best);
      even += scores[i];
      odd += scores[i + 1];
    }
    rows.maximum[r] = best;
    rows.total[r] = fmaf(rows.total[r], fade[r], even + odd);
  }
}

// Weights as the A fragments of products over 16 keys each.
template <class T, int kParts, int n>
__device__ __forceinline__ void pack_weights(uint32_t (&packed)[kParts][n / 8][4], const float (&weights)[n]) {
#pragma unroll
  for (int i = 0; i < n; i += 2) {
    uint32_t two[kParts];
    split2<T, kParts>(two, weights[i], weights[i + 1]);
#pragma unroll
    for (int part = 0; part < kParts; ++part) packed[part][i / 8][i / 2 % 4] = two[part];
  }
}

// ---- what nobody may see ----

// In a block with keys that some row of the tile does not see, their weight of zero would turn a V that is not finite into NaN.
// Such values become zero here, and `spoilt` [panels·64] gets the first position that had one in each channel: rows from there on
// end as NaN.
template <class T, int kD>
__device__ __forceinline__ void clear_spoilt(char* values, int32_t* spoilt, int32_t first, int thread, int threads) {
  constexpr bool kBf16 = Stored<T>::kDtype == FKV_BF16;
  constexpr uint32_t kExponents = kBf16 ? 0x7f807f80u : 0x7c007c00u, kOne = kBf16 ? 0x00800080u : 0x04000400u;
  for (int i = thread; i < kTileBytes<kD> / 16; i += threads) {
    uint4* place = reinterpret_cast<uint4*>(values) + i;
    uint4 piece = *place;
    // An exponent of all ones carries into the sign.
    const auto bad = [](uint32_t two) { return (((two & kExponents) + kOne) & 0x80008000u) != 0; };
    if (!bad(piece.x) && !bad(piece.y) && !bad(piece.z) && !bad(piece.w)) continue;
    const int panel = i / 8 / kBlockKeys<kD>, row = i / 8 % kBlockKeys<kD>, c = panel * kPanel + ((i % 8) ^ (row & 7)) * 8;
    T* each = reinterpret_cast<T*>(&piece);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (isfinite(to_f32(each[j]))) continue;
      each[j] = from_f32<T>(0.0f);
      atomicMin(spoilt + c + j, first + row);
    }
    *place = piece;
  }
}

// ---- outputs ----

// sums [n]: eight channels after eight, of the thread's two rows, which are `row` and `row` + 8 of the tile.
template <int n>
__device__ __forceinline__ void store_outputs(const float (&sums)[n], Rows& rows, const int32_t* spoilt, const fkv_cache& cache,
                                              const fkv_prefill_params& params, const QueryTile& tile, int row) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float total = rows.total[r];
    total += __shfl_xor_sync(kAllLanes, total, 1);
    total += __shfl_xor_sync(kAllLanes, total, 2);
    const float share = 1.0f / total;
    if (tile.first + row + 8 * r > tile.last) continue;
    float* to = output_of(cache, params, tile, tile.first + row + 8 * r);
#pragma unroll
    for (int i = 2 * r; i < n; i += 4) {
      const int32_t c = i / 4 * 8 + 2 * (threadIdx.x % 4);
      if (c >= cache.head_dim) continue;
      const int2 from = *reinterpret_cast<const int2*>(spoilt + c);
      *reinterpret_cast<float2*>(to + c) = {rows.position[r] >= from.x ? NAN : sums[i] * share,
                                            rows.position[r] >= from.y ? NAN : sums[i + 1] * share};
    }
  }
}

}  // namespace fkv
