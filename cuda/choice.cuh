// choice.cuh: one cluster of blocks choosing among a row's logits: the best by count or by weight, the token at which a
// running weight passes a target.
//
// Weights are whole numbers, e^((logit − top)/temperature)·2^shift, with 2^shift such that their sum fits 62 bits: sums of whole
// numbers are exact in any order, whatever threads and blocks do. NaN logits rank and weigh as −inf.
//
// Each warp has one range of ids, blocks and warps ascending. A lane keeps its logits in shared memory and reads those that
// find no room there from memory each time.
#pragma once
#include "cluster.cuh"

namespace fkv {

typedef unsigned long long Whole;

constexpr int kChoiceThreads = 1024, kChoiceWarps = kChoiceThreads / kWarp;
constexpr int kDigits = 2048;  // of 11 bits
constexpr int kGroup = 32, kGroups = kDigits / kGroup;

__device__ __forceinline__ float without_nan(float v) { return v != v ? -INFINITY : v; }

// Rising keys for rising logits; 0 and −0 are equal.
__device__ __forceinline__ uint32_t key_of(float v) {
  v = without_nan(v);
  const uint32_t bits = v == 0.0f ? 0u : __float_as_uint(v);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// kCopies of the histogram: neighbouring lanes do not wait for each other.
template <int kCopies>
struct ChoiceMemory {
  uint32_t low[kCopies][kDigits], high[kCopies][kDigits];  // halves of a histogram's sums
  Whole bins[2][kDigits], groups[2][kGroups];              // what the cluster's blocks show each other, by turns
  Whole sums[2], group_sums[kGroups];
  Whole totals[kChoiceWarps];  // of each warp, see locate()
  Whole above, equal;  // of the bin found
  int32_t bin, found, n_listed;
  int32_t listed[FKV_MAX_TOP], gathered[FKV_MAX_TOP];
};

// The tokens kept: those whose key is larger, and those of this key with ids before `end`.
struct Cut {
  uint32_t key;
  int32_t end;
};

// How tokens are measured: each counts one, or weighs by its logit.
struct Measure {
  float top, rate;  // rate: log2 e / temperature, or 0: count
  float scale;

  static __device__ __forceinline__ Measure count() { return {0.0f, 0.0f, 0.0f}; }
  static __device__ __forceinline__ Measure weight(float top, float temperature, int32_t vocab) {
    // vocab < 2^(32 − clz): all sums < 2^62.
    return {top, 1.4426950408889634f / temperature, static_cast<float>(1ull << (30 + __clz(vocab)))};
  }
  // A logit equal to the largest weighs 1 whatever it is, so that infinities make no NaN; a NaN is of an infinite temperature.
  __device__ __forceinline__ Whole operator()(float v) const {
    if (scale == 0.0f) return 1;
    v = without_nan(v);
    const float weight = v == top ? 1.0f : exp2f((v - top) * rate);
    return weight > 0.0f ? __float2ull_rn(weight * scale) : 0;
  }
};

// Logits of a thread.
__host__ __device__ constexpr int32_t choice_turns(int32_t vocab, int blocks) {
  return static_cast<int32_t>((int64_t{vocab} + blocks * kChoiceThreads - 1) / (blocks * kChoiceThreads));
}

// One row's logits as a cluster of kBlocks chooses from them. All methods are called by all threads of all its blocks.
template <int kBlocks>
class Choice {
 public:
  static constexpr int kCopies = kBlocks > 1 ? 4 : 1;
  typedef ChoiceMemory<kCopies> Memory;

  // `held`: shared memory for `turns` logits of each thread.
  __device__ __forceinline__ Choice(const float* logits, int32_t vocab, Memory& shared, float* held, int32_t turns)
      : logits_(logits),
        vocab_(vocab),
        each_(choice_turns(vocab, kBlocks)),
        held_turns_(turns),
        shared_(shared),
        held_(held + threadIdx.x) {
    first_ = (int64_t{Cluster<kBlocks>::rank()} * kChoiceWarps + warp()) * each_ * kWarp + lane();
    constexpr int kAhead = 8;
    for (int first = 0; first < turns; first += kAhead) {
      float v[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) v[i] = first + i < turns && id_of(first + i) < vocab ? logits[id_of(first + i)] : 0.0f;
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (first + i < turns) held_[(first + i) * kChoiceThreads] = v[i];
    }
  }

  __device__ __forceinline__ bool keeps(const Cut& cut, int32_t id, uint32_t key) const {
    return key > cut.key || (key == cut.key && id < cut.end);
  }
  __device__ __forceinline__ Cut everything() const { return {0, vocab_}; }

  // Total of the tokens kept. Leaves each warp's and block's share for locate().
  __device__ __forceinline__ Whole total(const Cut& cut, const Measure& measure) {
    return total_where([&](int32_t id, float v) { return keeps(cut, id, key_of(v)) ? measure(v) : 0; });
  }
  // First id at which the running measure exceeds `target` < total(cut, measure), which was called last.
  __device__ __forceinline__ int32_t locate(const Cut& cut, const Measure& measure, Whole target) {
    return locate_where([&](int32_t id, float v) { return keeps(cut, id, key_of(v)) ? measure(v) : 0; }, target);
  }

  // Of the tokens kept, by falling logit and rising id, the first whose running measure reaches need(total), and those before it.
  // 1 <= need(total) <= total.
  template <class Need>
  __device__ Cut narrow(const Cut& cut, const Measure& measure, const Need& need_of) {
    uint32_t prefix = 0, decided = 0;
    Whole need = 0;
#pragma unroll 1
    for (int pass = 0; pass < 3; ++pass) {
      const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
      const uint32_t digit = pass < 2 ? 0x7ffu : 0x3ffu;
      for (int i = threadIdx.x; i < kCopies * kDigits; i += kChoiceThreads) shared_.low[0][i] = 0, shared_.high[0][i] = 0;
      __syncthreads();
      scan([&](int32_t id, float v) {
        const uint32_t key = key_of(v);
        const bool in = id < vocab_ && keeps(cut, id, key) && (key & decided) == prefix;
        add_to_bin(in ? static_cast<int32_t>(key >> shift & digit) : -1, in ? measure(v) : 0);
      });
      show_bins();
      if (pass == 0) need = need_of(sum_groups());
      else sum_groups();
      find_bin(need);
      need -= shared_.above;
      prefix |= static_cast<uint32_t>(shared_.bin) << shift;
      decided |= digit << shift;
    }
    // Tokens of one key measure the same.
    const Whole each = measure(value_of(prefix)), n = shared_.equal / each, wanted = (need + each - 1) / each;
    Cut narrower{prefix, prefix == cut.key ? cut.end : vocab_};
    if (wanted < n) {
      const auto same = [&](int32_t id, float v) { return key_of(v) == prefix && keeps(cut, id, prefix) ? Whole{1} : 0; };
      total_where(same);
      narrower.end = locate_where(same, wanted - 1) + 1;
    }
    return narrower;
  }

  // Each block's ids kept, in any order, FKV_MAX_TOP in all, in its shared.listed; gather_list() by one thread of one block,
  // before the cluster's next barrier, puts them together in shared.gathered.
  __device__ __forceinline__ void list(const Cut& cut) {
    if (threadIdx.x == 0) shared_.n_listed = 0;
    __syncthreads();
    scan([&](int32_t id, float v) {
      if (id < vocab_ && keeps(cut, id, key_of(v))) {
        const int at = atomicAdd(&shared_.n_listed, 1);
        if (at < FKV_MAX_TOP) shared_.listed[at] = id;
      }
    });
    Cluster<kBlocks>::sync();
  }

  __device__ __forceinline__ void gather_list() {
    int n = 0;
    for (int rank = 0; rank < kBlocks; ++rank) {
      const int listed = *Cluster<kBlocks>::of(&shared_.n_listed, rank);
      for (int i = 0; i < listed && n < FKV_MAX_TOP; ++i) shared_.gathered[n++] = Cluster<kBlocks>::of(shared_.listed, rank)[i];
    }
  }

  __device__ __forceinline__ float logit(int32_t id) const { return without_nan(logits_[id]); }

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
  __device__ __forceinline__ int64_t id_of(int i) const { return first_ + int64_t{i} * kWarp; }
  // What a block shows the others lies in one of two places: it is written again only after a barrier that ends all reading of
  // it.
  __device__ __forceinline__ void flip() { turn_ ^= 1; }

  static __device__ __forceinline__ Whole warp_total(Whole value) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
    return value;
  }
  // Inclusive, by rising lane.
  static __device__ __forceinline__ Whole warp_running(Whole value) {
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const Whole before = __shfl_up_sync(kAllLanes, value, step);
      if (lane() >= step) value += before;
    }
    return value;
  }

  // Calls body(id, logit) for every id of this lane, ascending, and for ids past the end so that whole warps take part.
  template <class Body>
  __device__ __forceinline__ void scan(const Body& body) const {
#pragma unroll 4
    for (int i = 0; i < held_turns_; ++i) body(clamped(id_of(i)), held_[i * kChoiceThreads]);
#pragma unroll 4
    for (int i = held_turns_; i < each_; ++i) body(clamped(id_of(i)), id_of(i) < vocab_ ? logits_[id_of(i)] : 0.0f);
  }
  __device__ __forceinline__ int32_t clamped(int64_t id) const { return static_cast<int32_t>(id < vocab_ ? id : vocab_); }

  // Adds where bin >= 0. A warp whose lanes share a bin, as those of equal logits do, adds once. Two halves with a carry: shared
  // memory has no 64-bit addition of its own.
  __device__ __forceinline__ void add_to_bin(int32_t bin, Whole amount) {
    const int32_t first = __shfl_sync(kAllLanes, bin, 0);
    if (__all_sync(kAllLanes, bin == first)) {
      if (first < 0) return;
      amount = warp_total(amount);
      if (lane() != 0) return;
    }
    if (bin < 0) return;
    const int copy = lane() % kCopies;
    const uint32_t low = static_cast<uint32_t>(amount), before = atomicAdd(&shared_.low[copy][bin], low);
    const uint32_t high = static_cast<uint32_t>(amount >> 32) + (before + low < before ? 1u : 0u);
    if (high != 0) atomicAdd(&shared_.high[copy][bin], high);
  }

  // Puts the block's histogram, and the sums of its groups of bins, where the cluster sees them.
  __device__ __forceinline__ void show_bins() {
    static_assert(kDigits == 2 * kChoiceThreads && kGroup == 32);
    flip();
    __syncthreads();
    Whole pair = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int bin = 2 * static_cast<int>(threadIdx.x) + half;
      Whole sum = 0;
#pragma unroll
      for (int copy = 0; copy < kCopies; ++copy)
        sum += static_cast<Whole>(shared_.high[copy][bin]) << 32 | shared_.low[copy][bin];
      shared_.bins[turn_][bin] = sum;
      pair += sum;
    }
#pragma unroll
    for (int step = kGroup / 4; step > 0; step /= 2) pair += __shfl_xor_sync(kAllLanes, pair, step);
    if (lane() % (kGroup / 2) == 0) shared_.groups[turn_][threadIdx.x / (kGroup / 2)] = pair;
    Cluster<kBlocks>::sync();
  }
  // The cluster's sum of each group, the highest first, into group_sums; returns all of it.
  __device__ __forceinline__ Whole sum_groups() {
    static_assert(kGroups * kBlocks <= kChoiceThreads && kGroups == 2 * kWarp);
    if (threadIdx.x < kGroups * kBlocks) {
      const int group = kGroups - 1 - static_cast<int>(threadIdx.x) / kBlocks;
      Whole sum = *Cluster<kBlocks>::of(&shared_.groups[turn_][group], static_cast<int>(threadIdx.x) % kBlocks);
#pragma unroll
      for (int step = kBlocks / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
      if (threadIdx.x % kBlocks == 0) shared_.group_sums[kGroups - 1 - group] = sum;
    }
    __syncthreads();
    return warp_total(shared_.group_sums[2 * lane()] + shared_.group_sums[2 * lane() + 1]);
  }
  // The highest bin at which the sum from the top reaches `need`, into shared_.bin; its own sum into equal, what lies above
  // into above.
  __device__ __forceinline__ void find_bin(Whole need) {
    if (warp() == 0) {
      const Whole high = shared_.group_sums[2 * lane()], mine = high + shared_.group_sums[2 * lane() + 1];
      const Whole through = warp_running(mine), before = through - mine;
      const int owner = __ffs(static_cast<int>(__ballot_sync(kAllLanes, before < need && need <= through))) - 1;
      const bool first = before + high >= need;
      const int group = __shfl_sync(kAllLanes, kGroups - 1 - (first ? 2 * lane() : 2 * lane() + 1), owner);
      const Whole above = __shfl_sync(kAllLanes, first ? before : before + high, owner);
      const int bin = group * kGroup + kGroup - 1 - lane();
      Whole sum = 0;
#pragma unroll
      for (int rank = 0; rank < kBlocks; ++rank) sum += *Cluster<kBlocks>::of(&shared_.bins[turn_][bin], rank);
      const Whole reached = above + warp_running(sum);
      if (reached - sum < need && need <= reached) shared_.bin = bin, shared_.above = reached - sum, shared_.equal = sum;
    }
    __syncthreads();
  }

  template <class Of>
  __device__ __forceinline__ Whole total_where(const Of& of) {
    Whole sum = 0;
    scan([&](int32_t id, float v) { sum += id < vocab_ ? of(id, v) : 0; });
    sum = warp_total(sum);
    __syncthreads();  // totals of the call before have been read
    if (lane() == 0) shared_.totals[warp()] = sum;
    flip();
    __syncthreads();
    if (warp() == 0) {
      const Whole all = warp_total(shared_.totals[lane()]);
      if (lane() == 0) shared_.sums[turn_] = all;
    }
    Cluster<kBlocks>::sync();
    Whole all = 0;
#pragma unroll
    for (int rank = 0; rank < kBlocks; ++rank) all += *Cluster<kBlocks>::of(&shared_.sums[turn_], rank);
    return all;
  }
  template <class Of>
  __device__ __forceinline__ int32_t locate_where(const Of& of, Whole target) {
    Whole before = 0, own = 0;
#pragma unroll
    for (int rank = 0; rank < kBlocks; ++rank) {
      const Whole sum = *Cluster<kBlocks>::of(&shared_.sums[turn_], rank);
      if (rank < Cluster<kBlocks>::rank()) before += sum;
      if (rank == Cluster<kBlocks>::rank()) own = sum;
    }
    if (before <= target && target < before + own) {  // true of one block
      const Whole mine = shared_.totals[lane()], through = before + warp_running(mine);
      const int winner = __ffs(static_cast<int>(__ballot_sync(kAllLanes, target < through))) - 1;
      Whole running = __shfl_sync(kAllLanes, through - mine, winner);
      if (warp() == winner) {
        for (int i = 0; i < each_; ++i) {
          const int64_t id = id_of(i);
          const float v = i < held_turns_ ? held_[i * kChoiceThreads] : id < vocab_ ? logits_[id] : 0.0f;
          const Whole reached = running + warp_running(id < vocab_ ? of(static_cast<int32_t>(id), v) : 0);
          const unsigned beyond = __ballot_sync(kAllLanes, reached > target);
          if (beyond != 0) {
            const int32_t found = static_cast<int32_t>(__shfl_sync(kAllLanes, id, __ffs(static_cast<int>(beyond)) - 1));
            if (lane() < kBlocks) *const_cast<int32_t*>(Cluster<kBlocks>::of(&shared_.found, lane())) = found;
            break;
          }
          running = __shfl_sync(kAllLanes, reached, kWarp - 1);
        }
      }
    }
    Cluster<kBlocks>::sync();
    return shared_.found;
  }

  const float* logits_;
  int32_t vocab_, each_, held_turns_, turn_ = 0;
  int64_t first_;
  Memory& shared_;
  float* held_;
};

}  // namespace fkv
