// check.cpp: which heads must select again before attention, because this token's q has turned away from the last
// one's. Source: FreeKV (fine-grained correction).
#include <cmath>

#include "math.h"
#include "../serves.h"
#include "stages.h"

namespace fkv {
namespace {

FKV_INLINE float cosine(const float* a, const float* b, int64_t n) {
  vec ab{}, aa{}, bb{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const bool whole = i + kLanes <= n;
    const vec x = whole ? StoredF32::load(a + i) : StoredF32::load_tail(a + i, n - i);
    const vec y = whole ? StoredF32::load(b + i) : StoredF32::load_tail(b + i, n - i);
    ab += x * y;
    aa += x * x;
    bb += y * y;
  }
  return sum_lanes(ab) / (std::sqrt(sum_lanes(aa)) * std::sqrt(sum_lanes(bb)));
}

// Mean over the group of cos(q, q_prev), added in head order; NaN where either is zero or not finite.
FKV_VECTOR float mean_cosine(const float* q, const float* before, int32_t group, int64_t head_dim) {
  float sum = 0;
  for (int32_t h = 0; h < group; ++h) sum += cosine(q + h * head_dim, before + h * head_dim, head_dim);
  return sum / static_cast<float>(group);
}

bool flagged(const fkv_cache& cache, const fkv_row& row, const fkv_lane& lane, const float* qkv, int32_t layer,
             int32_t row_index, int32_t head) {
  if (row.correction != FKV_CORRECT_THRESHOLD) return row.correction == FKV_CORRECT_EXACT;
  if (cache.forced != nullptr && cache.forced->flagged > 0) return forced_flag(*cache.forced, row, layer, head);
  const float mean = mean_cosine(group_query(cache, qkv, row_index, head), group_query_before(cache, lane, layer, head),
                                 cache.n_q_heads / cache.n_kv_heads, cache.head_dim);
  return !(mean >= lane.tau[layer]);
}

}  // namespace

void check_rows(const fkv_cache& cache, const float* qkv, int32_t layer, int32_t n_rows) {
  for (int32_t i = 0; i < n_rows; ++i) {
    const fkv_row& row = cache.rows[i];
    const fkv_lane* lane = lane_of(cache, row);
    const bool checks = lane != nullptr && selects(*lane);
    uint8_t* flags = flags_of(cache, layer, i);
    int32_t n_flagged = 0;
    for (int32_t h = 0; h < cache.n_kv_heads; ++h) {
      flags[h] = checks && flagged(cache, row, *lane, qkv, layer, i, h);
      n_flagged += flags[h];
    }
    // A row that always selects with its own q has nothing to correct: its flags are not counted.
    if (!checks || row.speculation == FKV_SPECULATE_NONE) continue;
    add_count(cache.counters[i].heads, cache.n_kv_heads);
    add_count(cache.counters[i].flagged, n_flagged);
  }
}

}  // namespace fkv

using namespace fkv;

int32_t fkv_check(const fkv_cache* cache, const float* qkv, int32_t layer, int32_t n_rows, fkv_stream* stream) {
  if (const int32_t status = require_tables("fkv_check", cache, layer, n_rows)) return status;
  FKV_REQUIRE(qkv != nullptr, FKV_BAD_ARGUMENT, "fkv_check: qkv is null");
  return launch(stream, "fkv_check",
                [cache = *cache, qkv, layer, n_rows](Context&) { check_rows(cache, qkv, layer, n_rows); });
}
