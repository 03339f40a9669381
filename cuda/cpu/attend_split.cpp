// attend_split.cpp: scores, softmax and weighted sum over one split's pages. The query heads of a group are taken
// together, so that K and V are loaded and widened once for up to four of them. Orders that never change on a machine:
// a score sums the register's lanes over ascending d, then the lane tree; the sum of weights sums the lanes over
// ascending tokens, then the lane tree; an output channel adds tokens one by one, ascending.
#include "attend_split.h"

#include <algorithm>

#include "lanes.h"

namespace fkv {
namespace {

constexpr float kNever = -__builtin_inff();  // score of no token

// B: bytes of a vector. Rows: how K and V are stored (lanes.h).
template <int B, template <int> class Rows>
struct Kernel {
  typedef Lanes<B> L;
  typedef typename L::F F;
  typedef Rows<B> Stored;
  typedef typename Stored::Element Element;

  // scores[j][t] = q[j] · K[t] for Q queries and the page's rows, n/Q rows at a time. A last, partial set computes its
  // last row again and writes past the page's rows, within the sixteen that belong to no other page.
  template <int Q>
  static FKV_INLINE void score(const Split& split, const PageRows& page, const float* q, float* scores) {
    constexpr int kRows = L::n / Q;
    const int64_t score_stride = int64_t{kSplitPages} * split.page_size;
    for (int32_t t0 = 0; t0 < page.rows; t0 += kRows) {
      const Element* keys[kRows];
      for (int t = 0; t < kRows; ++t) {
        keys[t] = reinterpret_cast<const Element*>(page.keys + std::min(t0 + t, page.rows - 1) * page.stride);
      }
      F sums[L::n] = {};
      int64_t c = 0;
      for (; c + L::n <= split.head_dim; c += L::n) {
#pragma GCC unroll 16
        for (int t = 0; t < kRows; ++t) {
          const F k = Stored::load(keys[t] + c);
#pragma GCC unroll 4
          for (int j = 0; j < Q; ++j) sums[reversed(j * kRows + t, L::n)] += L::load(q + j * split.width + c) * k;
        }
      }
      if (c < split.head_dim) {
#pragma GCC unroll 16
        for (int t = 0; t < kRows; ++t) {
          const F k = Stored::load_half(keys[t] + c);
#pragma GCC unroll 4
          for (int j = 0; j < Q; ++j) sums[reversed(j * kRows + t, L::n)] += L::load(q + j * split.width + c) * k;
        }
      }
      float flat[L::n];
      L::store(flat, sum_each<B>(sums));
      for (int j = 0; j < Q; ++j) std::memcpy(scores + j * score_stride + t0, flat + j * kRows, kRows * sizeof(float));
    }
  }

  // sums[j][c..] += Σ_t weights[j][t]·V[t][c..] over the page's rows, ascending, for Q queries and C vectors of columns
  // (Half: half one).
  template <int Q, int C, bool Half>
  static FKV_INLINE void weigh_columns(const Split& split, const PageRows& page, const float* weights, float* sums,
                                       int64_t c) {
    const int64_t weight_stride = int64_t{kSplitPages} * split.page_size;
    F total[Q][C];
#pragma GCC unroll 4
    for (int j = 0; j < Q; ++j) {
#pragma GCC unroll 4
      for (int i = 0; i < C; ++i) total[j][i] = L::load(sums + j * split.stride + c + i * L::n);
    }
    for (int32_t t = 0; t < page.rows; ++t) {
      const Element* values = reinterpret_cast<const Element*>(page.values + t * page.stride) + c;
#pragma GCC unroll 4
      for (int i = 0; i < C; ++i) {
        const F v = Half ? Stored::load_half(values) : Stored::load(values + i * L::n);
#pragma GCC unroll 4
        for (int j = 0; j < Q; ++j) total[j][i] += weights[j * weight_stride + t] * v;
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < Q; ++j) {
#pragma GCC unroll 4
      for (int i = 0; i < C; ++i) L::store(sums + j * split.stride + c + i * L::n, total[j][i]);
    }
  }

  template <int Q>
  static FKV_INLINE void weigh(const Split& split, const PageRows& page, const float* weights, float* sums) {
    constexpr int kColumns = B == 64 ? 4 : 2;  // Q of them fit the registers beside V and a weight
    int64_t c = 0;
    for (; c + kColumns * L::n <= split.head_dim; c += kColumns * L::n) {
      weigh_columns<Q, kColumns, false>(split, page, weights, sums, c);
    }
    for (; c + L::n <= split.head_dim; c += L::n) weigh_columns<Q, 1, false>(split, page, weights, sums, c);
    if (c < split.head_dim) weigh_columns<Q, 1, true>(split, page, weights, sums, c);
  }

  // scores → weights exp(score − maximum), and the two numbers of `summary`. `n` tokens; whole vectors, the rest weighs
  // nothing.
  static FKV_INLINE void softmax(float* scores, int32_t n, float* summary) {
    const int32_t padded = (n + L::n - 1) / L::n * L::n;
    for (int32_t t = n; t < padded; ++t) scores[t] = kNever;
    F best = F{} + kNever, total{};
    for (int32_t t = 0; t < padded; t += L::n) {
      const F score = L::load(scores + t);
      best = score > best ? score : best;
    }
    const float maximum = max_lanes(best);
    for (int32_t t = 0; t < padded; t += L::n) {
      const F weight = exp_lanes(L::load(scores + t) - maximum);
      L::store(scores + t, weight);
      total += weight;
    }
    summary[0] = maximum;
    summary[1] = sum_lanes(total);
  }

  static FKV_INLINE void run(const Split& split) {
    const int64_t score_stride = int64_t{kSplitPages} * split.page_size;
    int32_t tokens = 0;
    for (int32_t i = 0; i < split.n_pages; ++i) {
      const PageRows& page = split.pages[i];
      const float* q = split.q;
      float* scores = split.scores + i * split.page_size;
      int32_t left = split.group;
      for (; left >= 4; left -= 4, q += 4 * split.width, scores += 4 * score_stride) score<4>(split, page, q, scores);
      for (; left >= 2; left -= 2, q += 2 * split.width, scores += 2 * score_stride) score<2>(split, page, q, scores);
      if (left > 0) score<1>(split, page, q, scores);
      tokens += page.rows;
    }
    for (int32_t j = 0; j < split.group; ++j) {
      float* sums = split.sums + j * split.stride;
      softmax(split.scores + j * score_stride, tokens, sums + split.width);
      std::memset(sums, 0, static_cast<size_t>(split.width) * sizeof(float));
    }
    for (int32_t i = 0; i < split.n_pages; ++i) {
      const PageRows& page = split.pages[i];
      const float* weights = split.scores + i * split.page_size;
      float* sums = split.sums;
      int32_t left = split.group;
      for (; left >= 4; left -= 4, weights += 4 * score_stride, sums += 4 * split.stride)
        weigh<4>(split, page, weights, sums);
      for (; left >= 2; left -= 2, weights += 2 * score_stride, sums += 2 * split.stride)
        weigh<2>(split, page, weights, sums);
      if (left > 0) weigh<1>(split, page, weights, sums);
    }
  }
};

typedef void (*Run)(const Split&);
FKV_TARGET_64 void run_f32_64(const Split& split) { Kernel<64, RowsF32>::run(split); }
FKV_TARGET_64 void run_bf16_64(const Split& split) { Kernel<64, RowsBf16>::run(split); }
FKV_TARGET_64 void run_f16_64(const Split& split) { Kernel<64, RowsF16>::run(split); }
FKV_TARGET_32 void run_f32_32(const Split& split) { Kernel<32, RowsF32>::run(split); }
FKV_TARGET_32 void run_bf16_32(const Split& split) { Kernel<32, RowsBf16>::run(split); }
FKV_TARGET_32 void run_f16_32(const Split& split) { Kernel<32, RowsF16>::run(split); }
void run_f32_16(const Split& split) { Kernel<16, RowsF32>::run(split); }
void run_bf16_16(const Split& split) { Kernel<16, RowsBf16>::run(split); }
void run_f16_16(const Split& split) { Kernel<16, RowsF16>::run(split); }
constexpr Run kRuns64[] = {run_f32_64, run_bf16_64, run_f16_64};
constexpr Run kRuns32[] = {run_f32_32, run_bf16_32, run_f16_32};
constexpr Run kRuns16[] = {run_f32_16, run_bf16_16, run_f16_16};

}  // namespace

void attend_split(const Split& split, int32_t dtype) {
  const int bytes = widest_lanes();
  (bytes == 64 ? kRuns64 : bytes == 32 ? kRuns32 : kRuns16)[dtype](split);
}

void combine_splits(float* out, float* sums, int64_t stride, int32_t n, int64_t width, int32_t head_dim) {
  typedef Lanes<16> L;
  float* summary = sums + width;
  float maximum = kNever, total = 0.0f;
  for (int32_t s = 0; s < n; ++s) maximum = std::max(maximum, summary[s * stride]);
  for (int32_t s = 0; s < n; ++s) {
    const float weight = exp_lanes(L::F{} + (summary[s * stride] - maximum))[0];
    total += weight * summary[s * stride + 1];
    summary[s * stride] = weight;
  }
  for (int64_t c = 0; c < head_dim; c += L::n) {
    L::F sum{};
    for (int32_t s = 0; s < n; ++s) sum += summary[s * stride] * L::load(sums + s * stride + c);
    L::store(out + c, sum / total);
  }
}

}  // namespace fkv
