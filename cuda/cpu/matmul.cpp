// matmul.cpp: how the tiles cover a phase. Few rows stream W once, converted in registers: bound by memory. Many rows
// convert W panel by panel into the first cache and run register tiles over it: bound by multiply-add.
#include <algorithm>

#include "dense.h"
#include "tiles.h"

namespace fkv {
namespace {

// Tiles by register width: 32 registers of 64 bytes hold 4 rows of x by 4 of W; narrower files have 16, for one row of
// x by 4.
template <int B>
constexpr int kTileX = B == 64 ? 4 : 1;
// Rows of W in flight where there is one row of x.
template <int B>
constexpr int kTileOfOneRow = B == 64 ? 8 : kTile;

// What each task is: one of `units` groups of W's rows for one of `blocks` of x's rows.
struct Plan {
  bool direct;  // no panels: as many rows of x as one tile takes
  int64_t unit_rows, units, block_rows, blocks;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int B>
Plan plan_of(const Matmul& job) {
  Plan plan;
  plan.direct = job.n_rows <= kTileX<B>;
  plan.unit_rows = job.n_rows == 1 ? kTileOfOneRow<B> : kTile;
  plan.units = ceil_div(job.n_out, plan.unit_rows);
  if (plan.direct) {
    plan.block_rows = job.n_rows;
  } else {
    // Rows of x that fit half of a common second cache; where sums must wait between panels, at most what there is room
    // for.
    const int64_t fit = std::max<int64_t>(16, (1 << 20) / (job.padded * 4) / kTile * kTile);
    plan.block_rows = std::min(job.n_rows, job.padded <= kPanelK ? fit : std::min(fit, kMaxSaved * kTileX<B>));
  }
  plan.blocks = ceil_div(job.n_rows, plan.block_rows);
  return plan;
}

// Pointers to the rows of W from out0 on; beyond the last row, that row again (its sums are dropped). Returns how many
// are real.
template <class Rows, int W>
FKV_INLINE int64_t weight_rows(const typename Rows::Element** rows, const Matmul& job, int64_t out0) {
  const auto* weight = static_cast<const typename Rows::Element*>(job.weight);
#pragma GCC unroll 8
  for (int64_t r = 0; r < W; ++r) rows[r] = weight + std::min(out0 + r, job.n_out - 1) * job.k;
  return std::min<int64_t>(W, job.n_out - out0);
}

template <int B, class Rows, int W, int X>
FKV_INLINE void direct_unit(const Matmul& job, int64_t unit) {
  const typename Rows::Element* rows[W];
  const int64_t width = weight_rows<Rows, W>(rows, job, unit * W);
  finish_tile(job, direct_tile<B, Rows, W, X>(rows, job.x, job.k, job.padded), 0, unit * W, width);
}

// A panel of W: columns begin..end of rows out0 .. out0 + width − 1.
struct Panel {
  const float* values;
  int64_t out0, width, begin, end;
};

// One tile over a panel. Its sums wait in `saved` until the last panel of these rows.
template <int B, int X>
FKV_INLINE void panel_unit(const Matmul& job, const Panel& panel, Sums<B, kTile, X>* saved, int64_t row) {
  Sums<B, kTile, X> sums{};
  if (panel.begin > 0) sums = *saved;
  const float* x = job.x + row * job.padded + panel.begin;
  sums = panel_tile<B, X>(sums, panel.values, x, job.padded, ceil_div(panel.end - panel.begin, kLanes));
  if (panel.end < job.k)
    *saved = sums;
  else
    finish_tile(job, sums, row, panel.out0, panel.width);
}

// All rows row0..row1 of x against one unit of W; the rows that fill no tile one at a time.
template <int B, class Rows>
FKV_INLINE void panel_block(const Matmul& job, int64_t row0, int64_t row1, int64_t unit) {
  constexpr int X = kTileX<B>;
  alignas(64) float values[kPanelK * kTile];
  Sums<B, kTile, X> saved[kMaxSaved];
  Sums<B, kTile, 1> saved_rest[X];
  const typename Rows::Element* rows[kTile];
  Panel panel;
  panel.values = values;
  panel.out0 = unit * kTile;
  panel.width = weight_rows<Rows, kTile>(rows, job, panel.out0);
  for (panel.begin = 0; panel.begin < job.k; panel.begin += kPanelK) {
    panel.end = std::min(job.k, panel.begin + kPanelK);
    fill_panel<B, Rows>(values, rows, panel.begin, panel.end);
    int64_t row = row0;
    for (int64_t i = 0; row + X <= row1; ++i, row += X) panel_unit<B, X>(job, panel, saved + i % kMaxSaved, row);
    if constexpr (X > 1)
      for (int64_t i = 0; row < row1; ++i, ++row) panel_unit<B, 1>(job, panel, saved_rest + i, row);
  }
}

template <int B, class Rows>
FKV_INLINE void run(const Matmul& job, const Plan& plan, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    if (!plan.direct) {
      const int64_t row0 = task / plan.units * plan.block_rows;
      panel_block<B, Rows>(job, row0, std::min(job.n_rows, row0 + plan.block_rows), task % plan.units);
    } else if (job.n_rows == 1) {
      direct_unit<B, Rows, kTileOfOneRow<B>, 1>(job, task);
    } else if constexpr (kTileX<B> == 4) {
      if (job.n_rows == 2)
        direct_unit<B, Rows, kTile, 2>(job, task);
      else if (job.n_rows == 3)
        direct_unit<B, Rows, kTile, 3>(job, task);
      else
        direct_unit<B, Rows, kTile, 4>(job, task);
    }
  }
}

#define FKV_TASKS const Matmul &job, const Plan &plan, int64_t begin, int64_t end
FKV_TARGET_64 void run64_f32(FKV_TASKS) { run<64, RowsF32<64>>(job, plan, begin, end); }
FKV_TARGET_64 void run64_bf16(FKV_TASKS) { run<64, RowsBf16<64>>(job, plan, begin, end); }
FKV_TARGET_64 void run64_f16(FKV_TASKS) { run<64, RowsF16<64>>(job, plan, begin, end); }
FKV_TARGET_32 void run32_f32(FKV_TASKS) { run<32, RowsF32<32>>(job, plan, begin, end); }
FKV_TARGET_32 void run32_bf16(FKV_TASKS) { run<32, RowsBf16<32>>(job, plan, begin, end); }
FKV_TARGET_32 void run32_f16(FKV_TASKS) { run<32, RowsF16<32>>(job, plan, begin, end); }
void run16_f32(FKV_TASKS) { run<16, RowsF32<16>>(job, plan, begin, end); }
void run16_bf16(FKV_TASKS) { run<16, RowsBf16<16>>(job, plan, begin, end); }
void run16_f16(FKV_TASKS) { run<16, RowsF16<16>>(job, plan, begin, end); }

// By dtype.
typedef void (*Tasks)(FKV_TASKS);
constexpr Tasks kTasks64[] = {run64_f32, run64_bf16, run64_f16};
constexpr Tasks kTasks32[] = {run32_f32, run32_bf16, run32_f16};
constexpr Tasks kTasks16[] = {run16_f32, run16_bf16, run16_f16};
#undef FKV_TASKS

}  // namespace

void matmul(Context& context, const Matmul& job) {
  const int width = widest_lanes();
  const Tasks tasks = (width == 64 ? kTasks64 : width == 32 ? kTasks32 : kTasks16)[job.dtype];
  const Plan plan = width == 64 ? plan_of<64>(job) : width == 32 ? plan_of<32>(job) : plan_of<16>(job);
  // A share of work is worth handing to another thread from about 2^17 multiply-adds on.
  const int64_t task_cost = plan.unit_rows * plan.block_rows * job.padded;
  const int64_t grain = std::max<int64_t>(1, (1 << 17) / task_cost);
  context.parallel(plan.units * plan.blocks, grain, [&](int64_t begin, int64_t end) { tasks(job, plan, begin, end); });
}

}  // namespace fkv
