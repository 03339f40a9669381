// slots.cuh: one head's slots as a cache of its pages: what is at hand stays, what is missing replaces what was selected longest ago.
// What fkv_select and the fused retrieval share. A block of kServeThreads works on one head; several may do the same work, of which one
// writes.
#pragma once
#include "score.cuh"

namespace fkv {

// A prefetched page may replace one that was not selected for this many lengths, and counts as last used half of them ago, so that it
// neither outlives real selections nor is the first to go.
constexpr int32_t kPrefetchIdle = 8;
constexpr int32_t kPrefetchAge = 4;

struct Counted {
  int32_t before, all;
};
// Sum of the values of the threads before this one, and of all threads. warps: [kServeWarps] of shared memory.
__device__ __forceinline__ Counted count_before(int32_t value, int32_t* warps) {
  const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t sum = value;
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == kWarp - 1) warps[warp] = sum;
  __syncthreads();
  Counted counted{sum - value, 0};
  for (int32_t w = 0; w < kServeWarps; ++w) {
    counted.before += w < warp ? warps[w] : 0;
    counted.all += warps[w];
  }
  __syncthreads();
  return counted;
}

// A head's slots, [n] each, and where they lie.
struct Slots {
  int32_t *page, *used, *victims;  // victims: the slots outside the selection, in the order of replacement
  int32_t *chosen;                 // slot of each selected page, −1 = none yet
  int32_t *kept;                   // whether the slot's page is selected
  int32_t *page_out, *used_out;    // device memory
  int32_t n;
  bool writes;                     // whether this block writes what several work out
  bool ordered;                    // victims holds all slots in their order, as many as a block has threads at most

  // tables: shared memory for five of the head's n_slots.
  __device__ Slots(int32_t* tables, const fkv_lane& lane, int64_t table, bool writing, bool in_order)
      : page(tables),
        used(page + lane.n_slots),
        victims(used + lane.n_slots),
        chosen(victims + lane.n_slots),
        kept(chosen + lane.n_slots),
        page_out(lane.slot_page + table * lane.n_slots),
        used_out(lane.slot_used + table * lane.n_slots),
        n(lane.n_slots),
        writes(writing),
        ordered(in_order) {}
  // Where they are too many for that, for the one block that works on them and writes: the tables where they lie, and [n_slots] each of
  // device memory. victims may be read until the last miss is listed, kept only before the first.
  __device__ Slots(int32_t* victims_room, int32_t* kept_room, int32_t* chosen_room, const fkv_lane& lane, int64_t table)
      : page(lane.slot_page + table * lane.n_slots),
        used(lane.slot_used + table * lane.n_slots),
        victims(victims_room),
        chosen(chosen_room),
        kept(kept_room),
        page_out(page),
        used_out(used),
        n(lane.n_slots),
        writes(true),
        ordered(false) {}
  // Loads the tables; a barrier follows before they are read.
  __device__ void take() const {
    for (int32_t slot = threadIdx.x; slot < n && page != page_out; slot += kServeThreads) {
      page[slot] = page_out[slot];
      used[slot] = used_out[slot];
    }
  }
};

// One head of one row, as far as recalls need it.
struct Recalls {
  const int32_t* blocks;  // the lane's block table
  fkv_miss* misses;
  int32_t length, joining;  // joining: the candidate that is still in its window frame, or −1

  __device__ void add(const Slots& slots, const fkv_lane& lane, int32_t index, int32_t page, int32_t slot, int32_t used) const {
    misses[index] = {page, slot, blocks[page], page == joining ? lane_frame_of_window_page(lane, page) : -1};
    slots.page[slot] = page;
    if (!slots.writes) return;
    slots.page_out[slot] = page;
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

// Pages that already have a slot keep it; returns how many slots are outside the selection.
__device__ __forceinline__ int32_t find_hits(const Slots& slots, const int32_t* pages, int32_t n_selected) {
  for (int32_t i = threadIdx.x; i < n_selected; i += kServeThreads) slots.chosen[i] = -1;
  __syncthreads();
  int32_t n_victims = 0;
  for (int32_t first = 0; first < slots.n; first += kServeThreads) {
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
  return n_victims;
}

// Of all slots, or of those alone that are not kept: the one used longest ago first, of equals the lowest. A barrier follows before they
// are read.
__device__ __forceinline__ void order_victims(const Slots& slots, bool all) {
  for (int32_t slot = threadIdx.x; slot < slots.n; slot += kServeThreads) {
    if (!all && slots.kept[slot]) continue;
    const int32_t mine = slots.used[slot];
    int32_t before = 0;
#pragma unroll 8
    for (int32_t other = 0; other < slots.n; ++other) {
      const int32_t theirs = slots.used[other];
      before += (theirs < mine || (theirs == mine && other < slot)) && (all || !slots.kept[other]);
    }
    slots.victims[before] = slot;
  }
}

// Leaves of all slots, which are in order, those that are not kept.
__device__ __forceinline__ void leave_victims(const Slots& slots, int32_t* warps) {
  const int32_t slot = static_cast<int32_t>(threadIdx.x) < slots.n ? slots.victims[threadIdx.x] : -1;
  const bool victim = slot >= 0 && !slots.kept[slot];
  const Counted counted = count_before(victim, warps);
  if (victim) slots.victims[counted.before] = slot;
}

// What became of a selection: pages absent (`moved` of them at hand in the window), and pages fetched ahead, in one miss list.
struct Placed {
  int32_t absent, moved, fetched;
};

// The absent pages among the ranks after the selection, each into a slot that is empty or long unused; returns how many. All threads
// follow the same path; n_absent: misses listed and victims taken so far; candidate(): the next rank's.
template <class Candidate>
__device__ __forceinline__ int32_t prefetch(const Recalls& recalls, const Slots& slots, const fkv_lane& lane, int32_t ranks,
                                            int32_t n_absent, int32_t n_victims, const Candidate& candidate) {
  int32_t fetched = 0, next = n_absent;
  for (int32_t rank = 0; rank < ranks; ++rank) {
    const int32_t page = lane.sink_pages + candidate();
    bool present = false;
    for (int32_t slot = threadIdx.x; slot < slots.n; slot += kServeThreads) present |= slots.page[slot] == page;
    if (__syncthreads_or(present)) continue;
    const auto free = [&](int32_t slot) { return slots.page[slot] < 0 || slots.used[slot] + kPrefetchIdle <= recalls.length; };
    while (next < n_victims && !free(slots.victims[next])) ++next;
    if (next == n_victims) break;
    const int32_t slot = slots.victims[next++];
    __syncthreads();
    if (threadIdx.x == 0) recalls.add(slots, lane, n_absent + fetched, page, slot, recalls.length - kPrefetchAge);
    ++fetched;
    __syncthreads();
  }
  return fetched;
}

// Gives every page of a selection (ascending; a barrier has passed) its slot, and of `ahead` ranks after it those that are absent.
// Writes selected_slot and the tables where this block is the one that does; the miss list in any case. Ends with a barrier.
template <class Candidate>
__device__ __forceinline__ Placed place_pages(const Recalls& recalls, const Slots& slots, const fkv_lane& lane, int32_t* selected_slot,
                                              const int32_t* pages, int32_t n_selected, int32_t ahead, const Candidate& candidate) {
  __shared__ int32_t warps[kServeWarps], n_moved;
  if (threadIdx.x == 0) n_moved = 0;
  const int32_t n_victims = find_hits(slots, pages, n_selected);
  const int32_t each = (n_selected + kServeThreads - 1) / kServeThreads, begin = min(static_cast<int32_t>(threadIdx.x) * each, n_selected),
                end = min(begin + each, n_selected);
  int32_t own = 0;
  for (int32_t i = begin; i < end; ++i) own += slots.chosen[i] < 0;
  Counted absent{0, 0};
  if (__syncthreads_or(own > 0 || ahead > 0)) {
    if (slots.ordered) leave_victims(slots, warps);
    else order_victims(slots, false);
    absent = count_before(own, warps);
    require(absent.all <= n_victims);
  }
  int32_t victim = absent.before;
  for (int32_t i = begin; i < end; ++i) {
    int32_t slot = slots.chosen[i];
    if (slot < 0) {
      slot = slots.victims[victim];
      if (pages[i] == recalls.joining) n_moved = 1;
      recalls.add(slots, lane, victim++, pages[i], slot, recalls.length);
    } else if (slots.writes) {
      slots.used_out[slot] = recalls.length;
    }
    if (slots.writes) selected_slot[i] = slot;
  }
  __syncthreads();
  const int32_t fetched = prefetch(recalls, slots, lane, ahead, absent.all, n_victims, candidate);
  return {absent.all, n_moved, fetched};
}

// What a served head of a row counts, by one thread.
__device__ __forceinline__ void count_placed(fkv_counters& counters, const Placed& placed, int32_t n_selected, bool counted,
                                             int32_t stage) {
  if (counted) atomicAdd(&counters.hits, n_selected - placed.absent);
  if (placed.absent > 0) {
    atomicAdd(stage == FKV_NOW ? &counters.misses_now : &counters.misses_next, placed.absent - placed.moved);
    atomicAdd(&counters.moved, placed.moved);
  }
  if (placed.fetched > 0) atomicAdd(&counters.prefetched, placed.fetched);
}

}  // namespace fkv
