// select.cuh: a head's selection by one block from scores in global memory, for any number of candidates and ranks: what fkv_select does,
// and what the fused retrieval does where its blocks' lists would be too long.
#pragma once
#include "slots.cuh"
#include "topk.cuh"

namespace fkv {

constexpr int kDigits = 256;  // of a score's order, 8 bits at a time

// The k-th best score's order, and how many of the scores of that order are among the k best.
struct Threshold {
  uint32_t order;
  int32_t ties;
};

// Digit by digit from the top: how many scores that agree with the threshold so far have each digit, then which digit holds the k-th.
__device__ __forceinline__ Threshold find_threshold(const float* scores, int32_t n, int32_t k, int32_t* warps) {
  __shared__ int32_t counts[kDigits];
  __shared__ int32_t found[2];  // digit, scores above it
  static_assert(kDigits == kServeThreads);
  Threshold threshold{0, k};
  uint32_t mask = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    counts[threadIdx.x] = 0;
    __syncthreads();
    for (int32_t first = 0; first < n; first += kServeThreads) {
      const int32_t i = first + static_cast<int32_t>(threadIdx.x);
      int32_t digit = kDigits;
      if (i < n) {
        const uint32_t order = order_of(scores[i]);
        if ((order & mask) == threshold.order) digit = static_cast<int32_t>(order >> shift & 255u);
      }
      // Softmax scores share most of their top digits: one addition for all lanes with the same one.
      const unsigned same = __match_any_sync(kAllLanes, digit);
      if (digit < kDigits && __ffs(static_cast<int>(same)) - 1 == static_cast<int>(threadIdx.x % kWarp))
        atomicAdd(&counts[digit], __popc(same));
    }
    __syncthreads();
    const int32_t digit = kDigits - 1 - static_cast<int32_t>(threadIdx.x), own = counts[digit];
    const int32_t above = count_before(own, warps).before;
    if (above < threshold.ties && threshold.ties <= above + own) {
      found[0] = digit;
      found[1] = above;
    }
    __syncthreads();
    threshold.order |= static_cast<uint32_t>(found[0]) << shift;
    threshold.ties -= found[1];
    mask |= 255u << shift;
    __syncthreads();
  }
  return threshold;
}

// Writes the k best of n > k scores as ascending pages from `sink_pages` on; returns the key of the worst of them. A thread owns
// candidates that follow each other.
__device__ __forceinline__ uint64_t choose(int32_t* pages, const float* scores, int32_t n, int32_t k, int32_t sink_pages, int32_t* warps) {
  __shared__ int32_t last_tie;
  const Threshold threshold = find_threshold(scores, n, k, warps);
  const int32_t each = (n + kServeThreads - 1) / kServeThreads, begin = min(static_cast<int32_t>(threadIdx.x) * each, n),
                end = min(begin + each, n);
  int32_t above = 0, ties = 0;
  for (int32_t i = begin; i < end; ++i) {
    const uint32_t order = order_of(scores[i]);
    above += order > threshold.order;
    ties += order == threshold.order;
  }
  int32_t tie = count_before(ties, warps).before;  // the lower of equal pages come first
  int32_t place = count_before(above, warps).before + min(tie, threshold.ties);
  for (int32_t i = begin; i < end; ++i) {
    const uint32_t order = order_of(scores[i]);
    if (order < threshold.order) continue;
    if (order == threshold.order) {
      if (tie == threshold.ties - 1) last_tie = i;
      if (tie++ >= threshold.ties) continue;
    }
    pages[place++] = sink_pages + i;
  }
  __syncthreads();
  return static_cast<uint64_t>(threshold.order) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(last_tie));
}

// The greatest key below `last`, in every thread; 0 where there is none.
__device__ __forceinline__ uint64_t next_key(const float* scores, int32_t n, uint64_t last) {
  __shared__ uint64_t warps[kServeWarps];
  uint64_t best = 0;
  for (int32_t i = threadIdx.x; i < n; i += kServeThreads) {
    const uint64_t key = key_of(scores[i], i);
    if (key < last && key > best) best = key;
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const uint64_t other = __shfl_xor_sync(kAllLanes, best, step);
    best = other > best ? other : best;
  }
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = best;
  __syncthreads();
  for (int w = 0; w < kServeWarps; ++w) best = warps[w] > best ? warps[w] : best;
  __syncthreads();
  return best;
}

// One head that is served: selection, slots, miss list and counters, by one block. tables: shared memory for five of `capacity` slots; a
// lane with more of them finds room in the workspace: for the victims among the raw scores, for what is kept where the misses will be.
__device__ __forceinline__ void select_head(int32_t* tables, int32_t capacity, const fkv_cache& cache, const fkv_workspace& workspace,
                                            const fkv_row& row, const fkv_lane& lane, int32_t layer, int32_t stage,
                                            int32_t row_index, int32_t h) {
  __shared__ int32_t warps[kServeWarps];
  const int64_t list = miss_list(cache, row_index, h), table = lane_head(cache, layer, h);
  const int32_t length = target_length(row, stage), candidates = n_candidates(lane, length, cache.page_size);
  const int32_t n_selected = min(candidates, lane.k);
  require(candidates <= 0 || lane.sink_pages + candidates <= cache.max_pages);
  require(lane.resident || (lane.k <= lane.n_slots && lane.n_slots <= cache.max_slots));
  const float* scores = workspace.scores + list * cache.max_pages;
  int32_t* pages = lane.selected_page + table * lane.k;
  int32_t* selected_slot = lane.selected_slot + table * lane.k;
  fkv_counters& counters = cache.counters[row_index];

  uint64_t worst = 0;
  if (candidates <= lane.k) {
    for (int32_t i = threadIdx.x; i < n_selected; i += kServeThreads) pages[i] = lane.sink_pages + i;
    __syncthreads();
  } else {
    worst = choose(pages, scores, candidates, n_selected, lane.sink_pages, warps);
  }
  const bool counted = counts_selection(cache, layer, row_index, h, stage);
  if (threadIdx.x == 0) {
    lane.n_selected[table] = n_selected;
    if (counted) atomicAdd(&counters.selected, n_selected);
  }
  if (lane.resident) {
    for (int32_t i = threadIdx.x; i < n_selected; i += kServeThreads) selected_slot[i] = -1;
    if (threadIdx.x == 0) workspace.n_misses[list] = 0;
    return;
  }
  fkv_miss* misses = workspace.misses + list * cache.max_slots;
  const int64_t group = cache.n_q_heads / cache.n_kv_heads;
  auto* victims = reinterpret_cast<int32_t*>(workspace.raw + list * group * cache.max_pages);
  const Slots slots = lane.n_slots <= capacity
                          ? Slots(tables, lane, table, true, false)
                          : Slots(victims, reinterpret_cast<int32_t*>(misses), selected_slot, lane, table);
  slots.take();
  require(lane.n_slots <= capacity || lane.n_slots <= group * cache.max_pages);
  const Recalls recalls{cache.block_table + static_cast<int64_t>(row.sequence) * cache.max_pages, misses, length,
                        joining_page(lane, length, cache.page_size)};
  const int32_t ahead = ranks_ahead(row, lane, candidates, stage);
  const Placed placed = place_pages(recalls, slots, lane, selected_slot, pages, n_selected, ahead, [&] {
    worst = next_key(scores, candidates, worst);
    return index_of(worst);
  });
  if (threadIdx.x != 0) return;
  workspace.n_misses[list] = placed.absent + placed.fetched;
  count_placed(counters, placed, n_selected, counted, stage);
}

}  // namespace fkv
