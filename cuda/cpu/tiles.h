// tiles.h: register tiles of the matmul. A tile is some rows of x by some rows of W, each pair with its own vector of sixteen partial
// sums; tiles differ in shape and in how they read W, never in the order of a sum.
#pragma once
#include "dense.h"
#include "math.h"

namespace fkv {

constexpr int kTile = 4;           // rows of W in a panel
constexpr int64_t kPanelK = 1024;  // its columns: 16 KiB of f32, which stays in the first cache beside the rows of x
constexpr int64_t kMaxSaved = 16;  // tiles whose sums wait while the panel moves along k

template <int W, int X>
struct Sums {
  vec at[X][W];
};

template <int W, int X>
FKV_INLINE Sums<W, X> no_sums() {
  Sums<W, X> sums;
  for (int i = 0; i < X; ++i)
    for (int r = 0; r < W; ++r) sums.at[i][r] = vec{};
  return sums;
}

// W straight from its storage; rows[r] points at a row of W, x at the first of X padded rows.
template <class Stored, int W, int X>
FKV_INLINE Sums<W, X> direct_tile(const typename Stored::Element* const* rows, const float* x, int64_t k, int64_t padded) {
  typedef typename Stored::Element Element;
  Sums<W, X> sums = no_sums<W, X>();
  const Element* w[W];
  for (int r = 0; r < W; ++r) w[r] = rows[r];
  const int64_t whole = k / kLanes * kLanes;
  for (int64_t at = 0; at < whole; at += kLanes) {
    vec xs[X];
    for (int i = 0; i < X; ++i) xs[i] = StoredF32::load(x + i * padded + at);
    for (int r = 0; r < W; ++r) {
      const vec ws = Stored::load(w[r] + at);
      for (int i = 0; i < X; ++i) sums.at[i][r] += xs[i] * ws;
    }
  }
  if (whole < k) {
    for (int r = 0; r < W; ++r) {
      const vec ws = Stored::load_tail(w[r] + whole, k - whole);
      for (int i = 0; i < X; ++i) sums.at[i][r] += StoredF32::load(x + i * padded + whole) * ws;
    }
  }
  return sums;
}

// Converts columns begin..end (end a multiple of 16 or k) of kTile rows of W to f32: panel [columns / 16][kTile][16].
template <class Stored>
FKV_INLINE void fill_panel(float* panel, const typename Stored::Element* const* rows, int64_t begin, int64_t end) {
  int64_t at = begin;
  for (; at + kLanes <= end; at += kLanes, panel += kTile * kLanes)
    for (int r = 0; r < kTile; ++r) store_vec(panel + r * kLanes, Stored::load(rows[r] + at));
  if (at < end)
    for (int r = 0; r < kTile; ++r) store_vec(panel + r * kLanes, Stored::load_tail(rows[r] + at, end - at));
}

// Adds `steps` vectors of columns of a panel to the sums; x points at the panel's first column of the first of X rows.
template <int X>
FKV_INLINE void panel_tile(Sums<kTile, X>& sums, const float* panel, const float* x, int64_t padded, int64_t steps) {
  Sums<kTile, X> local = sums;  // a copy, so that the loop keeps it in registers
  for (int64_t s = 0; s < steps; ++s, panel += kTile * kLanes, x += kLanes) {
    vec ws[kTile];
    for (int r = 0; r < kTile; ++r) ws[r] = StoredF32::load(panel + r * kLanes);
    for (int i = 0; i < X; ++i) {
      const vec xs = StoredF32::load(x + i * padded);
      for (int r = 0; r < kTile; ++r) local.at[i][r] += xs * ws[r];
    }
  }
  sums = local;
}

// Sixteen sums at once in the tree of sum_lanes: each level folds two vectors into one, halves of both side by side.
FKV_INLINE vec sum_lanes_of_16(const vec* v) {
  const veci low8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}, high8 = low8 + 8;
  const veci low4 = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}, high4 = low4 + 4;
  const veci low2 = {0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29}, high2 = low2 + 2;
  const veci low1 = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}, high1 = low1 + 1;
  vec a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i)
    a[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], low8) + __builtin_shuffle(v[2 * i], v[2 * i + 1], high8);
  for (int i = 0; i < 4; ++i)
    b[i] = __builtin_shuffle(a[2 * i], a[2 * i + 1], low4) + __builtin_shuffle(a[2 * i], a[2 * i + 1], high4);
  for (int i = 0; i < 2; ++i)
    c[i] = __builtin_shuffle(b[2 * i], b[2 * i + 1], low2) + __builtin_shuffle(b[2 * i], b[2 * i + 1], high2);
  return __builtin_shuffle(c[0], c[1], low1) + __builtin_shuffle(c[0], c[1], high1);
}

// Lane i·W + r = the sum of x row i and W row r; lanes beyond X·W are zero.
template <int W, int X>
FKV_INLINE vec tile_sums(const Sums<W, X>& sums) {
  static_assert(W * X <= kLanes);
  if constexpr (W * X == kLanes) return sum_lanes_of_16(&sums.at[0][0]);
  vec out{};
  for (int i = 0; i < X; ++i)
    for (int r = 0; r < W; ++r) out[i * W + r] = sum_lanes(sums.at[i][r]);
  return out;
}

// Bias and epilogue of outputs out0 .. out0 + width − 1 (width <= W; even for SWIGLU) of x rows row0 .. row0 + X − 1.
template <int W, int X>
FKV_INLINE void finish_tile(const Matmul& job, const Sums<W, X>& sums, int64_t row0, int64_t out0, int64_t width) {
  vec v = tile_sums(sums);
  float values[kLanes];
  if (job.bias != nullptr) {
    store_vec(values, v);
    for (int r = 0; r < width; ++r) {
      const float bias = load(job.bias, out0 + r, job.dtype);
      for (int i = 0; i < X; ++i) values[i * W + r] += bias;
    }
    v = StoredF32::load(values);
  }
  if (job.epilogue == FKV_SWIGLU) {
    float silu[kLanes];
    store_vec(silu, v / (1.0f + exp_vec(-v)));
    store_vec(values, v);
    for (int i = 0; i < X; ++i) {
      float* y = job.y + (row0 + i) * job.y_stride + out0 / 2;
      for (int r = 0; r < width; r += 2) y[r / 2] = silu[i * W + r] * values[i * W + r + 1];
    }
    return;
  }
  store_vec(values, v);
  for (int i = 0; i < X; ++i) {
    float* y = job.y + (row0 + i) * job.y_stride + out0;
    if (job.epilogue == FKV_ADD) {
      for (int r = 0; r < width; ++r) y[r] += values[i * W + r];
    } else {
      for (int r = 0; r < width; ++r) y[r] = values[i * W + r];
    }
  }
}

}  // namespace fkv
