// select.cpp: the k best pages of a head, and its slots as a cache of them: what is at hand stays, what is missing
// replaces what was selected longest ago. Residency changes what is copied, never what is selected.
#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "ranking.h"
#include "../serves.h"
#include "stages.h"

namespace fkv {
namespace {

// A prefetched page may replace one that was not selected for this many lengths, and counts as last used half of them
// ago, so that it neither outlives real selections nor is the first to go.
constexpr int32_t kPrefetchIdle = 8;
constexpr int32_t kPrefetchAge = 4;

// Memory that one thread's heads reuse.
struct Memory {
  Ranking ranking;
  std::vector<int32_t> victims;
};

// One head of one row: its tables, and what became of its pages.
struct Head {
  const fkv_cache& cache;
  const fkv_row& row;
  const fkv_lane& lane;
  int32_t length;          // target length: whose candidates these are
  int32_t joining;         // the candidate that is still in its window frame, or −1
  int32_t* selected_page;  // [k]
  int32_t* selected_slot;  // [k]
  int32_t* slot_page;      // [n_slots]
  int32_t* slot_used;      // [n_slots]
  fkv_miss* misses;        // [max_slots]
  int32_t n_selected = 0, n_misses = 0, n_moved = 0;

  void recall(int32_t page, int32_t slot) {
    const int32_t block = cache.block_table[static_cast<int64_t>(row.sequence) * cache.max_pages + page];
    const int32_t frame = page == joining ? lane_frame_of_window_page(lane, page) : -1;
    misses[n_misses++] = {page, slot, block, frame};
    slot_page[slot] = page;
  }
};

// Ascending pages of the selection; all candidates where they are at most k. `ranking` holds the ranks afterwards.
void choose(Head& head, const float* scores, int32_t candidates, int32_t prefetch, Ranking& ranking) {
  head.n_selected = std::min(candidates, head.lane.k);
  int32_t* pages = head.selected_page;
  if (candidates <= head.lane.k) {
    ranking.clear();
    std::iota(pages, pages + candidates, head.lane.sink_pages);
    return;
  }
  ranking.rank(scores, candidates, head.n_selected, std::min(prefetch, candidates - head.n_selected));
  for (int32_t i = 0; i < head.n_selected; ++i) pages[i] = head.lane.sink_pages + ranking.at(i);
  std::sort(pages, pages + head.n_selected);
}

// Pages that already have a slot keep it. `victims`: the slots outside the selection, in the order of replacement.
void find_hits(Head& head, std::vector<int32_t>& victims) {
  const int32_t* const begin = head.selected_page;
  const int32_t* const end = begin + head.n_selected;
  std::fill_n(head.selected_slot, head.n_selected, -1);
  victims.clear();
  for (int32_t slot = 0; slot < head.lane.n_slots; ++slot) {
    const int32_t* found = std::lower_bound(begin, end, head.slot_page[slot]);
    const bool hit = found != end && *found == head.slot_page[slot];
    if (hit) head.selected_slot[found - begin] = slot;
    if (!hit) victims.push_back(slot);
  }
  const int32_t* used = head.slot_used;
  std::sort(victims.begin(), victims.end(),
            [used](int32_t a, int32_t b) { return used[a] != used[b] ? used[a] < used[b] : a < b; });
}

// The absent pages among the ranks after the selection, each into a slot that is empty or long unused.
void prefetch(Head& head, const Ranking& ranking, const std::vector<int32_t>& victims, size_t next) {
  const int32_t* const slots = head.slot_page;
  const int32_t* const slots_end = slots + head.lane.n_slots;
  for (int32_t rank = head.n_selected; rank < ranking.size(); ++rank) {
    const int32_t page = head.lane.sink_pages + ranking.at(rank);
    if (std::find(slots, slots_end, page) != slots_end) continue;
    const auto free = [&head](int32_t slot) {
      return head.slot_page[slot] < 0 || head.slot_used[slot] + kPrefetchIdle <= head.length;
    };
    while (next < victims.size() && !free(victims[next])) ++next;
    if (next == victims.size()) return;
    const int32_t slot = victims[next++];
    head.recall(page, slot);
    head.slot_used[slot] = head.length - kPrefetchAge;
  }
}

void select_head(const fkv_cache& cache, const fkv_workspace& workspace, int32_t layer, int32_t stage,
                 int32_t row_index, int32_t h, Memory& memory) {
  const fkv_row& row = cache.rows[row_index];
  const fkv_lane& lane = *lane_of(cache, row);
  const int64_t table = lane_head(cache, layer, h), list = miss_list(cache, row_index, h);
  const int32_t length = target_length(row, stage);
  const int32_t candidates = n_candidates(lane, length, cache.page_size);
  const int32_t ahead = stage == FKV_NEXT && !lane.resident ? std::max(row.prefetch, 0) : 0;
  Head head{cache,
            row,
            lane,
            length,
            joining_page(lane, length, cache.page_size),
            lane.selected_page + table * lane.k,
            lane.selected_slot + table * lane.k,
            lane.slot_page + table * lane.n_slots,
            lane.slot_used + table * lane.n_slots,
            workspace.misses + list * cache.max_slots};
  choose(head, workspace.scores + list * cache.max_pages, candidates, ahead, memory.ranking);
  lane.n_selected[table] = head.n_selected;
  fkv_counters& counters = cache.counters[row_index];
  const bool counted = counts_selection(cache, layer, row_index, h, stage);
  if (counted) add_count(counters.selected, head.n_selected);
  if (lane.resident) {
    std::fill_n(head.selected_slot, head.n_selected, -1);
    return;
  }

  find_hits(head, memory.victims);
  size_t next = 0;
  for (int32_t i = 0; i < head.n_selected; ++i) {
    if (head.selected_slot[i] < 0) {
      head.selected_slot[i] = memory.victims[next++];
      head.n_moved += head.selected_page[i] == head.joining;
      head.recall(head.selected_page[i], head.selected_slot[i]);
    }
    head.slot_used[head.selected_slot[i]] = length;
  }
  const int32_t n_absent = head.n_misses;
  if (ahead > 0) prefetch(head, memory.ranking, memory.victims, next);
  workspace.n_misses[list] = head.n_misses;

  if (counted) add_count(counters.hits, head.n_selected - n_absent);
  add_count(stage == FKV_NOW ? counters.misses_now : counters.misses_next, n_absent - head.n_moved);
  add_count(counters.moved, head.n_moved);
  add_count(counters.prefetched, head.n_misses - n_absent);
}

// What only the lane itself can tell, and what a wrong lane would otherwise do to memory that is not its own.
void require_lane(const fkv_cache& cache, const fkv_lane& lane) {
  if (lane.resident) return;
  if (lane.n_slots < lane.k) throw std::runtime_error("a lane has fewer slots than it selects pages");
  if (lane.n_slots > cache.max_slots)
    throw std::runtime_error("a lane has more slots than miss lists hold (max_slots)");
}

}  // namespace

void select_rows(Context& context, const fkv_cache& cache, const fkv_workspace& workspace, int32_t layer, int32_t stage,
                 int32_t n_rows) {
  std::vector<int32_t> served;  // row · Hkv + head
  for (int32_t i = 0; i < n_rows; ++i) {
    const fkv_row& row = cache.rows[i];
    const fkv_lane* lane = lane_of(cache, row);
    for (int32_t h = 0; h < cache.n_kv_heads; ++h) {
      workspace.n_misses[miss_list(cache, i, h)] = 0;
      if (lane == nullptr || serves(cache, row, *lane, layer, i, h, stage) == Query::none) continue;
      if (served.empty() || served.back() / cache.n_kv_heads != i) require_lane(cache, *lane);
      served.push_back(i * cache.n_kv_heads + h);
    }
  }
  if (served.empty()) return;
  context.parallel(static_cast<int64_t>(served.size()), 2, [&](int64_t begin, int64_t end) {
    Memory memory;
    for (int64_t i = begin; i < end; ++i) {
      select_head(cache, workspace, layer, stage, served[i] / cache.n_kv_heads, served[i] % cache.n_kv_heads, memory);
    }
  });
}

}  // namespace fkv

using namespace fkv;

int32_t fkv_select(const fkv_cache* cache, const fkv_workspace* workspace, int32_t layer, int32_t stage, int32_t n_rows,
                   fkv_stream* stream) {
  if (const int32_t status = require_tables("fkv_select", cache, layer, n_rows)) return status;
  if (const int32_t status = require_workspace("fkv_select", workspace)) return status;
  if (const int32_t status = require_stage("fkv_select", stage)) return status;
  return launch(stream, "fkv_select", [cache = *cache, workspace = *workspace, layer, stage, n_rows](Context& context) {
    select_rows(context, cache, workspace, layer, stage, n_rows);
  });
}
