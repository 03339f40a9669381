// serves.h: which heads a retrieval serves, with which query, over the candidates of which length. Every stage of a
// retrieval asks here.
#pragma once
#include <cstdint>

#include "frames.h"

namespace fkv {

// Whose q a head is served with; nobody's: the head is not served.
enum class Query { none, current, previous };

// The length whose candidates `stage` selects from. FIRST's row holds the position of the token to come.
FKV_INLINE int32_t target_length(const fkv_row& row, int32_t stage) {
  return row.position + (stage == FKV_NEXT ? 2 : 1);
}

// How many pages a lane may select from at `length`; they start at sink_pages.
FKV_INLINE int32_t n_candidates(const fkv_lane& lane, int32_t length, int32_t page_size) {
  return candidate_end(lane, length, page_size) - lane.sink_pages;
}

// The page that becomes a candidate with `length`, or −1. It is still in its window frame: the page that will overwrite
// it has no token yet.
FKV_INLINE int32_t joining_page(const fkv_lane& lane, int32_t length, int32_t page_size) {
  const int32_t page = length / page_size - lane.window_pages - 1;
  return length % page_size == 0 && page >= lane.sink_pages ? page : -1;
}

FKV_INLINE bool selects(const fkv_lane& lane) { return lane.k > 0 && !lane.attend_all; }

// A null pointer where the row is empty.
FKV_INLINE const fkv_lane* lane_of(const fkv_cache& cache, const fkv_row& row) {
  return row.sequence < 0 ? nullptr : &cache.lanes[row.sequence];
}

FKV_INLINE uint8_t* flags_of(const fkv_cache& cache, int32_t layer, int32_t row_index) {
  return cache.flags + (static_cast<int64_t>(layer) * cache.max_rows + row_index) * cache.n_kv_heads;
}

FKV_INLINE Query serves(const fkv_cache& cache, const fkv_row& row, const fkv_lane& lane, bool flagged, int32_t stage) {
  if (!selects(lane)) return Query::none;
  if (stage == FKV_FIRST) return row.speculation == FKV_SPECULATE_NEXT ? Query::previous : Query::none;
  if (stage == FKV_NOW) {
    if (flagged) return Query::current;
    return row.speculation == FKV_SPECULATE_LAZY ? Query::previous : Query::none;
  }
  if (row.speculation != FKV_SPECULATE_NEXT) return Query::none;
  const bool all = row.prefetch > 0 || joining_page(lane, target_length(row, stage), cache.page_size) >= 0;
  return all || !flagged ? Query::previous : Query::none;
}
// The same by the flag that the check has stored.
FKV_INLINE Query serves(const fkv_cache& cache, const fkv_row& row, const fkv_lane& lane, int32_t layer,
                        int32_t row_index, int32_t head, int32_t stage) {
  return serves(cache, row, lane, flags_of(cache, layer, row_index)[head] != 0, stage);
}

// How many ranks after the selection NEXT may fetch.
FKV_INLINE int32_t ranks_ahead(const fkv_row& row, const fkv_lane& lane, int32_t candidates, int32_t stage) {
  if (stage != FKV_NEXT || lane.resident || candidates <= lane.k || row.prefetch <= 0) return 0;
  return row.prefetch < candidates - lane.k ? row.prefetch : candidates - lane.k;
}

// Whether this service's pages count as selected and as hits: a flagged head that NEXT serves again, for a page that joins or for
// the prefetch, selected with the same q before.
FKV_INLINE bool counts_selection(const fkv_cache& cache, int32_t layer, int32_t row_index, int32_t head, int32_t stage) {
  return stage != FKV_NEXT || flags_of(cache, layer, row_index)[head] == 0;
}

// ---- forced selections (fkv_forced) ----

FKV_INLINE uint32_t mixed(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}
FKV_INLINE uint32_t mixed(uint32_t a, uint32_t b, uint32_t c) { return mixed(mixed(mixed(a) + b) + c); }

// Instead of the check of a row with THRESHOLD, where forced->flagged > 0.
FKV_INLINE bool forced_flag(const fkv_forced& forced, const fkv_row& row, int32_t layer, int32_t head) {
  return static_cast<int32_t>(mixed(row.position, layer, head) % 1024) < forced.flagged;
}
// The position whose q a head is served with.
FKV_INLINE int32_t query_position(const fkv_row& row, Query query, int32_t stage) {
  return query == Query::current || stage == FKV_NEXT ? row.position : row.position - 1;
}
// Instead of `page`'s pooled score under the q of `position`, where forced->period > 0.
FKV_INLINE float forced_score(const fkv_forced& forced, int32_t position, int32_t layer, int32_t head, int32_t page) {
  const uint32_t own = mixed(layer, head, page), drawn = (position + own % forced.period) / forced.period;
  return static_cast<float>(mixed(own + drawn) >> 8) * 0x1p-24f;
}

// Floats of one row of qkv.
FKV_INLINE int64_t qkv_width(const fkv_cache& cache) {
  return static_cast<int64_t>(cache.n_q_heads + 2 * cache.n_kv_heads) * cache.head_dim;
}

// First q of KV head `head`'s group: the group's heads follow, head_dim floats each.
FKV_INLINE const float* group_query(const fkv_cache& cache, const float* qkv, int32_t row_index, int32_t head) {
  const int64_t group = cache.n_q_heads / cache.n_kv_heads;
  return qkv + row_index * qkv_width(cache) + head * group * cache.head_dim;
}
FKV_INLINE const float* group_query_before(const fkv_cache& cache, const fkv_lane& lane, int32_t layer, int32_t head) {
  const int64_t group = cache.n_q_heads / cache.n_kv_heads;
  return lane.q_prev + (static_cast<int64_t>(layer) * cache.n_q_heads + head * group) * cache.head_dim;
}

// Index of the miss list of a row's head; times max_slots it is the start of its entries.
FKV_INLINE int64_t miss_list(const fkv_cache& cache, int32_t row_index, int32_t head) {
  return static_cast<int64_t>(row_index) * cache.n_kv_heads + head;
}

}  // namespace fkv
