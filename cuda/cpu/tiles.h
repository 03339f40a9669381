// tiles.h: register tiles of the matmul. A tile is some rows of x by some rows of W, each pair with its own sixteen
// partial sums; tiles differ in shape, in how they read W and in the width of the registers that hold the sixteen (`B`
// bytes), never in the order of a sum.
#pragma once
#include <algorithm>

#include "dense.h"
#include "lanes.h"
#include "math.h"

namespace fkv {

constexpr int kTile = 4;           // rows of W in a panel
constexpr int64_t kPanelK = 1024;  // its columns: 16 KiB of f32, which stays in the first cache beside the rows of x
constexpr int64_t kMaxSaved = 16;  // tiles whose sums wait while the panel moves along k

// Sixteen consecutive values of a row, or their partial sums.
template <int B>
struct Sixteen {
  static constexpr int n = 64 / B;
  typename Lanes<B>::F part[n];
};
template <int B, class Rows>
FKV_INLINE Sixteen<B> load16(const typename Rows::Element* p) {
  Sixteen<B> v;
#pragma GCC unroll 4
  for (int i = 0; i < Sixteen<B>::n; ++i) v.part[i] = Rows::load(p + i * Lanes<B>::n);
  return v;
}
// The last `left` < 16 values of a row, then zeros; nothing past the row is read.
template <int B, class Rows>
FKV_INLINE Sixteen<B> load16_tail(const typename Rows::Element* p, int64_t left) {
  typename Rows::Element values[kLanes] = {};
  std::memcpy(values, p, static_cast<size_t>(left) * sizeof *p);
  return load16<B, Rows>(values);
}

template <int B, int W, int X>
struct Sums {
  Sixteen<B> at[X][W];
};

template <int B, int W, int X>
FKV_INLINE void accumulate(Sums<B, W, X>& sums, int x_row, int w_row, const Sixteen<B>& x, const Sixteen<B>& w) {
#pragma GCC unroll 4
  for (int i = 0; i < Sixteen<B>::n; ++i) sums.at[x_row][w_row].part[i] += x.part[i] * w.part[i];
}

// W straight from its storage; rows[r] points at a row of W, x at the first of X padded rows.
template <int B, class Rows, int W, int X>
FKV_INLINE Sums<B, W, X> direct_tile(const typename Rows::Element* const* rows, const float* x, int64_t k,
                                     int64_t padded) {
  Sums<B, W, X> sums{};
  const int64_t whole = k / kLanes * kLanes;
  for (int64_t at = 0; at < whole; at += kLanes) {
    Sixteen<B> xs[X];
#pragma GCC unroll 4
    for (int i = 0; i < X; ++i) xs[i] = load16<B, RowsF32<B>>(x + i * padded + at);
#pragma GCC unroll 8
    for (int r = 0; r < W; ++r) {
      const Sixteen<B> ws = load16<B, Rows>(rows[r] + at);
#pragma GCC unroll 4
      for (int i = 0; i < X; ++i) accumulate(sums, i, r, xs[i], ws);
    }
  }
  if (whole < k) {
#pragma GCC unroll 8
    for (int r = 0; r < W; ++r) {
      const Sixteen<B> ws = load16_tail<B, Rows>(rows[r] + whole, k - whole);
#pragma GCC unroll 4
      for (int i = 0; i < X; ++i) accumulate(sums, i, r, load16<B, RowsF32<B>>(x + i * padded + whole), ws);
    }
  }
  return sums;
}

// Converts columns begin..end (end a multiple of 16 or k) of kTile rows of W to f32: panel [columns / 16][kTile][16].
template <int B, class Rows>
FKV_INLINE void fill_panel(float* panel, const typename Rows::Element* const* rows, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kLanes, panel += kTile * kLanes) {
#pragma GCC unroll 4
    for (int r = 0; r < kTile; ++r) {
      const Sixteen<B> v =
          at + kLanes <= end ? load16<B, Rows>(rows[r] + at) : load16_tail<B, Rows>(rows[r] + at, end - at);
#pragma GCC unroll 4
      for (int i = 0; i < Sixteen<B>::n; ++i) Lanes<B>::store(panel + r * kLanes + i * Lanes<B>::n, v.part[i]);
    }
  }
}

// Adds `steps` vectors of columns of a panel to the sums; x points at the panel's first column of the first of X rows.
template <int B, int X>
FKV_INLINE Sums<B, kTile, X> panel_tile(Sums<B, kTile, X> sums, const float* panel, const float* x, int64_t padded,
                                        int64_t steps) {
  for (int64_t s = 0; s < steps; ++s, panel += kTile * kLanes, x += kLanes) {
    Sixteen<B> ws[kTile];
#pragma GCC unroll 4
    for (int r = 0; r < kTile; ++r) ws[r] = load16<B, RowsF32<B>>(panel + r * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < X; ++i) {
      const Sixteen<B> xs = load16<B, RowsF32<B>>(x + i * padded);
#pragma GCC unroll 4
      for (int r = 0; r < kTile; ++r) accumulate(sums, i, r, xs, ws[r]);
    }
  }
  return sums;
}

// Sixteen sums at once in the tree of sum_lanes: each level folds two vectors into one, halves of both side by side.
FKV_INLINE vec sum_lanes_of_16(const Sixteen<64>* v) {
  const veci low8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}, high8 = low8 + 8;
  const veci low4 = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}, high4 = low4 + 4;
  const veci low2 = {0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29}, high2 = low2 + 2;
  const veci low1 = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}, high1 = low1 + 1;
  const auto fold = [](vec a, vec b, veci low, veci high) __attribute__((always_inline)) {
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  };
  vec a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = fold(v[2 * i].part[0], v[2 * i + 1].part[0], low8, high8);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) b[i] = fold(a[2 * i], a[2 * i + 1], low4, high4);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) c[i] = fold(b[2 * i], b[2 * i + 1], low2, high2);
  return fold(c[0], c[1], low1, high1);
}
template <int B>
FKV_INLINE float sum16(const Sixteen<B>& v) {
  if constexpr (B == 64)
    return sum_lanes(v.part[0]);
  else if constexpr (B == 32)
    return sum_lanes(v.part[0] + v.part[1]);
  else
    return sum_lanes((v.part[0] + v.part[2]) + (v.part[1] + v.part[3]));
}

// Bias and epilogue of `width` outputs from out0 on of x rows row0 .. row0 + X − 1. values: of x row i and W row r at
// i·W + r, dense up to whole vectors.
template <int B, int W, int X>
FKV_INLINE void write_outputs(const Matmul& job, float* values, int64_t row0, int64_t out0, int64_t width) {
  typedef Lanes<B> L;
  if (job.bias != nullptr) {
    for (int r = 0; r < width; ++r) {
      const float bias = load(job.bias, out0 + r, job.dtype);
      for (int i = 0; i < X; ++i) values[i * W + r] += bias;
    }
  }
  float* y = job.y + row0 * job.y_stride + (job.epilogue == FKV_SWIGLU ? out0 / 2 : out0);
  if (job.epilogue == FKV_SWIGLU) {
    float silu[kLanes];
#pragma GCC unroll 4
    for (int i = 0; i < W * X; i += L::n) {
      const typename L::F v = L::load(values + i);
      L::store(silu + i, v / (1.0f + exp_lanes(-v)));
    }
    for (int i = 0; i < X; ++i, y += job.y_stride)
      for (int r = 0; r < width; r += 2) y[r / 2] = silu[i * W + r] * values[i * W + r + 1];
  } else if (job.epilogue == FKV_ADD) {
    for (int i = 0; i < X; ++i, y += job.y_stride)
      for (int r = 0; r < width; ++r) y[r] += values[i * W + r];
  } else {
    for (int i = 0; i < X; ++i, y += job.y_stride)
      for (int r = 0; r < width; ++r) y[r] = values[i * W + r];
  }
}

// The end of a tile: lane sums, bias, epilogue. width <= W outputs are real (an even number for SWIGLU).
template <int B, int W, int X>
FKV_INLINE void finish_tile(const Matmul& job, const Sums<B, W, X>& sums, int64_t row0, int64_t out0, int64_t width) {
  static_assert(W * X <= kLanes);
  float values[kLanes] = {};
  if constexpr (B == 64 && W * X == kLanes) {
    Lanes<B>::store(values, sum_lanes_of_16(&sums.at[0][0]));
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < W * X; ++i) values[i] = sum16(sums.at[i / W][i % W]);
  }
  if (width == W)
    write_outputs<B, W, X>(job, values, row0, out0, W);  // the usual case, with loops of known length
  else
    write_outputs<B, W, X>(job, values, row0, out0, width);
}

}  // namespace fkv
