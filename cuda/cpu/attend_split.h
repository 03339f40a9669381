// attend_split.h: attention of one query group over at most eight pages, and how such splits are combined.
#pragma once
#include <cstdint>

#include "twin.h"

namespace fkv {

constexpr int32_t kSplitPages = 8;  // part of the numerics of the twin's fkv_attend

// K and V of one page of one head: rows `stride` bytes apart, of which the first `rows` are attended.
struct PageRows {
  const char *keys, *values;
  int64_t stride;
  int32_t rows;
};

// One split of one KV head. `width` is head_dim rounded up to whole vectors; every array is aligned to 64 bytes. Only
// the last page of all may have fewer than page_size rows.
struct Split {
  const float* q;  // [group][width] times attention_scale, zeros from head_dim on
  float* scores;   // [group][kSplitPages·page_size] work memory
  float* sums;     // [group], `stride` floats apart, out: [width] Σ weight·V, then the maximum score and Σ weight
  PageRows pages[kSplitPages];
  int32_t n_pages, group, page_size, head_dim;
  int64_t width, stride;
};

// Fills `sums`. weight = exp(score − maximum); a NaN among the scores makes all of the result NaN.
void attend_split(const Split& split, int32_t dtype);

// One query head's output [head_dim] from `n` splits' sums, `stride` floats apart, in their order. Spoils the maxima.
void combine_splits(float* out, float* sums, int64_t stride, int32_t n, int64_t width, int32_t head_dim);

}  // namespace fkv
