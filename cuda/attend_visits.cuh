// attend_visits.cuh: which pages one KV head attends in a step, and where they lie.
#pragma once
#include "pages.cuh"

namespace fkv {

// `front` sink pages (every page where the lane attends all), then the head's selection, then the window: ascending.
struct Visits {
  const int32_t* table;  // of the selection: slots, or pages where frames are pages
  int32_t k;             // entries of the table
  int32_t front, selected, window, window_begin;

  __device__ int32_t count() const { return front + selected + window; }
};

__device__ __forceinline__ Visits visits_of(const fkv_cache& cache, const fkv_lane& lane, int32_t layer, int32_t head,
                                            int32_t position) {
  const int32_t pages = position / cache.page_size + 1;
  if (lane.attend_all) return {nullptr, 0, pages, 0, 0, pages};
  const int64_t entry = lane_head(cache, layer, head);
  const int32_t begin = window_begin(lane, position + 1, cache.page_size);
  return {(lane.resident ? lane.selected_page : lane.selected_slot) + entry * lane.k,
          lane.k,
          min(lane.sink_pages, pages),
          lane.k > 0 ? min(lane.n_selected[entry], lane.k) : 0,
          max(0, pages - begin),
          begin};
}

// One visited page: its frame, and how many of its rows are attended; no rows past the last page.
struct Visit {
  int32_t frame, rows;
};
__device__ __forceinline__ Visit visited(const fkv_cache& cache, const fkv_lane& lane, const Visits& visits, int32_t position,
                                         int32_t i) {
  // Read before the number of selected pages is known: one trip to memory less, where a step begins.
  const int32_t at = i - visits.front;
  const int32_t entry = at >= 0 && at < visits.k ? visits.table[at] : 0;
  if (i >= visits.count()) return {0, 0};
  Visit visit;
  if (at >= 0 && at < visits.selected) {
    visit = {lane.resident ? entry : lane_frame_of_slot(lane, entry), cache.page_size};  // a selected page is complete
  } else {
    const int32_t page = at < 0 ? i : visits.window_begin + at - visits.selected;
    visit = {lane_frame_of_window_page(lane, page), min(cache.page_size, position + 1 - page * cache.page_size)};
  }
  require(visit.frame >= 0 && visit.frame < lane.n_frames);
  return visit;
}

}  // namespace fkv
