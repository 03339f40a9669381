// cover.h: how the tiles cover a phase. Few rows stream W once, converted in registers: bound by memory. Many rows convert W panel by
// panel into the first cache and run register tiles over it: bound by multiply-add.
#pragma once
#include <algorithm>

#include "dense.h"
#include "tiles.h"

namespace fkv {

// What each task is: `units` groups of W's rows for each block of x's rows.
struct Plan {
  bool direct;
  int64_t unit_rows, units, block_rows, blocks;
};

FKV_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `max_direct`: the most rows of x that a direct tile takes.
FKV_INLINE Plan plan_of(const Matmul& job, int64_t max_direct, int64_t unit_of_one_row) {
  Plan plan;
  plan.direct = job.n_rows <= max_direct;
  plan.unit_rows = job.n_rows == 1 ? unit_of_one_row : kTile;
  plan.units = ceil_div(job.n_out, plan.unit_rows);
  if (plan.direct) {
    plan.block_rows = job.n_rows;
  } else {
    // Rows of x that fit half of a common second cache; where the sums must wait between panels, at most what there is room for.
    const int64_t fit = std::max<int64_t>(16, (1 << 20) / (job.padded * 4) / kTile * kTile);
    plan.block_rows = std::min(job.n_rows, job.padded <= kPanelK ? fit : std::min(fit, kMaxSaved * kTile));
  }
  plan.blocks = ceil_div(job.n_rows, plan.block_rows);
  return plan;
}

// Pointers to the rows of W from out0 on; beyond the last row, that row again (its sums are dropped). Returns how many are real.
template <class Stored, int W>
FKV_INLINE int64_t weight_rows(const typename Stored::Element** rows, const Matmul& job, int64_t out0) {
  const auto* weight = static_cast<const typename Stored::Element*>(job.weight);
  for (int64_t r = 0; r < W; ++r) rows[r] = weight + std::min(out0 + r, job.n_out - 1) * job.k;
  return std::min<int64_t>(W, job.n_out - out0);
}

template <class Stored, int W, int X>
FKV_INLINE void direct_unit(const Matmul& job, int64_t unit) {
  const typename Stored::Element* rows[W];
  const int64_t width = weight_rows<Stored, W>(rows, job, unit * W);
  finish_tile(job, direct_tile<Stored, W, X>(rows, job.x, job.k, job.padded), 0, unit * W, width);
}

// One tile over the columns begin..end that the panel holds. The sums of tile `slot` wait in `saved` until the last panel.
template <int X>
FKV_INLINE void panel_unit(const Matmul& job, const float* panel, vec* saved, int64_t row, int64_t out0, int64_t width, int64_t begin,
                           int64_t end) {
  Sums<kTile, X> sums = no_sums<kTile, X>();
  if (begin > 0) std::memcpy(&sums, saved, sizeof sums);
  panel_tile<X>(sums, panel, job.x + row * job.padded + begin, job.padded, pad_lanes(end - begin) / kLanes);
  if (end < job.k) std::memcpy(saved, &sums, sizeof sums);
  else finish_tile(job, sums, row, out0, width);
}

// All rows row0..row1 of x against unit `unit` of W. X: rows of x in a tile where that many are left; else one at a time.
template <class Stored, int X>
FKV_INLINE void panel_block(const Matmul& job, int64_t row0, int64_t row1, int64_t unit) {
  alignas(64) float panel[kPanelK * kTile];
  vec saved[kMaxSaved * kTile * kTile];
  const typename Stored::Element* rows[kTile];
  const int64_t out0 = unit * kTile, width = weight_rows<Stored, kTile>(rows, job, out0);
  for (int64_t begin = 0; begin < job.k; begin += kPanelK) {
    const int64_t end = std::min(job.k, begin + kPanelK);
    fill_panel<Stored>(panel, rows, begin, end);
    int64_t row = row0;
    for (; row + X <= row1; row += X) panel_unit<X>(job, panel, saved + (row - row0) * kTile, row, out0, width, begin, end);
    if constexpr (X > 1)
      for (; row < row1; ++row) panel_unit<1>(job, panel, saved + (row - row0) * kTile, row, out0, width, begin, end);
  }
}

template <class Stored, int X>
FKV_INLINE void panel_tasks(const Matmul& job, const Plan& plan, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row0 = task / plan.units * plan.block_rows;
    panel_block<Stored, X>(job, row0, std::min(job.n_rows, row0 + plan.block_rows), task % plan.units);
  }
}

// What runs tasks begin..end of a plan, by dtype.
typedef void (*Tasks)(const Matmul&, const Plan&, int64_t, int64_t);

}  // namespace fkv
