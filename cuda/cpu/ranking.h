// ranking.h: the best of many scores, by (score descending, index ascending), NaN last: one total order, so that the
// answer depends on nothing else.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "twin.h"

namespace fkv {

class Ranking {
 public:
  void clear() { keys_.clear(); }
  int32_t size() const { return static_cast<int32_t>(keys_.size()); }
  // Index of the score at a place of the ranking.
  int32_t at(int32_t place) const { return static_cast<int32_t>(~static_cast<uint32_t>(keys_[place])); }

  // The first `best` places hold the best scores in no order, unless `more` > 0 places follow: then all are in rank
  // order. best >= 1, best + more <= n.
  void rank(const float* scores, int32_t n, int32_t best, int32_t more) {
    const size_t wanted = static_cast<size_t>(best) + more;
    keys_.clear();
    int32_t i = 0;
    for (; i < best + more; ++i) keys_.push_back(key(scores[i], i));
    // A later score enters only if it beats the worst that is held; equal ones lose to the lower index that came
    // before. The worst is refreshed when the buffer is full, so that few scores are ever looked at twice.
    float worst = *std::min_element(scores, scores + i, before);
    for (; i < n; ++i) {
      if (scores[i] <= worst) continue;  // false for NaN on either side: the keys decide
      keys_.push_back(key(scores[i], i));
      if (keys_.size() < 2 * wanted + kSlack) continue;
      keep(wanted);
      worst = scores[at(static_cast<int32_t>(wanted) - 1)];
    }
    keep(wanted);
    if (more > 0) std::sort(keys_.begin(), keys_.end(), std::greater<>());
  }

 private:
  static constexpr size_t kSlack = 64;

  // Greater for what ranks earlier.
  static uint64_t key(float score, int32_t index) {
    const float value = score + 0.0f;  // −0 ties with +0
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    if (value != value) order = 0;
    return static_cast<uint64_t>(order) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(index));
  }
  static bool before(float a, float b) { return key(a, 0) < key(b, 0); }

  // The `wanted` greatest keys, the least of them at the end.
  void keep(size_t wanted) {
    if (keys_.size() <= wanted) return;
    std::nth_element(keys_.begin(), keys_.begin() + static_cast<int64_t>(wanted) - 1, keys_.end(), std::greater<>());
    keys_.resize(wanted);
  }

  std::vector<uint64_t> keys_;
};

}  // namespace fkv
