// select.cu: the k best pages of a head, and its slots as a cache of them: what is at hand stays, what is missing replaces what was
// selected longest ago. Residency changes what is copied, never what is selected.
//
// floor: a candidate's score read six times from the nearest cache by one block a head, and some twenty barriers of about 30 ns: 3 us at
// 1024 candidates on an H100.
#include "pages.cuh"
#include "stages.cuh"

namespace fkv {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kDigits = 256;  // of a score's order, 8 bits at a time

// A prefetched page may replace one that was not selected for this many lengths, and counts as last used half of them ago, so that it
// neither outlives real selections nor is the first to go.
constexpr int32_t kPrefetchIdle = 8;
constexpr int32_t kPrefetchAge = 4;

// ---- ranking: score descending, index ascending, NaN last ----

// Greater for what ranks earlier; ties are equal. −0 ties with +0.
__device__ __forceinline__ uint32_t order_of(float score) {
  const uint32_t bits = __float_as_uint(score);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0;
  if (bits == 0x80000000u) return 0x80000000u;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
// The total order.
__device__ __forceinline__ uint64_t key_of(float score, int32_t index) {
  return static_cast<uint64_t>(order_of(score)) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(index));
}

struct Counted {
  int32_t before, all;
};
// Sum of the values of the threads before this one, and of all threads.
__device__ Counted count_before(int32_t value, int32_t* warps) {
  const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t sum = value;
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == kWarp - 1) warps[warp] = sum;
  __syncthreads();
  Counted counted{sum - value, 0};
  for (int32_t w = 0; w < kWarps; ++w) {
    counted.before += w < warp ? warps[w] : 0;
    counted.all += warps[w];
  }
  __syncthreads();
  return counted;
}

// The k-th best score's order, and how many of the scores of that order are among the k best.
struct Threshold {
  uint32_t order;
  int32_t ties;
};

// Digit by digit from the top: how many scores that agree with the threshold so far have each digit, then which digit holds the k-th.
__device__ Threshold find_threshold(const float* scores, int32_t n, int32_t k, int32_t* warps) {
  __shared__ int32_t counts[kDigits];
  __shared__ int32_t found[2];  // digit, scores above it
  static_assert(kDigits == kThreads);
  Threshold threshold{0, k};
  uint32_t mask = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    counts[threadIdx.x] = 0;
    __syncthreads();
    for (int32_t first = 0; first < n; first += kThreads) {
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
__device__ uint64_t choose(int32_t* pages, const float* scores, int32_t n, int32_t k, int32_t sink_pages, int32_t* warps) {
  __shared__ int32_t last_tie;
  const Threshold threshold = find_threshold(scores, n, k, warps);
  const int32_t each = (n + kThreads - 1) / kThreads, begin = min(static_cast<int32_t>(threadIdx.x) * each, n), end = min(begin + each, n);
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
__device__ uint64_t next_key(const float* scores, int32_t n, uint64_t last) {
  __shared__ uint64_t warps[kWarps];
  uint64_t best = 0;
  for (int32_t i = threadIdx.x; i < n; i += kThreads) {
    const uint64_t key = key_of(scores[i], i);
    if (key < last && key > best) best = key;
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const uint64_t other = __shfl_xor_sync(kAllLanes, best, step);
    best = other > best ? other : best;
  }
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = best;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) best = warps[w] > best ? warps[w] : best;
  __syncthreads();
  return best;
}

// ---- slots ----

// One head's slots in shared memory, [n_slots] each, and where they lie.
struct Slots {
  int32_t *page, *used, *victims;  // victims: the slots outside the selection, in the order of replacement
  int32_t *chosen;                 // slot of each selected page, −1 = none yet
  int32_t *kept;                   // whether the slot's page is selected
  int32_t *page_out, *used_out;    // device memory
  int32_t n;
};

// One head of one row.
struct Head {
  const fkv_cache& cache;
  const fkv_lane& lane;
  const int32_t* blocks;  // the lane's block table
  fkv_miss* misses;
  int32_t length, joining;  // joining: the candidate that is still in its window frame, or −1

  __device__ void recall(const Slots& slots, int32_t index, int32_t page, int32_t slot, int32_t used) const {
    misses[index] = {page, slot, blocks[page], page == joining ? lane_frame_of_window_page(lane, page) : -1};
    slots.page[slot] = slots.page_out[slot] = page;
    slots.used_out[slot] = used;
  }
};

// Index of `page` in ascending pages, or −1.
__device__ __forceinline__ int32_t find(const int32_t* pages, int32_t n, int32_t page) {
  int32_t low = 0, high = n;
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (pages[middle] < page) low = middle + 1;
    else high = middle;
  }
  return low < n && pages[low] == page ? low : -1;
}

// Pages that already have a slot keep it; the others' slots become victims, the one used longest ago first, of equals the lowest.
// Returns the number of victims.
__device__ int32_t find_hits(const Slots& slots, const int32_t* pages, int32_t n_selected) {
  for (int32_t i = threadIdx.x; i < n_selected; i += kThreads) slots.chosen[i] = -1;
  __syncthreads();
  int32_t n_victims = 0;
  for (int32_t first = 0; first < slots.n; first += kThreads) {
    const int32_t slot = first + static_cast<int32_t>(threadIdx.x);
    bool victim = false;
    if (slot < slots.n) {
      const int32_t place = find(pages, n_selected, slots.page[slot]);
      if (place >= 0) atomicMax(&slots.chosen[place], slot);
      slots.kept[slot] = place >= 0;
      victim = place < 0;
    }
    n_victims += __syncthreads_count(victim);
  }
  for (int32_t slot = threadIdx.x; slot < slots.n; slot += kThreads) {
    if (slots.kept[slot]) continue;
    int32_t before = 0;
    for (int32_t other = 0; other < slots.n; ++other) {
      const int32_t mine = slots.used[slot], theirs = slots.used[other];
      before += !slots.kept[other] && (theirs < mine || (theirs == mine && other < slot));
    }
    slots.victims[before] = slot;
  }
  __syncthreads();
  return n_victims;
}

// The absent pages among the ranks after the selection, each into a slot that is empty or long unused; returns how many. All threads
// follow the same path; `last` is the key of the worst selected page, `next` the first victim left.
__device__ int32_t prefetch(const Head& head, const Slots& slots, const float* scores, int32_t candidates, int32_t ranks, uint64_t last,
                            int32_t next, int32_t n_victims, int32_t n_misses) {
  int32_t fetched = 0;
  for (int32_t rank = 0; rank < ranks; ++rank) {
    last = next_key(scores, candidates, last);
    const int32_t page = head.lane.sink_pages + static_cast<int32_t>(~static_cast<uint32_t>(last));
    bool present = false;
    for (int32_t slot = threadIdx.x; slot < slots.n; slot += kThreads) present |= slots.page[slot] == page;
    if (__syncthreads_or(present)) continue;
    const auto free = [&](int32_t slot) { return slots.page[slot] < 0 || slots.used[slot] + kPrefetchIdle <= head.length; };
    while (next < n_victims && !free(slots.victims[next])) ++next;
    if (next == n_victims) break;
    const int32_t slot = slots.victims[next++];
    __syncthreads();
    if (threadIdx.x == 0) head.recall(slots, n_misses + fetched, page, slot, head.length - kPrefetchAge);
    ++fetched;
    __syncthreads();
  }
  return fetched;
}

// ---- the operation: one block a KV head and row ----

__global__ void __launch_bounds__(kThreads)
    select_kernel(const __grid_constant__ fkv_cache cache, const __grid_constant__ fkv_workspace workspace, int32_t layer, int32_t stage) {
  extern __shared__ int32_t shared[];  // five tables of the lane's n_slots
  __shared__ int32_t warps[kWarps], n_moved;
  const int32_t h = blockIdx.x, row_index = blockIdx.y;
  const int64_t list = miss_list(cache, row_index, h);
  const fkv_row& row = cache.rows[row_index];
  const fkv_lane* lane_there = lane_of(cache, row);
  if (lane_there == nullptr || serves(cache, row, *lane_there, layer, row_index, h, stage) == Query::none) {
    if (threadIdx.x == 0) workspace.n_misses[list] = 0;
    return;
  }
  const fkv_lane& lane = *lane_there;
  const int64_t table = lane_head(cache, layer, h);
  const int32_t length = target_length(row, stage), candidates = n_candidates(lane, length, cache.page_size);
  const int32_t n_selected = min(candidates, lane.k);
  require(lane.sink_pages + candidates <= cache.max_pages);
  require(lane.resident || (lane.k <= lane.n_slots && lane.n_slots <= cache.max_slots));
  const float* scores = workspace.scores + list * cache.max_pages;
  int32_t* pages = lane.selected_page + table * lane.k;
  int32_t* selected_slot = lane.selected_slot + table * lane.k;
  fkv_counters& counters = cache.counters[row_index];

  uint64_t worst = 0;
  if (candidates <= lane.k) {
    for (int32_t i = threadIdx.x; i < n_selected; i += kThreads) pages[i] = lane.sink_pages + i;
    __syncthreads();
  } else {
    worst = choose(pages, scores, candidates, n_selected, lane.sink_pages, warps);
  }
  const bool counted = counts_selection(cache, layer, row_index, h, stage);
  if (threadIdx.x == 0) {
    lane.n_selected[table] = n_selected;
    if (counted) atomicAdd(&counters.selected, n_selected);
    n_moved = 0;
  }
  if (lane.resident) {
    for (int32_t i = threadIdx.x; i < n_selected; i += kThreads) selected_slot[i] = -1;
    if (threadIdx.x == 0) workspace.n_misses[list] = 0;
    return;
  }

  const int32_t n_slots = lane.n_slots;
  const Slots slots{shared,
                    shared + n_slots,
                    shared + 2 * n_slots,
                    shared + 3 * n_slots,
                    shared + 4 * n_slots,
                    lane.slot_page + table * n_slots,
                    lane.slot_used + table * n_slots,
                    n_slots};
  const Head head{cache, lane, cache.block_table + static_cast<int64_t>(row.sequence) * cache.max_pages,
                  workspace.misses + list * cache.max_slots, length, joining_page(lane, length, cache.page_size)};
  for (int32_t slot = threadIdx.x; slot < n_slots; slot += kThreads) {
    slots.page[slot] = slots.page_out[slot];
    slots.used[slot] = slots.used_out[slot];
  }
  const int32_t n_victims = find_hits(slots, pages, n_selected);

  const int32_t each = (n_selected + kThreads - 1) / kThreads, begin = min(static_cast<int32_t>(threadIdx.x) * each, n_selected),
                end = min(begin + each, n_selected);
  int32_t absent = 0;
  for (int32_t i = begin; i < end; ++i) absent += slots.chosen[i] < 0;
  const Counted missing = count_before(absent, warps);
  require(missing.all <= n_victims);
  int32_t victim = missing.before;
  for (int32_t i = begin; i < end; ++i) {
    if (slots.chosen[i] < 0) {
      slots.chosen[i] = slots.victims[victim];
      if (pages[i] == head.joining) n_moved = 1;
      head.recall(slots, victim++, pages[i], slots.chosen[i], length);
    }
    slots.used_out[slots.chosen[i]] = length;
    selected_slot[i] = slots.chosen[i];
  }
  __syncthreads();

  const int32_t ahead = stage == FKV_NEXT && candidates > lane.k ? min(max(row.prefetch, 0), candidates - n_selected) : 0;
  const int32_t fetched = prefetch(head, slots, scores, candidates, ahead, worst, missing.all, n_victims, missing.all);
  if (threadIdx.x != 0) return;
  workspace.n_misses[list] = missing.all + fetched;
  if (counted) atomicAdd(&counters.hits, n_selected - missing.all);
  atomicAdd(stage == FKV_NOW ? &counters.misses_now : &counters.misses_next, missing.all - n_moved);
  atomicAdd(&counters.moved, n_moved);
  atomicAdd(&counters.prefetched, fetched);
}

}  // namespace

int32_t issue_select(const char* call, const fkv_cache& cache, const fkv_workspace& workspace, int32_t layer, int32_t stage,
                     int32_t n_rows, fkv_stream* stream) {
  if (n_rows == 0) return FKV_OK;
  const size_t shared = 5 * static_cast<size_t>(cache.max_slots) * sizeof(int32_t);
  if (const int32_t status = allow_shared(stream, call, select_kernel, shared)) return status;
  select_kernel<<<dim3(cache.n_kv_heads, n_rows), kThreads, shared, stream->handle>>>(cache, workspace, layer, stage);
  return launched(stream, call);
}

}  // namespace fkv

using namespace fkv;

int32_t fkv_select(const fkv_cache* cache, const fkv_workspace* workspace, int32_t layer, int32_t stage, int32_t n_rows,
                   fkv_stream* stream) {
  const char* call = "fkv_select";
  if (const int32_t status = require_tables(call, cache, layer, n_rows)) return status;
  if (const int32_t status = require_workspace(call, workspace)) return status;
  if (const int32_t status = require_stage(call, stage)) return status;
  if (const int32_t status = ready(stream, call)) return status;
  return issue_select(call, *cache, *workspace, layer, stage, n_rows, stream);
}
