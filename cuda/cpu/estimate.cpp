// estimate.cpp: page scores. An upper bound of q·k over a page's keys, from the least and greatest value of each
// channel. Source: Quest §3; pooling over the group: FreeKV §4.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <vector>

#include "math.h"
#include "scratch.h"
#include "../serves.h"
#include "stages.h"

namespace fkv {
namespace {

constexpr int64_t kTaskPages = 64;    // pages that one task scores
constexpr int64_t kBlockPages = 256;  // pages whose softmax terms are summed before the tree
constexpr int32_t kMaxHeads = 4;      // query heads that share one pass over the digests
constexpr int64_t kAhead = 4;         // a digest is fetched this many pages before it is scored: blocks lie anywhere

// One KV head of one row.
struct Unit {
  const float* q;         // [G][d]
  const int32_t* blocks;  // block of each candidate
  float* raw;             // [G][pad_lanes(n)] scores of each query head
  float* out;             // [n]
  int64_t n;              // candidates
  int64_t first_task;
  int32_t head, first_page;
  int32_t position;       // of q
};

// raw[h][p] for the pages begin..end of `heads` query heads. max(q·min, q·max) is q times the end that q's sign picks,
// as min <= max.
template <class Stored, int heads>
FKV_INLINE void score_pages(const fkv_cache& cache, const Unit& unit, int32_t layer, const float* q, float* raw,
                            int64_t begin, int64_t end) {
  const int64_t d = cache.head_dim, whole = d / kLanes * kLanes, pitch = pad_lanes(unit.n);
  const int64_t digest_bytes = 2 * d * static_cast<int64_t>(sizeof(typename Stored::Element));
  for (int64_t p = begin; p < end; ++p) {
    const char* ahead =
        frame_address(cache.digests, unit.blocks[std::min(p + kAhead, end - 1)], layer, unit.head, 0, 0);
    for (int64_t i = 0; i < digest_bytes; i += 64) __builtin_prefetch(ahead + i);
    const char* digest = frame_address(cache.digests, unit.blocks[p], layer, unit.head, 0, 0);
    const auto* lo = reinterpret_cast<const typename Stored::Element*>(digest);
    const auto* hi = reinterpret_cast<const typename Stored::Element*>(digest + cache.digests.kv);
    vec sum[heads] = {};
    int64_t c = 0;
    for (; c < whole; c += kLanes) {
      const vec least = Stored::load(lo + c), greatest = Stored::load(hi + c);
#pragma GCC unroll 4
      for (int h = 0; h < heads; ++h) {
        const vec x = StoredF32::load(q + h * d + c);
        sum[h] += x * (x > 0.0f ? greatest : least);
      }
    }
    if (c < d) {
      const vec least = Stored::load_tail(lo + c, d - c), greatest = Stored::load_tail(hi + c, d - c);
#pragma GCC unroll 4
      for (int h = 0; h < heads; ++h) {
        const vec x = StoredF32::load_tail(q + h * d + c, d - c);
        sum[h] += x * (x > 0.0f ? greatest : least);
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < heads; ++h) raw[h * pitch + p] = cache.score_scale * sum_lanes(sum[h]);
  }
}

template <class Stored>
FKV_INLINE void score_group(const fkv_cache& cache, const Unit& unit, int32_t layer, int64_t begin, int64_t end) {
  const int32_t group = cache.n_q_heads / cache.n_kv_heads;
  for (int32_t h = 0; h < group; h += kMaxHeads) {
    const float* q = unit.q + static_cast<int64_t>(h) * cache.head_dim;
    float* raw = unit.raw + h * pad_lanes(unit.n);
    switch (std::min(group - h, kMaxHeads)) {
      case 1:
        score_pages<Stored, 1>(cache, unit, layer, q, raw, begin, end);
        break;
      case 2:
        score_pages<Stored, 2>(cache, unit, layer, q, raw, begin, end);
        break;
      case 3:
        score_pages<Stored, 3>(cache, unit, layer, q, raw, begin, end);
        break;
      default:
        score_pages<Stored, 4>(cache, unit, layer, q, raw, begin, end);
        break;
    }
  }
}

FKV_VECTOR void score_task(const fkv_cache& cache, const Unit& unit, int32_t layer, int64_t begin, int64_t end) {
  if (cache.dtype == FKV_F32)
    score_group<StoredF32>(cache, unit, layer, begin, end);
  else if (cache.dtype == FKV_BF16)
    score_group<StoredBf16>(cache, unit, layer, begin, end);
  else
    score_group<StoredF16>(cache, unit, layer, begin, end);
}

// Sum of any number of terms in the tree that pairs neighbours, then pairs of pairs, …; what has no partner waits for
// the end.
class PairwiseSum {
 public:
  FKV_INLINE void add(float value) {
    int level = 0;
    for (uint32_t n = count_++; n & 1u; n >>= 1) value = pending_[level++] + value;
    pending_[level] = value;
  }
  FKV_INLINE float total() const {
    float sum = 0;
    for (int level = 0; count_ >> level != 0; ++level) {
      if (count_ >> level & 1u) sum = pending_[level] + sum;
    }
    return sum;
  }

 private:
  uint32_t count_ = 0;
  float pending_[32];
};

// raw[0..n) → its softmax's numerators, in place; returns their sum. A page whose score is NaN stays NaN and counts for
// nothing, so that one bad page does not cost the others their ranks; raw is padded with NaN to whole vectors.
FKV_INLINE float exponentiate(float* raw, int64_t n) {
  vec best = vec_of(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < n; i += kLanes) {
    const vec x = StoredF32::load(raw + i);
    best = x > best ? x : best;
  }
  const vec top = vec_of(max_lanes(best));
  PairwiseSum sums;
  for (int64_t block = 0; block < n; block += kBlockPages) {
    vec sum{};
    for (int64_t i = block; i < std::min(n, block + kBlockPages); i += kLanes) {
      const vec x = StoredF32::load(raw + i);
      const vec e = exp_vec(x == top ? vec{} : x - top);  // an infinite best is still one of the best
      sum += e == e ? e : vec{};
      store_vec(raw + i, e);
    }
    sums.add(sum_lanes(sum));
  }
  return sums.total();
}

// Pools the group's raw scores into unit.out.
FKV_VECTOR void pool(const fkv_cache& cache, const Unit& unit, int32_t layer) {
  const int32_t group = cache.n_q_heads / cache.n_kv_heads;
  const int64_t pitch = pad_lanes(unit.n);
  for (int32_t h = 0; h < group && cache.pooling == 0; ++h) {
    float* raw = unit.raw + h * pitch;
    std::fill(raw + unit.n, raw + pitch, std::numeric_limits<float>::quiet_NaN());
    const vec factor = vec_of(1.0f / exponentiate(raw, unit.n));
    for (int64_t i = 0; i < pitch; i += kLanes) store_vec(raw + i, StoredF32::load(raw + i) * factor);
  }
  for (int64_t i = 0; i < unit.n; ++i) {
    float sum = 0;
    for (int32_t h = 0; h < group; ++h) sum += unit.raw[h * pitch + i];
    unit.out[i] = sum / static_cast<float>(group);
  }
  const fkv_forced* forced = cache.forced;
  if (forced == nullptr || forced->period <= 0) return;
  for (int64_t i = 0; i < unit.n; ++i)
    unit.out[i] = forced_score(*forced, unit.position, layer, unit.head, unit.first_page + static_cast<int32_t>(i));
}

// Digests are found by block: a page without one would be read from outside the pool.
void require_blocks(const int32_t* blocks, int64_t n) {
  int32_t least = 0;
  for (int64_t i = 0; i < n; ++i) least = std::min(least, blocks[i]);
  if (least < 0) throw std::runtime_error("a candidate page has no host block");
}

// The heads that have more candidates than they may select; `raw` and `first_task` are still to be set.
std::vector<Unit> units_of(const fkv_cache& cache, const fkv_workspace& workspace, const float* qkv, int32_t layer,
                           int32_t stage, int32_t n_rows) {
  std::vector<Unit> units;
  for (int32_t i = 0; i < n_rows; ++i) {
    const fkv_row& row = cache.rows[i];
    const fkv_lane* lane = lane_of(cache, row);
    if (lane == nullptr) continue;
    const int64_t n = n_candidates(*lane, target_length(row, stage), cache.page_size);
    if (n <= lane->k) continue;
    const int32_t* blocks = cache.block_table + static_cast<int64_t>(row.sequence) * cache.max_pages + lane->sink_pages;
    bool required = false;
    for (int32_t h = 0; h < cache.n_kv_heads; ++h) {
      const Query query = serves(cache, row, *lane, layer, i, h, stage);
      if (query == Query::none) continue;
      if (!required) require_blocks(blocks, n);
      required = true;
      const float* q =
          query == Query::current ? group_query(cache, qkv, i, h) : group_query_before(cache, *lane, layer, h);
      units.push_back({q, blocks, nullptr, workspace.scores + miss_list(cache, i, h) * cache.max_pages, n, 0, h,
                       lane->sink_pages, query_position(row, query, stage)});
    }
  }
  return units;
}

}  // namespace

void estimate_rows(Context& context, const fkv_cache& cache, const fkv_workspace& workspace, const float* qkv,
                   int32_t layer, int32_t stage, int32_t n_rows) {
  std::vector<Unit> units = units_of(cache, workspace, qkv, layer, stage, n_rows);
  if (units.empty()) return;
  int64_t n_raw = 0, n_tasks = 0;
  for (Unit& unit : units) {
    unit.first_task = n_tasks;
    n_tasks += (unit.n + kTaskPages - 1) / kTaskPages;
    n_raw += pad_lanes(unit.n) * (cache.n_q_heads / cache.n_kv_heads);
  }
  thread_local Scratch memory;
  float* raw = memory.floats(static_cast<size_t>(n_raw));
  for (Unit& unit : units) {
    unit.raw = raw;
    raw += pad_lanes(unit.n) * (cache.n_q_heads / cache.n_kv_heads);
  }
  context.parallel(n_tasks, 4, [&](int64_t begin, int64_t end) {
    const auto after = [](int64_t task, const Unit& unit) { return task < unit.first_task; };
    auto unit = std::upper_bound(units.begin(), units.end(), begin, after) - 1;
    for (int64_t task = begin; task < end; ++task) {
      if (unit + 1 != units.end() && task >= (unit + 1)->first_task) ++unit;
      const int64_t page = (task - unit->first_task) * kTaskPages;
      score_task(cache, *unit, layer, page, std::min(unit->n, page + kTaskPages));
    }
  });
  context.parallel(static_cast<int64_t>(units.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pool(cache, units[i], layer);
  });
}

}  // namespace fkv

using namespace fkv;

int32_t fkv_estimate(const fkv_cache* cache, const fkv_workspace* workspace, const float* qkv, int32_t layer,
                     int32_t stage, int32_t n_rows, fkv_stream* stream) {
  if (const int32_t status = require_tables("fkv_estimate", cache, layer, n_rows)) return status;
  if (const int32_t status = require_workspace("fkv_estimate", workspace)) return status;
  if (const int32_t status = require_scoring("fkv_estimate", *cache, stage, qkv)) return status;
  return launch(stream, "fkv_estimate",
                [cache = *cache, workspace = *workspace, qkv, layer, stage, n_rows](Context& context) {
                  estimate_rows(context, cache, workspace, qkv, layer, stage, n_rows);
                });
}
