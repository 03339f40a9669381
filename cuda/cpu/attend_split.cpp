// attend_split.cpp: scores, softmax and weighted sum over one split's pages. The query heads of a group are taken together, so that K and V
// are loaded and widened once for up to four of them. Orders that never change: a score sums 16 lanes over ascending d, then the lane
// tree; the sum of weights 16 lanes over ascending tokens, then the lane tree; an output channel adds tokens one by one, ascending.
#include "attend_split.h"

#include <algorithm>

#include "math.h"

namespace fkv {
namespace {

constexpr float kNever = -__builtin_inff();  // score of no token

// Where the accumulator of sum i goes so that sum_sixteen returns it in lane i.
constexpr int kReversed[16] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};

// Sums over the lanes of sixteen vectors at once: lane i of the result is the sum of v[kReversed[i]], in the tree of sum_lanes. Each stage
// folds two vectors into one, so that every addition works on sixteen lanes.
FKV_INLINE vec sum_sixteen(vec (&v)[16]) {
  const veci low8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
  const veci low4 = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
  const veci low2 = {0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29};
  const veci low1 = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) v[i] = __builtin_shuffle(v[i], v[i + 8], low8) + __builtin_shuffle(v[i], v[i + 8], low8 + 8);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) v[i] = __builtin_shuffle(v[i], v[i + 4], low4) + __builtin_shuffle(v[i], v[i + 4], low4 + 4);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) v[i] = __builtin_shuffle(v[i], v[i + 2], low2) + __builtin_shuffle(v[i], v[i + 2], low2 + 2);
  return __builtin_shuffle(v[0], v[1], low1) + __builtin_shuffle(v[0], v[1], low1 + 1);
}

// scores[j][t] = q[j] · K[t] for Q queries (rows of `width` floats, zeros from head_dim on) and the page's rows, 16/Q rows at a time; a
// last, partial set computes its last row again and writes past the page's rows, within the sixteen that the next page would start at.
template <typename Stored, int Q>
FKV_INLINE void score_page(float* scores, int64_t score_stride, const float* q, int64_t width, const PageRows& page, int64_t head_dim) {
  typedef typename Stored::Element Element;
  constexpr int kRows = 16 / Q;
  for (int32_t t0 = 0; t0 < page.rows; t0 += kRows) {
    const Element* keys[kRows];
    for (int t = 0; t < kRows; ++t) {
      keys[t] = reinterpret_cast<const Element*>(page.keys + std::min(t0 + t, page.rows - 1) * page.stride);
    }
    vec sums[16] = {};
    int64_t c = 0;
    for (; c + kLanes <= head_dim; c += kLanes) {
#pragma GCC unroll 16
      for (int t = 0; t < kRows; ++t) {
        const vec k = Stored::load(keys[t] + c);
#pragma GCC unroll 4
        for (int j = 0; j < Q; ++j) sums[kReversed[j * kRows + t]] += StoredF32::load(q + j * width + c) * k;
      }
    }
    if (c < head_dim) {
#pragma GCC unroll 16
      for (int t = 0; t < kRows; ++t) {
        const vec k = Stored::load_tail(keys[t] + c, kLanes / 2);
#pragma GCC unroll 4
        for (int j = 0; j < Q; ++j) sums[kReversed[j * kRows + t]] += StoredF32::load(q + j * width + c) * k;
      }
    }
    float flat[16];
    store_vec(flat, sum_sixteen(sums));
    for (int j = 0; j < Q; ++j) std::memcpy(scores + j * score_stride + t0, flat + j * kRows, kRows * sizeof(float));
  }
}

// sums[j][c..] += Σ_t weights[j][t]·V[t][c..] over the page's rows, ascending, for Q queries and C vectors of columns (a half one: Half).
template <typename Stored, int Q, int C, bool Half>
FKV_INLINE void weigh_columns(float* sums, int64_t sum_stride, const float* weights, int64_t weight_stride, const PageRows& page, int64_t c) {
  typedef typename Stored::Element Element;
  vec total[Q][C];
#pragma GCC unroll 4
  for (int j = 0; j < Q; ++j) {
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) total[j][i] = StoredF32::load(sums + j * sum_stride + c + i * kLanes);
  }
  for (int32_t t = 0; t < page.rows; ++t) {
    const Element* values = reinterpret_cast<const Element*>(page.values + t * page.stride) + c;
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) {
      const vec v = Half ? Stored::load_tail(values, kLanes / 2) : Stored::load(values + i * kLanes);
#pragma GCC unroll 4
      for (int j = 0; j < Q; ++j) total[j][i] += weights[j * weight_stride + t] * v;
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < Q; ++j) {
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) store_vec(sums + j * sum_stride + c + i * kLanes, total[j][i]);
  }
}

template <typename Stored, int Q>
FKV_INLINE void weigh_page(float* sums, int64_t sum_stride, const float* weights, int64_t weight_stride, const PageRows& page,
                           int64_t head_dim) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= head_dim; c += 4 * kLanes) weigh_columns<Stored, Q, 4, false>(sums, sum_stride, weights, weight_stride, page, c);
  for (; c + kLanes <= head_dim; c += kLanes) weigh_columns<Stored, Q, 1, false>(sums, sum_stride, weights, weight_stride, page, c);
  if (c < head_dim) weigh_columns<Stored, Q, 1, true>(sums, sum_stride, weights, weight_stride, page, c);
}

// scores → weights exp(score − maximum), and the two numbers of `summary`. `n` tokens; whole vectors, the rest weighs nothing.
FKV_INLINE void softmax_scores(float* scores, int32_t n, float* summary) {
  const int64_t padded = pad_lanes(n);
  for (int64_t t = n; t < padded; ++t) scores[t] = kNever;
  vec best = vec_of(kNever), total{};
  for (int64_t t = 0; t < padded; t += kLanes) {
    const vec score = StoredF32::load(scores + t);
    best = score > best ? score : best;
  }
  const float maximum = max_lanes(best);
  for (int64_t t = 0; t < padded; t += kLanes) {
    const vec weight = exp_vec(StoredF32::load(scores + t) - maximum);
    store_vec(scores + t, weight);
    total += weight;
  }
  summary[0] = maximum;
  summary[1] = sum_lanes(total);
}

template <typename Stored>
FKV_INLINE void attend_split_as(const Split& split) {
  const int64_t stride = int64_t{kSplitPages} * split.page_size;
  int32_t tokens = 0;
  for (int32_t i = 0; i < split.n_pages; ++i) {
    const PageRows& page = split.pages[i];
    float* scores = split.scores + i * split.page_size;
    int32_t j = 0;
    for (; j + 4 <= split.group; j += 4) {
      score_page<Stored, 4>(scores + j * stride, stride, split.q + j * split.width, split.width, page, split.head_dim);
    }
    for (; j + 2 <= split.group; j += 2) {
      score_page<Stored, 2>(scores + j * stride, stride, split.q + j * split.width, split.width, page, split.head_dim);
    }
    if (j < split.group) score_page<Stored, 1>(scores + j * stride, stride, split.q + j * split.width, split.width, page, split.head_dim);
    tokens += page.rows;
  }
  for (int32_t j = 0; j < split.group; ++j) {
    softmax_scores(split.scores + j * stride, tokens, split.sums + j * split.stride + split.width);
    std::memset(split.sums + j * split.stride, 0, static_cast<size_t>(split.width) * sizeof(float));
  }
  for (int32_t i = 0; i < split.n_pages; ++i) {
    const PageRows& page = split.pages[i];
    const float* weights = split.scores + i * split.page_size;
    int32_t j = 0;
    for (; j + 4 <= split.group; j += 4) {
      weigh_page<Stored, 4>(split.sums + j * split.stride, split.stride, weights + j * stride, stride, page, split.head_dim);
    }
    for (; j + 2 <= split.group; j += 2) {
      weigh_page<Stored, 2>(split.sums + j * split.stride, split.stride, weights + j * stride, stride, page, split.head_dim);
    }
    if (j < split.group) weigh_page<Stored, 1>(split.sums + j * split.stride, split.stride, weights + j * stride, stride, page, split.head_dim);
  }
}

FKV_VECTOR void attend_split_f32(const Split& split) { attend_split_as<StoredF32>(split); }
FKV_VECTOR void attend_split_bf16(const Split& split) { attend_split_as<StoredBf16>(split); }
FKV_VECTOR void attend_split_f16(const Split& split) { attend_split_as<StoredF16>(split); }

}  // namespace

void attend_split(const Split& split, int32_t dtype) {
  if (dtype == FKV_F32) attend_split_f32(split);
  else if (dtype == FKV_BF16) attend_split_bf16(split);
  else attend_split_f16(split);
}

FKV_VECTOR void combine_splits(float* out, const float* sums, int64_t stride, int32_t n, int64_t width, int32_t head_dim) {
  const float* summary = sums + width;
  float maximum = kNever;
  for (int32_t s = 0; s < n; ++s) maximum = std::max(maximum, summary[s * stride]);
  for (int64_t c = 0; c < head_dim; c += kLanes) {
    vec sum{};
    float total = 0.0f;
    for (int32_t s = 0; s < n; ++s) {
      const vec weight = exp_vec(vec_of(summary[s * stride] - maximum));
      sum += weight * StoredF32::load(sums + s * stride + c);
      total += weight[0] * summary[s * stride + 1];
    }
    const vec mean = sum / total;
    if (c + kLanes <= head_dim) store_vec(out + c, mean);
    else store_vec_tail(out + c, mean, head_dim - c);
  }
}

}  // namespace fkv
