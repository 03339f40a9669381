// sample.cpp: the next token of each row, and what a step tells the host about it.
//
// NaN logits rank and weigh as −inf. Sums are f64 in a fixed order. A draw is u in [0, 1), 24 bits of splitmix64's
// output number position + 1 from the state `seed`; the token is the first, by ascending id among those kept, at which
// the running weight exceeds u times their total.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../checks_dense.h"
#include "../frames.h"
#include "math.h"
#include "twin.h"

namespace fkv {
namespace {

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

FKV_INLINE vec without_nan(vec v) { return v != v ? vec_of(kNegativeInfinity) : v; }
FKV_INLINE float without_nan(float v) { return v != v ? kNegativeInfinity : v; }

// Largest logit; −inf where none is a number.
FKV_VECTOR float largest(const float* logits, int64_t vocab) {
  vec best = vec_of(kNegativeInfinity);
  int64_t i = 0;
  for (; i + kLanes <= vocab; i += kLanes) {
    const vec v = StoredF32::load(logits + i);
    best = v > best ? v : best;
  }
  float top = max_lanes(best);
  for (; i < vocab; ++i) top = logits[i] > top ? logits[i] : top;
  return top;
}

// weight[i] = e^((logit − top)/temperature). A logit equal to the largest weighs 1 whatever it is, so that infinities
// make no NaN.
FKV_INLINE vec weigh(vec logits, float top, float temperature) {
  const vec v = without_nan(logits);
  return exp_vec(v == top ? vec{} : (v - top) / temperature);
}
FKV_VECTOR void weigh_all(float* weight, const float* logits, int64_t vocab, float top, float temperature) {
  int64_t i = 0;
  for (; i + kLanes <= vocab; i += kLanes) store_vec(weight + i, weigh(StoredF32::load(logits + i), top, temperature));
  if (i < vocab)
    store_vec_tail(weight + i, weigh(StoredF32::load_tail(logits + i, vocab - i), top, temperature), vocab - i);
}

// ln Σ e^(logit − top).
FKV_VECTOR double log_total(const float* logits, int64_t vocab, float top) {
  double lanes[kLanes] = {};
  for (int64_t i = 0; i < vocab; i += kLanes) {
    const int64_t n = std::min(kLanes, vocab - i);
    const vec w = weigh(n == kLanes ? StoredF32::load(logits + i) : StoredF32::load_tail(logits + i, n), top, 1.0f);
    for (int64_t j = 0; j < n; ++j) lanes[j] += static_cast<double>(w[j]);
  }
  double total = 0.0;
  for (int64_t j = 0; j < kLanes; ++j) total += lanes[j];
  return std::log(total);
}

// Hands out ids by falling logit, ties by rising id, as many as are asked for: a heap in `ids`, the taken ones behind
// it.
class Ranking {
 public:
  Ranking(int32_t* ids, const float* logits, int32_t vocab) : ids_(ids), logits_(logits), vocab_(vocab) {
    for (int32_t i = 0; i < vocab; ++i) ids[i] = i;
    std::make_heap(ids, ids + vocab, below());
  }
  // Makes the first n ranks known; n <= vocab.
  void take(int32_t n) {
    for (; taken_ < n; ++taken_) std::pop_heap(ids_, ids_ + vocab_ - taken_, below());
  }
  int32_t at(int32_t rank) {
    take(rank + 1);
    return ids_[vocab_ - 1 - rank];
  }
  // The first n ranks by rising id; ranks are spent afterwards.
  const int32_t* by_id(int32_t n) {
    take(n);
    std::sort(ids_ + vocab_ - n, ids_ + vocab_);
    return ids_ + vocab_ - n;
  }

 private:
  struct Below {
    const float* logits;
    bool operator()(int32_t a, int32_t b) const {
      const float x = without_nan(logits[a]), y = without_nan(logits[b]);
      return x < y || (x == y && a > b);
    }
  };
  Below below() const { return Below{logits_}; }
  int32_t* ids_;
  const float* logits_;
  int32_t vocab_, taken_ = 0;
};

double uniform(uint64_t seed, int64_t position) {
  uint64_t z = seed + (static_cast<uint64_t>(position) + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  return static_cast<double>(z >> 40) * 0x1p-24;
}

// How many of the best tokens stay in the draw: top_k, then the smallest set that reaches top_p of what top_k left.
int32_t kept(const fkv_row& row, const float* weight, int32_t vocab, Ranking& ranking) {
  const int32_t k = row.top_k > 0 ? std::min(row.top_k, vocab) : vocab;
  if (!(row.top_p < 1.0f)) return k;
  double total = 0.0;
  if (k < vocab) {
    for (int32_t rank = 0; rank < k; ++rank) total += static_cast<double>(weight[ranking.at(rank)]);
  } else {
    for (int32_t id = 0; id < vocab; ++id) total += static_cast<double>(weight[id]);
  }
  double reached = 0.0;
  for (int32_t rank = 0; rank < k; ++rank) {
    reached += static_cast<double>(weight[ranking.at(rank)]);
    if (reached >= static_cast<double>(row.top_p) * total) return rank + 1;
  }
  return k;
}

int32_t draw(const fkv_row& row, const float* weight, int32_t vocab, Ranking& ranking) {
  const int32_t n = kept(row, weight, vocab, ranking);
  const int32_t* ids = n < vocab ? ranking.by_id(n) : nullptr;
  double total = 0.0, reached = 0.0;
  for (int32_t i = 0; i < n; ++i) total += static_cast<double>(weight[ids ? ids[i] : i]);
  const double target = uniform(row.seed, int64_t{row.position} + 1) * total;
  for (int32_t i = 0; i < n; ++i) {
    const int32_t id = ids ? ids[i] : i;
    reached += static_cast<double>(weight[id]);
    if (reached > target) return id;
  }
  return ids ? ids[n - 1] : n - 1;  // not reached: u < 1 and the two sums are the same
}

void sample_row(const fkv_cache& cache, const fkv_sample_params& params, int32_t index) {
  const fkv_row& row = cache.rows[index];
  if (row.sequence < 0) return;
  const int32_t vocab = params.vocab;
  float* lane_logits = cache.lanes[row.sequence].logits;
  const float* logits = params.logits ? params.logits + static_cast<int64_t>(index) * vocab : lane_logits;
  char* scratch = static_cast<char*>(params.scratch) + static_cast<int64_t>(index) * vocab * 8;
  float* weight = reinterpret_cast<float*>(scratch);
  int32_t* ids = reinterpret_cast<int32_t*>(scratch) + vocab;

  const float top = largest(logits, vocab);
  const double log_sum = log_total(logits, vocab, top);
  const auto log_probability = [&](int32_t id) {
    if (id >= vocab) return kNegativeInfinity;
    const float v = without_nan(logits[id]);
    return static_cast<float>((v == top ? 0.0 : static_cast<double>(v) - static_cast<double>(top)) - log_sum);
  };

  fkv_result result{};
  while (!(without_nan(logits[result.argmax]) == top)) ++result.argmax;
  result.token = result.argmax;
  result.n_top = std::clamp(row.n_top, 0, std::min(FKV_MAX_TOP, vocab));
  const bool greedy = !(row.temperature > 0.0f);
  if (!greedy || result.n_top > 0) {
    Ranking ranking(ids, logits, vocab);
    for (int32_t rank = 0; rank < result.n_top; ++rank) {
      result.top_id[rank] = ranking.at(rank);
      result.top_logprob[rank] = log_probability(result.top_id[rank]);
    }
    if (!greedy) {
      weigh_all(weight, logits, vocab, top, row.temperature);
      result.token = draw(row, weight, vocab, ranking);
    }
  }
  result.logprob = log_probability(row.target >= 0 ? row.target : result.token);
  if (top == kNegativeInfinity) result.logprob = std::numeric_limits<float>::quiet_NaN();  // no distribution to tell of
  result.stall_ns = params.stall ? *params.stall : 0;
  result.counters = cache.counters[index];

  cache.sampled[row.sequence] = result.token;
  if (params.logits) std::memcpy(lane_logits, logits, static_cast<size_t>(vocab) * sizeof *logits);
  const int64_t entry = *params.step % static_cast<uint32_t>(params.ring_entries);
  params.results[entry * cache.max_rows + index] = result;
}

}  // namespace
}  // namespace fkv

extern "C" int32_t fkv_sample(const fkv_cache* cache, const fkv_sample_params* params, fkv_stream* stream) {
  if (const int32_t status = fkv::check_sample(cache, params, stream)) return status;
  return fkv::launch(stream, "fkv_sample", [cache = *cache, params = *params](fkv::Context& context) {
    context.parallel(params.n_rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) fkv::sample_row(cache, params, static_cast<int32_t>(row));
    });
    ++*params.step;
  });
}
