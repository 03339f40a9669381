// prefill_tile.cpp: the inner loops of prefill attention. Six queries by one to four vectors of keys (scores) or channels (values) stay in
// registers. A query's sums do not depend on its place in the tile or on its neighbours: a score adds products over ascending d, an output
// channel adds them over ascending keys, and every query runs through the same code, a lone one beside five that are thrown away.
// floor: 2·d multiply-adds for each query and key at or before it, at the FMA rate.
#include "prefill_tile.h"

#include <algorithm>

#include "math.h"

namespace fkv {
namespace {

constexpr int kStep = kTileStep;
constexpr int kBlockVecs = kBlockKeys / kLanes;
constexpr float kNever = -__builtin_inff();  // score of no key

// Transposes 16 × 16 floats between rows of the given strides.
FKV_INLINE void transpose(float* to, int64_t to_stride, const float* from, int64_t from_stride) {
  const veci low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  vec a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = StoredF32::load(from + i * from_stride);
  // Four perfect shuffles: each interleaves row i with row i + 8, and four of them send element (i, j) to (j, i).
#pragma GCC unroll 4
  for (int stage = 0; stage < 4; ++stage) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      b[2 * i] = __builtin_shuffle(a[i], a[i + 8], low);
      b[2 * i + 1] = __builtin_shuffle(a[i], a[i + 8], low + 8);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = b[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) store_vec(to + i * to_stride, a[i]);
}

// scores[j][·] = q[j] · K for kStep queries and C vectors of keys from vector `v` on.
template <int C>
FKV_INLINE void score_keys(float* scores, const float* q, int64_t width, const float* keys, int32_t head_dim, int v) {
  vec sums[kStep][C] = {};
  for (int32_t c = 0; c < head_dim; ++c) {
    vec k[C];
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) k[i] = StoredF32::load(keys + c * kBlockKeys + (v + i) * kLanes);
#pragma GCC unroll 6
    for (int j = 0; j < kStep; ++j) {
      const float x = q[j * width + c];
#pragma GCC unroll 4
      for (int i = 0; i < C; ++i) sums[j][i] += x * k[i];
    }
  }
#pragma GCC unroll 6
  for (int j = 0; j < kStep; ++j) {
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) store_vec(scores + j * kBlockKeys + (v + i) * kLanes, sums[j][i]);
  }
}

// sums[j] = sums[j]·fade[j] + Σ weights[j][t]·V[t] over keys t < n[j], for kStep queries and C vectors of channels from c on.
template <int C>
FKV_INLINE void weigh_values(float* sums, const float* fade, const float* weights, const float* values, int64_t width, int64_t c,
                             const int32_t* n, int32_t shared) {
  vec total[kStep][C];
#pragma GCC unroll 6
  for (int j = 0; j < kStep; ++j) {
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) total[j][i] = StoredF32::load(sums + j * width + c + i * kLanes) * fade[j];
  }
  for (int32_t t = 0; t < shared; ++t) {
    vec v[C];
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) v[i] = StoredF32::load(values + t * width + c + i * kLanes);
#pragma GCC unroll 6
    for (int j = 0; j < kStep; ++j) {
      const float weight = weights[j * kBlockKeys + t];
#pragma GCC unroll 4
      for (int i = 0; i < C; ++i) total[j][i] += weight * v[i];
    }
  }
#pragma GCC unroll 6
  for (int j = 0; j < kStep; ++j) {
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) {
      // Keys that only the later queries of the step see: the diagonal.
      for (int32_t t = shared; t < n[j]; ++t) {
        total[j][i] += weights[j * kBlockKeys + t] * StoredF32::load(values + t * width + c + i * kLanes);
      }
      store_vec(sums + j * width + c + i * kLanes, total[j][i]);
    }
  }
}

// One query's scores of a block, of which the first n are its to see → weights; returns their sum. `maximum` becomes that of all keys.
FKV_INLINE float softmax_block(float* scores, int32_t n, float& maximum) {
  vec score[kBlockVecs];
  vec best = vec_of(kNever);
#pragma GCC unroll 4
  for (int i = 0; i < kBlockVecs; ++i) {
    const veci key = veci{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + static_cast<int32_t>(i * kLanes);
    score[i] = StoredF32::load(scores + i * kLanes);
    score[i] = key < n ? score[i] : vec_of(kNever);
    best = score[i] > best ? score[i] : best;
  }
  maximum = std::max(maximum, max_lanes(best));
  vec sum{};
#pragma GCC unroll 4
  for (int i = 0; i < kBlockVecs; ++i) {
    const vec weight = exp_vec(score[i] - maximum);
    store_vec(scores + i * kLanes, weight);
    sum += weight;
  }
  return sum_lanes(sum);
}

template <int C>
FKV_INLINE void attend_block_by(const QueryTile& tile, const KeyBlock& block, int32_t first_key) {
  for (int32_t q0 = 0; q0 < tile.n_queries; q0 += kStep) {
    alignas(64) float scores[kStep * kBlockKeys];
    alignas(64) float fade[kLanes] = {};
    float added[kStep];
    int32_t n[kStep];
    for (int j = 0; j < kStep; ++j) {
      const int32_t position = tile.position + std::min(q0 + j, tile.n_queries - 1) / tile.group;
      n[j] = std::clamp(position + 1 - first_key, 0, kBlockKeys);
    }
    if (n[kStep - 1] == 0) continue;  // positions ascend: no query of the step sees this block
#pragma GCC unroll 4
    for (int v = 0; v < kBlockVecs; v += C) score_keys<C>(scores, tile.q + q0 * tile.width, tile.width, block.keys, tile.head_dim, v);
    for (int j = 0; j < kStep; ++j) {
      fade[j] = tile.maximum[q0 + j];
      added[j] = softmax_block(scores + j * kBlockKeys, n[j], tile.maximum[q0 + j]);
      fade[j] -= tile.maximum[q0 + j];
    }
    store_vec(fade, exp_vec(StoredF32::load(fade)));  // what earlier sums fade by, now that the maximum may be higher
    for (int j = 0; j < kStep; ++j) tile.total[q0 + j] = tile.total[q0 + j] * fade[j] + added[j];
    float* sums = tile.sums + q0 * tile.width;
    int64_t c = 0;
    for (; c + C * kLanes <= tile.width; c += C * kLanes) weigh_values<C>(sums, fade, scores, block.values, tile.width, c, n, n[0]);
    for (; c < tile.width; c += kLanes) weigh_values<1>(sums, fade, scores, block.values, tile.width, c, n, n[0]);
  }
}

// Register tiles for 32 registers of 16 lanes, and for sixteen registers of fewer; the sums are the same.
FKV_VECTOR void attend_block_wide(const QueryTile& tile, const KeyBlock& block, int32_t first_key) {
  attend_block_by<4>(tile, block, first_key);
}
FKV_VECTOR void attend_block_narrow(const QueryTile& tile, const KeyBlock& block, int32_t first_key) {
  attend_block_by<1>(tile, block, first_key);
}

bool has_wide_registers() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

}  // namespace

void clear_tile(const QueryTile& tile) {
  const int64_t rows = (tile.n_queries + kStep - 1) / kStep * kStep;
  std::fill(tile.sums, tile.sums + rows * tile.width, 0.0f);
  std::fill(tile.maximum, tile.maximum + rows, kNever);
  std::fill(tile.total, tile.total + rows, 0.0f);
}

FKV_VECTOR void load_block(const KeyBlock& block, const char* const* keys, const char* const* values, int32_t n, int64_t width,
                           int32_t head_dim, int32_t dtype) {
  for (int32_t t = 0; t < n; ++t) {
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t left = head_dim - c;
      store_vec(block.rows + t * width + c, left < kLanes ? load_vec_tail(keys[t], c, dtype, left) : load_vec(keys[t], c, dtype));
      store_vec(block.values + t * width + c, left < kLanes ? load_vec_tail(values[t], c, dtype, left) : load_vec(values[t], c, dtype));
    }
  }
  for (int32_t t = 0; t < n; t += kLanes) {
    for (int64_t c = 0; c < width; c += kLanes) transpose(block.keys + c * kBlockKeys + t, kBlockKeys, block.rows + t * width + c, width);
  }
}

void attend_block(const QueryTile& tile, const KeyBlock& block, int32_t first_key) {
  static const bool wide = has_wide_registers();
  if (wide) attend_block_wide(tile, block, first_key);
  else attend_block_narrow(tile, block, first_key);
}

FKV_VECTOR void finish_query(float* out, const QueryTile& tile, int32_t query) {
  const float* sums = tile.sums + query * tile.width;
  for (int64_t c = 0; c < tile.head_dim; c += kLanes) {
    const vec mean = StoredF32::load(sums + c) / tile.total[query];
    if (c + kLanes <= tile.head_dim) store_vec(out + c, mean);
    else store_vec_tail(out + c, mean, tile.head_dim - c);
  }
}

}  // namespace fkv
