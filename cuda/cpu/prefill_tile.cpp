// prefill_tile.cpp: the inner loops of prefill attention. Six queries by some vectors of keys (scores) or channels
// (values) stay in registers. A query's sums do not depend on its place in the tile or on its neighbours: a score adds
// products over ascending d, an output channel adds them over ascending keys, and every query runs through the same
// code, a lone one beside five that are thrown away.
//
// floor: 2·d multiply-adds for each query and key at or before it, at the FMA rate.
#include "prefill_tile.h"

#include <algorithm>

#include "lanes.h"

namespace fkv {
namespace {

constexpr int kStep = kTileStep;
constexpr float kNever = -__builtin_inff();  // score of no key

// B: bytes of a vector.
template <int B>
struct Kernel {
  typedef Lanes<B> L;
  typedef typename L::F F;
#if defined(__x86_64__)
  static constexpr int kVectors = B == 64 ? 4 : 2;  // kStep of them fit 32 registers, or 16
#else
  static constexpr int kVectors = 4;
#endif

  // scores[j][t] = q[j] · K[t] for kStep queries and kVectors vectors of keys from t on.
  static FKV_INLINE void score(float* scores, const float* q, int64_t width, const float* keys, int32_t head_dim,
                               int t) {
    F sums[kStep][kVectors] = {};
    for (int32_t c = 0; c < head_dim; ++c) {
      F k[kVectors];
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) k[i] = L::load(keys + c * kBlockKeys + t + i * L::n);
#pragma GCC unroll 6
      for (int j = 0; j < kStep; ++j) {
        const float x = q[j * width + c];
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) sums[j][i] += x * k[i];
      }
    }
#pragma GCC unroll 6
    for (int j = 0; j < kStep; ++j) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) L::store(scores + j * kBlockKeys + t + i * L::n, sums[j][i]);
    }
  }

  // sums[j] = sums[j]·fade[j] + Σ weights[j][t]·V[t] over keys t < n[j], ascending, for kStep queries and C vectors of
  // channels from c on.
  template <int C>
  static FKV_INLINE void weigh(float* sums, const float* fade, const float* weights, const float* values, int64_t width,
                               int64_t c, const int32_t* n) {
    const int32_t shared = n[0];  // the least: positions ascend
    F total[kStep][C];
#pragma GCC unroll 6
    for (int j = 0; j < kStep; ++j) {
#pragma GCC unroll 4
      for (int i = 0; i < C; ++i) total[j][i] = L::load(sums + j * width + c + i * L::n) * fade[j];
    }
    for (int32_t t = 0; t < shared; ++t) {
      F v[C];
#pragma GCC unroll 4
      for (int i = 0; i < C; ++i) v[i] = L::load(values + t * width + c + i * L::n);
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
          total[j][i] += weights[j * kBlockKeys + t] * L::load(values + t * width + c + i * L::n);
        }
        L::store(sums + j * width + c + i * L::n, total[j][i]);
      }
    }
  }

  // One query's scores of a block, of which the first n are its to see → weights; returns their sum. `maximum` becomes
  // that of all keys.
  static FKV_INLINE float softmax(float* scores, int32_t n, float& maximum) {
    for (int32_t t = n; t < kBlockKeys; ++t) scores[t] = kNever;
    F best = F{} + kNever, sum{};
#pragma GCC unroll 4
    for (int t = 0; t < kBlockKeys; t += L::n) {
      const F score = L::load(scores + t);
      best = score > best ? score : best;
    }
    maximum = std::max(maximum, max_lanes(best));
#pragma GCC unroll 4
    for (int t = 0; t < kBlockKeys; t += L::n) {
      const F weight = exp_lanes(L::load(scores + t) - maximum);
      L::store(scores + t, weight);
      sum += weight;
    }
    return sum_lanes(sum);
  }

  static FKV_INLINE void attend(const QueryTile& tile, const KeyBlock& block, int32_t first_key) {
    for (int32_t q0 = 0; q0 < tile.n_queries; q0 += kStep) {
      alignas(64) float scores[kStep * kBlockKeys];
      alignas(64) float fade[kLanes] = {};
      float added[kStep];
      int32_t n[kStep];
      for (int j = 0; j < kStep; ++j) {
        const int32_t position = tile.position + std::min(q0 + j, tile.n_queries - 1) / tile.group;
        n[j] = std::clamp(position + 1 - first_key, 0, kBlockKeys);
      }
      if (n[kStep - 1] == 0) continue;  // no query of the step sees this block
#pragma GCC unroll 1
      for (int t = 0; t < kBlockKeys; t += kVectors * L::n) {
        score(scores, tile.q + q0 * tile.width, tile.width, block.keys, tile.head_dim, t);
      }
      for (int j = 0; j < kStep; ++j) {
        fade[j] = tile.maximum[q0 + j];
        added[j] = softmax(scores + j * kBlockKeys, n[j], tile.maximum[q0 + j]);
        fade[j] -= tile.maximum[q0 + j];
      }
      // What earlier sums fade by, now that the maximum may be higher.
      for (int j = 0; j < kStep; j += L::n) L::store(fade + j, exp_lanes(L::load(fade + j)));
      for (int j = 0; j < kStep; ++j) tile.total[q0 + j] = tile.total[q0 + j] * fade[j] + added[j];
      float* sums = tile.sums + q0 * tile.width;
      int64_t c = 0;
      for (; c + kVectors * L::n <= tile.width; c += kVectors * L::n) {
        weigh<kVectors>(sums, fade, scores, block.values, tile.width, c, n);
      }
      for (; c < tile.width; c += L::n) weigh<1>(sums, fade, scores, block.values, tile.width, c, n);
    }
  }

  // One stored row as floats, zeros from head_dim to width.
  template <class Stored>
  static FKV_INLINE void widen_row(float* to, const char* from, int64_t width, int32_t head_dim) {
    const typename Stored::Element* row = reinterpret_cast<const typename Stored::Element*>(from);
    int64_t c = 0;
    for (; c + L::n <= head_dim; c += L::n) L::store(to + c, Stored::load(row + c));
    if (c < head_dim) L::store(to + c, Stored::load_half(row + c)), c += L::n;
    for (; c < width; c += L::n) L::store(to + c, F{});
  }

  template <class Stored>
  static FKV_INLINE void load_as(const KeyBlock& block, const char* const* keys, const char* const* values, int32_t n,
                                 int64_t width, int32_t head_dim) {
    for (int32_t t = 0; t < n; ++t) {
      widen_row<Stored>(block.rows + t * width, keys[t], width, head_dim);
      widen_row<Stored>(block.values + t * width, values[t], width, head_dim);
    }
    for (int32_t t = 0; t < n; t += L::n) {
      for (int64_t c = 0; c < width; c += L::n) {
        transpose<B>(block.keys + c * kBlockKeys + t, kBlockKeys, block.rows + t * width + c, width);
      }
    }
  }
  static FKV_INLINE void load(const KeyBlock& block, const char* const* keys, const char* const* values, int32_t n,
                              int64_t width, int32_t head_dim, int32_t dtype) {
    if (dtype == FKV_F32)
      load_as<RowsF32<B>>(block, keys, values, n, width, head_dim);
    else if (dtype == FKV_BF16)
      load_as<RowsBf16<B>>(block, keys, values, n, width, head_dim);
    else
      load_as<RowsF16<B>>(block, keys, values, n, width, head_dim);
  }
};

FKV_TARGET_64 void attend_64(const QueryTile& tile, const KeyBlock& block, int32_t first_key) {
  Kernel<64>::attend(tile, block, first_key);
}
FKV_TARGET_32 void attend_32(const QueryTile& tile, const KeyBlock& block, int32_t first_key) {
  Kernel<32>::attend(tile, block, first_key);
}
void attend_16(const QueryTile& tile, const KeyBlock& block, int32_t first_key) {
  Kernel<16>::attend(tile, block, first_key);
}

FKV_TARGET_64 void load_64(const KeyBlock& block, const char* const* keys, const char* const* values, int32_t n,
                           int64_t width, int32_t head_dim, int32_t dtype) {
  Kernel<64>::load(block, keys, values, n, width, head_dim, dtype);
}
FKV_TARGET_32 void load_32(const KeyBlock& block, const char* const* keys, const char* const* values, int32_t n,
                           int64_t width, int32_t head_dim, int32_t dtype) {
  Kernel<32>::load(block, keys, values, n, width, head_dim, dtype);
}
void load_16(const KeyBlock& block, const char* const* keys, const char* const* values, int32_t n, int64_t width,
             int32_t head_dim, int32_t dtype) {
  Kernel<16>::load(block, keys, values, n, width, head_dim, dtype);
}

}  // namespace

void clear_tile(const QueryTile& tile) {
  const int64_t rows = (tile.n_queries + kStep - 1) / kStep * kStep;
  std::fill(tile.sums, tile.sums + rows * tile.width, 0.0f);
  std::fill(tile.maximum, tile.maximum + rows, kNever);
  std::fill(tile.total, tile.total + rows, 0.0f);
}

void load_block(const KeyBlock& block, const char* const* keys, const char* const* values, int32_t n, int64_t width,
                int32_t head_dim, int32_t dtype) {
  const int bytes = widest_lanes();
  (bytes == 64 ? load_64 : bytes == 32 ? load_32 : load_16)(block, keys, values, n, width, head_dim, dtype);
}

void attend_block(const QueryTile& tile, const KeyBlock& block, int32_t first_key) {
  const int bytes = widest_lanes();
  (bytes == 64 ? attend_64 : bytes == 32 ? attend_32 : attend_16)(tile, block, first_key);
}

void finish_query(float* out, const QueryTile& tile, int32_t query) {
  for (int32_t c = 0; c < tile.head_dim; ++c) out[c] = tile.sums[query * tile.width + c] / tile.total[query];
}

}  // namespace fkv
