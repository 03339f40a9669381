// attend.cpp: paged attention of one token a row over its sink, selected and window pages (design section 3, Order).
// The pages that a head visits are split at every eighth, splits are combined in order. Which slot a page sits in, the
// device layout and the number of threads change addresses and the split of work, never a sum.
//
// floor: the visited pages' K and V once, 2·tokens·d·bytes a KV head, at memory read speed.
#include <algorithm>
#include <stdexcept>

#include "attend_split.h"
#include "../frames.h"
#include "math.h"
#include "scratch.h"
#include "stages.h"

namespace fkv {
namespace {

// The pages that one KV head visits: `front` sink pages (every page where the lane attends all), then its selection,
// then the window.
struct Visits {
  const int32_t *selected_page, *selected_slot;
  int32_t front, selected, window, window_begin;

  int32_t count() const { return front + selected + window; }
  int32_t splits() const { return (count() + kSplitPages - 1) / kSplitPages; }
};

Visits visits_of(const fkv_cache& cache, const fkv_lane& lane, int32_t layer, int32_t head, int32_t position) {
  const int32_t pages = position / cache.page_size + 1;
  if (lane.attend_all) return {nullptr, nullptr, pages, 0, 0, pages};
  const int64_t entry = lane_head(cache, layer, head);
  const int32_t begin = window_begin(lane, position + 1, cache.page_size);
  return {lane.selected_page + entry * lane.k, lane.selected_slot + entry * lane.k,
          std::min(lane.sink_pages, pages),    lane.k > 0 ? lane.n_selected[entry] : 0,
          std::max(0, pages - begin),          begin};
}

struct Page {
  int32_t page, frame;
};

Page visited(const fkv_lane& lane, const Visits& visits, int32_t i) {
  if (i < visits.front) return {i, lane_frame_of_window_page(lane, i)};
  i -= visits.front;
  if (i < visits.selected) {
    const int32_t page = visits.selected_page[i];
    return {page, lane.resident ? page : lane_frame_of_slot(lane, visits.selected_slot[i])};
  }
  const int32_t page = visits.window_begin + i - visits.selected;
  return {page, lane_frame_of_window_page(lane, page)};
}

// Partial results: of each (row, KV head, split) and query head of the group the `sums` of attend_split.h.
struct Partials {
  float* data;
  int64_t stride;         // floats of one query head
  int32_t group, splits;  // splits: the most that any head of any row has

  float* at(int64_t row_head, int32_t split) const { return data + (row_head * splits + split) * group * stride; }
};

void attend_one(const Partials& partials, const fkv_cache& cache, const float* qkv, int32_t layer, int64_t row_head,
                int32_t index) {
  thread_local Scratch scratch;
  const int32_t heads = cache.n_kv_heads, group = partials.group, d = cache.head_dim,
                head = static_cast<int32_t>(row_head % heads);
  const fkv_row& row = cache.rows[row_head / heads];
  const fkv_lane& lane = cache.lanes[row.sequence];
  const Visits visits = visits_of(cache, lane, layer, head, row.position);
  const int32_t begin = index * kSplitPages, end = std::min(begin + kSplitPages, visits.count());
  if (begin >= end) return;

  Split split{};
  split.width = pad_lanes(d);
  split.stride = partials.stride;
  split.group = group;
  split.page_size = cache.page_size;
  split.head_dim = d;
  split.sums = partials.at(row_head, index);
  float* q = scratch.floats(static_cast<size_t>(group * (split.width + kSplitPages * cache.page_size)));
  split.scores = q + group * split.width;
  split.q = q;
  const float* from = qkv + (row_head / heads * (cache.n_q_heads + 2 * heads) + int64_t{head} * group) * d;
  for (int32_t j = 0; j < group; ++j) {
    for (int64_t c = 0; c < split.width; ++c)
      q[j * split.width + c] = c < d ? from[j * d + c] * cache.attention_scale : 0.0f;
  }
  for (int32_t i = begin; i < end; ++i) {
    const Page page = visited(lane, visits, i);
    if (page.frame < 0 || page.frame >= lane.n_frames)
      throw std::runtime_error("attend: a page lies outside its lane's frames");
    split.pages[split.n_pages++] = {lane_address(cache, lane, layer, page.frame, head, 0, 0),
                                    lane_address(cache, lane, layer, page.frame, head, 1, 0), cache.device.row,
                                    std::min(cache.page_size, row.position + 1 - page.page * cache.page_size)};
  }
  attend_split(split, cache.dtype);
}

void attend_rows(Context& context, float* out, const fkv_cache& cache, const float* qkv, int32_t layer,
                 int32_t n_rows) {
  thread_local Scratch scratch;
  const int32_t heads = cache.n_kv_heads, group = cache.n_q_heads / heads, d = cache.head_dim;
  const int64_t row_floats = int64_t{cache.n_q_heads} * d, row_heads = int64_t{n_rows} * heads;
  const auto row_of = [&](int64_t row_head) -> const fkv_row& { return cache.rows[row_head / heads]; };
  const auto splits_of = [&](int64_t row_head) {
    const fkv_row& row = row_of(row_head);
    if (row.sequence < 0) return 0;
    return visits_of(cache, cache.lanes[row.sequence], layer, static_cast<int32_t>(row_head % heads), row.position)
        .splits();
  };
  Partials partials{nullptr, pad_lanes(d) + kLanes, group, 0};
  for (int64_t i = 0; i < row_heads; ++i) partials.splits = std::max(partials.splits, splits_of(i));
  partials.data = scratch.floats(static_cast<size_t>(row_heads * partials.splits * group * partials.stride));

  context.parallel(row_heads * partials.splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row_head = i / partials.splits;
      if (row_of(row_head).sequence >= 0)
        attend_one(partials, cache, qkv, layer, row_head, static_cast<int32_t>(i % partials.splits));
    }
  });
  context.parallel(row_heads, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* to = out + i * group * d;
      if (row_of(i).sequence < 0) {
        std::memset(to, 0, static_cast<size_t>(group * d) * sizeof(float));
        continue;
      }
      for (int32_t j = 0; j < group; ++j) {
        combine_splits(to + j * d, partials.at(i, 0) + j * partials.stride, group * partials.stride, splits_of(i),
                       pad_lanes(d), d);
      }
    }
  });
  for (int32_t r = 0; r < n_rows; ++r) {
    if (cache.rows[r].sequence < 0) continue;
    std::memcpy(cache.lanes[cache.rows[r].sequence].q_prev + layer * row_floats,
                qkv + r * (row_floats + int64_t{2} * heads * d), static_cast<size_t>(row_floats) * sizeof(float));
  }
}

}  // namespace
}  // namespace fkv

using namespace fkv;

int32_t fkv_attend_scratch_bytes(uint64_t* bytes, const fkv_cache* cache) {
  FKV_REQUIRE(bytes != nullptr, FKV_BAD_ARGUMENT, "fkv_attend_scratch_bytes: bytes is null");
  if (const int32_t status = check_cache("fkv_attend_scratch_bytes", cache)) return status;
  *bytes = 256;  // the twin needs none
  return FKV_OK;
}

int32_t fkv_attend(float* out, const fkv_cache* cache, float* qkv, int32_t layer, int32_t n_rows, fkv_stream* stream) {
  if (const int32_t status = check_step("fkv_attend", cache, layer, n_rows)) return status;
  FKV_REQUIRE(out != nullptr && qkv != nullptr, FKV_BAD_ARGUMENT, "fkv_attend: %s is null",
              out == nullptr ? "out" : "qkv");
  return launch(stream, "fkv_attend", [out, cache = *cache, qkv, layer, n_rows](Context& context) {
    attend_rows(context, out, cache, qkv, layer, n_rows);
  });
}
