// choice.cuh: one block choosing among a row's logits: the best by count or by weight, the token at which a running
// weight passes a target.
//
// Weights are whole numbers, e^((logit − top)/temperature)·2^shift, with 2^shift such that their sum fits 62 bits: sums
// of whole numbers are exact in any order, whatever threads and blocks do. NaN logits rank and weigh as −inf.
#pragma once
#include "common.cuh"

namespace fkv {

constexpr int kChoiceThreads = 1024, kChoiceWarps = kChoiceThreads / kWarp;
constexpr int kDigits = 2048;  // of 11 bits

__device__ __forceinline__ float without_nan(float v) { return v != v ? -INFINITY : v; }

// A logit equal to the largest weighs 1 whatever it is, so that infinities make no NaN.
__device__ __forceinline__ float weight_of(float v, float top, float temperature) {
  v = without_nan(v);
  return v == top ? 1.0f : expf((v - top) / temperature);
}

struct ChoiceMemory {
  unsigned long long bins[kDigits];
  unsigned long long totals[kChoiceWarps];
  double sums[kChoiceWarps];
  float values[kChoiceWarps];
  int32_t ids[kChoiceWarps];
  unsigned long long above;  // of the bin found
  int32_t bin, found, n_listed;
  int32_t listed[FKV_MAX_TOP];
  fkv_result result;
};

// The tokens kept: those whose key is larger, and those of this key with ids before `end`.
struct Cut {
  uint32_t key;
  int32_t end;
};

// Rising keys for rising logits; 0 and −0 are equal.
__device__ __forceinline__ uint32_t key_of(float v) {
  v = without_nan(v);
  const uint32_t bits = v == 0.0f ? 0u : __float_as_uint(v);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// One row's logits as the block chooses from them. All methods are called by all threads.
class Choice {
 public:
  __device__ __forceinline__ Choice(const float* logits, int32_t vocab, float top, ChoiceMemory& shared)
      : logits_(logits), vocab_(vocab), top_(top), shared_(shared) {}

  // How weights are measured; by default each token counts 1.
  __device__ __forceinline__ void weigh(float temperature) {
    temperature_ = temperature;
    scale_ = static_cast<double>(1ull << (30 + __clz(vocab_)));  // vocab < 2^(32 − clz): all sums < 2^62
  }

  __device__ __forceinline__ bool keeps(const Cut& cut, int32_t id, uint32_t key) const {
    return key > cut.key || (key == cut.key && id < cut.end);
  }

  // Total measure of the tokens kept. Leaves each warp's share in shared_.totals (see locate).
  __device__ __forceinline__ unsigned long long total(const Cut& cut, bool weighted) {
    return total_where(Kept{*this, cut, weighted});
  }
  // First id at which the running measure exceeds `target` < total(cut, weighted), which was called last.
  __device__ __forceinline__ int32_t locate(const Cut& cut, bool weighted, unsigned long long target) {
    return locate_where(Kept{*this, cut, weighted}, target);
  }

  // Of the tokens kept, by falling logit and rising id, the first whose running measure reaches `need`, and those
  // before it. 1 <= need <= total(cut, weighted).
  __device__ Cut narrow(const Cut& cut, bool weighted, unsigned long long need) {
    uint32_t prefix = 0, decided = 0;
    unsigned long long equal = 0;
#pragma unroll 1
    for (int pass = 0; pass < 3; ++pass) {
      const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
      const uint32_t digit = pass < 2 ? 0x7ffu : 0x3ffu;
      for (int i = threadIdx.x; i < kDigits; i += kChoiceThreads) shared_.bins[i] = 0;
      __syncthreads();
      scan([&](int32_t id, float v) {
        const uint32_t key = key_of(v);
        const bool in = id < vocab_ && keeps(cut, id, key) && (key & decided) == prefix;
        add_to_bin(in ? static_cast<int32_t>(key >> shift & digit) : -1, in ? measure(v, weighted) : 0);
      });
      __syncthreads();
      find_bin(need);
      need -= shared_.above;
      equal = shared_.bins[shared_.bin];
      prefix |= static_cast<uint32_t>(shared_.bin) << shift;
      decided |= digit << shift;
      __syncthreads();
    }
    // Tokens of one key weigh the same: `equal` is a whole number of them.
    const Same same{*this, cut, prefix};
    const unsigned long long n = total_where(same), each = equal / n, wanted = (need + each - 1) / each;
    Cut narrower{prefix, prefix == cut.key ? cut.end : vocab_};
    if (wanted < n) narrower.end = locate_where(same, wanted - 1) + 1;
    return narrower;
  }

  // The ids kept, in any order, at most FKV_MAX_TOP, in shared_.listed.
  __device__ __forceinline__ void list(const Cut& cut) {
    if (threadIdx.x == 0) shared_.n_listed = 0;
    __syncthreads();
    scan([&](int32_t id, float v) {
      if (id < vocab_ && keeps(cut, id, key_of(v))) {
        const int at = atomicAdd(&shared_.n_listed, 1);
        if (at < FKV_MAX_TOP) shared_.listed[at] = id;
      }
    });
    __syncthreads();
  }

  __device__ __forceinline__ float logit(int32_t id) const { return without_nan(logits_[id]); }

 private:
  struct Kept {
    const Choice& choice;
    Cut cut;
    bool weighted;
    __device__ __forceinline__ unsigned long long operator()(int32_t id, float v) const {
      return choice.keeps(cut, id, key_of(v)) ? choice.measure(v, weighted) : 0;
    }
  };
  struct Same {
    const Choice& choice;
    Cut cut;
    uint32_t key;
    __device__ __forceinline__ unsigned long long operator()(int32_t id, float v) const {
      return key_of(v) == key && choice.keeps(cut, id, key) ? 1 : 0;
    }
  };

  __device__ __forceinline__ unsigned long long measure(float v, bool weighted) const {
    if (!weighted) return 1;
    const float weight = weight_of(v, top_, temperature_);
    return weight > 0.0f ? __double2ull_rn(static_cast<double>(weight) * scale_) : 0;  // NaN: an infinite temperature
  }

  // Calls body(id, logit) for every id, and for ids past the end so that whole warps take part.
  template <class Body>
  __device__ __forceinline__ void scan(const Body& body) const {
    constexpr int kAhead = 8;
#pragma unroll 1
    for (int64_t first = threadIdx.x; first - threadIdx.x < vocab_; first += kAhead * kChoiceThreads) {
      float values[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t id = first + i * kChoiceThreads;
        values[i] = id < vocab_ ? logits_[id] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t id = first + i * kChoiceThreads;
        body(static_cast<int32_t>(id < vocab_ ? id : vocab_), values[i]);
      }
    }
  }

  // Adds where bin >= 0. A warp whose lanes share a bin, as those of equal logits do, adds once.
  __device__ __forceinline__ void add_to_bin(int32_t bin, unsigned long long amount) {
    const int32_t first = __shfl_sync(kAllLanes, bin, 0);
    if (__all_sync(kAllLanes, bin == first)) {
      if (first < 0) return;
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2) amount += __shfl_xor_sync(kAllLanes, amount, step);
      if (threadIdx.x % kWarp == 0) atomicAdd(&shared_.bins[first], amount);
    } else if (bin >= 0) {
      atomicAdd(&shared_.bins[bin], amount);
    }
  }

  // The highest bin at which the sum from the top reaches `need`, into shared_.bin; what lies above it into above.
  __device__ __forceinline__ void find_bin(unsigned long long need) {
    static_assert(kDigits == 2 * kChoiceThreads);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int high = kDigits - 1 - 2 * static_cast<int>(threadIdx.x);  // this thread's bins: high, then high − 1
    const unsigned long long mine = shared_.bins[high] + shared_.bins[high - 1];
    unsigned long long through = mine;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const unsigned long long before = __shfl_up_sync(kAllLanes, through, step);
      if (lane >= step) through += before;
    }
    if (lane == kWarp - 1) shared_.totals[warp] = through;
    __syncthreads();
    for (int i = 0; i < warp; ++i) through += shared_.totals[i];
    const unsigned long long before = through - mine;
    if (before < need && need <= through) {
      const bool first = before + shared_.bins[high] >= need;
      shared_.bin = first ? high : high - 1;
      shared_.above = first ? before : before + shared_.bins[high];
    }
    __syncthreads();
  }

  // Ids of a warp: one range, in steps of whole warps.
  __device__ __forceinline__ int64_t range() const {
    return (static_cast<int64_t>(vocab_) + kChoiceThreads - 1) / kChoiceThreads * kWarp;
  }
  template <class Measure>
  __device__ __forceinline__ unsigned long long total_where(const Measure& of) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t begin = warp * range();
    const int64_t end = begin + range() < vocab_ ? begin + range() : vocab_;
    unsigned long long sum = 0;
#pragma unroll 8
    for (int64_t id = begin + lane; id < end; id += kWarp) sum += of(static_cast<int32_t>(id), logits_[id]);
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    __syncthreads();  // totals of the call before have been read
    if (lane == 0) shared_.totals[warp] = sum;
    __syncthreads();
    unsigned long long all = 0;
    for (int i = 0; i < kChoiceWarps; ++i) all += shared_.totals[i];
    return all;
  }
  template <class Measure>
  __device__ __forceinline__ int32_t locate_where(const Measure& of, unsigned long long target) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    unsigned long long running = 0;
    for (int i = 0; i < warp; ++i) running += shared_.totals[i];
    if (running <= target && target < running + shared_.totals[warp]) {  // true of one warp
      const int64_t begin = warp * range();
      for (int64_t id = begin + lane;; id += kWarp) {
        unsigned long long through = id < vocab_ ? of(static_cast<int32_t>(id), logits_[id]) : 0;
#pragma unroll
        for (int step = 1; step < kWarp; step *= 2) {
          const unsigned long long before = __shfl_up_sync(kAllLanes, through, step);
          if (lane >= step) through += before;
        }
        through += running;
        const unsigned beyond = __ballot_sync(kAllLanes, through > target);
        if (beyond != 0) {
          if (lane == __ffs(static_cast<int>(beyond)) - 1) shared_.found = static_cast<int32_t>(id);
          break;
        }
        if (id - lane + kWarp >= begin + range()) break;
        running = __shfl_sync(kAllLanes, through, kWarp - 1);
      }
    }
    __syncthreads();
    return shared_.found;
  }

  const float* logits_;
  int32_t vocab_;
  float top_;
  ChoiceMemory& shared_;
  float temperature_ = 1.0f;
  double scale_ = 1.0;
};

}  // namespace fkv
