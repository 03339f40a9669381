// topk.cuh: the best candidates of a cluster's blocks, in order of rank, in every block: each block lists its own best, hands the list to
// all, and all merge the lists alike.
//
// Ranks are counted, not sorted for: a key's rank is the number of keys above it, as no two are equal. Where a block has more than 256
// candidates only those compete that reach the K-th best of 128 groups' best keys: at most K groups' members, and the K best are among
// them.
#pragma once
#include "score.cuh"

namespace fkv {

constexpr int32_t kMostListed = 128;   // ranks wanted, and one more
constexpr int32_t kListPitch = kMostListed + 1;  // keys from one block's list to the next: in banks of its own
constexpr int32_t kMostKeys = 1024;    // that compete in a block
constexpr int32_t kGroups = kServeThreads / 2;

// ---- ranking: score descending, index ascending, NaN last ----

// Greater for what ranks earlier; ties are equal. −0 ties with +0.
__device__ __forceinline__ uint32_t order_of(float score) {
  const uint32_t bits = __float_as_uint(score);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0;
  if (bits == 0x80000000u) return 0x80000000u;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
// The total order. 0 is below every key.
__device__ __forceinline__ uint64_t key_of(float score, int32_t index) {
  return static_cast<uint64_t>(order_of(score)) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(index));
}
__device__ __forceinline__ int32_t index_of(uint64_t key) { return static_cast<int32_t>(~static_cast<uint32_t>(key)); }

// Whether a block that has `pages` candidates can list that many ranks.
FKV_INLINE bool lists_ranks(int32_t pages, int32_t ranks) {
  return ranks < kMostListed && (pages <= kServeThreads || ranks * (pages / kGroups) <= kMostKeys);
}

// How long a list is in memory, so that a search need not look where it ends.
FKV_INLINE int32_t list_length(int32_t ranks) {
  int32_t length = 1;
  while (length <= ranks) length *= 2;
  return length;
}

// visit(i, rank) for each of keys[0..n), which are distinct but for zeros, by two neighbouring threads (which of them: threadIdx.x % 2).
// keys[n] may be read and written where n is odd.
template <class Visit>
__device__ __forceinline__ void count_ranks(uint64_t* keys, int32_t n, const Visit& visit) {
  const int32_t side = threadIdx.x % 2, half = (n + 3) / 4 * 2;  // even
  if (n % 2 != 0 && threadIdx.x == 0) keys[n] = 0;
  __syncthreads();
  for (int32_t first = 0; first < n; first += kServeThreads / 2) {
    const int32_t i = first + static_cast<int32_t>(threadIdx.x) / 2, end = side == 0 ? half : n;
    const uint64_t key = i < n ? keys[i] : ~uint64_t{0};
    int32_t rank = 0;
#pragma unroll 8
    for (int32_t j = side * half; j < end; j += 2) {
      const ulonglong2 pair = *reinterpret_cast<const ulonglong2*>(keys + j);
      rank += (pair.x > key) + (pair.y > key);
    }
    rank += __shfl_xor_sync(kAllLanes, rank, 1);
    if (i < n) visit(i, rank);
  }
}

// Of the block's pages i (score(i, page), a number or NaN), the best `ranks` into list peers.rank of every block, zeros behind them.
// keys: [kMostKeys]. Between two peers.sync().
template <class Score>
__device__ __forceinline__ void list_best(uint64_t* lists, uint64_t* keys, int32_t ranks, int32_t n, const Share& share, const Peers& peers,
                                          const Score& score) {
  __shared__ uint64_t least;
  __shared__ int32_t n_keys;
  const int32_t pages = share.pages();
  const auto key = [&](int32_t i) {
    const int32_t page = share.page(i);
    return page < n ? key_of(score(i), page) : uint64_t{0};
  };
  int32_t competing = pages, there = 0;
  if (pages <= kServeThreads) {
    const uint64_t own = threadIdx.x < pages ? key(threadIdx.x) : 0;
    if (threadIdx.x < pages) keys[threadIdx.x] = own;
    there = __syncthreads_count(own != 0);
  } else {
    uint64_t best = 0;
    for (int32_t i = threadIdx.x; i < pages; i += kServeThreads) {
      const uint64_t own = key(i);
      best = own > best ? own : best;
    }
    const uint64_t other = __shfl_xor_sync(kAllLanes, best, 1);
    best = other > best ? other : best;
    keys[threadIdx.x / 2] = best;
    if (threadIdx.x == 0) {
      least = 1;
      n_keys = 0;
    }
    count_ranks(keys, kGroups, [&](int32_t i, int32_t rank) {
      if (rank == ranks - 1 && keys[i] != 0) least = keys[i];
    });
    __syncthreads();
    for (int32_t i = threadIdx.x; i < pages; i += kServeThreads) {
      const uint64_t own = key(i);
      if (own >= least) keys[atomicAdd(&n_keys, 1)] = own;
    }
    __syncthreads();
    competing = there = n_keys;
  }
  uint64_t* const own_list = lists + peers.rank * kListPitch;
  count_ranks(keys, competing, [&](int32_t i, int32_t rank) {
    if (keys[i] == 0 || rank >= ranks) return;
    for (int32_t other = threadIdx.x % 2; other < peers.size; other += 2) *peers.of(own_list + rank, other) = keys[i];
  });
  there = min(there, ranks);
  for (int32_t i = threadIdx.x; i < (list_length(ranks) - there) * peers.size; i += kServeThreads)
    *peers.of(own_list + there + (i >> __popc(peers.size - 1)), i & (peers.size - 1)) = 0;
}

// best[0..ranks) of all lists; a barrier follows before they are read.
__device__ __forceinline__ void merge_lists(uint64_t* best, const uint64_t* lists, int32_t ranks, const Peers& peers) {
  const int32_t top = list_length(ranks) / 2;
  for (int32_t i = threadIdx.x; i < ranks * peers.size; i += kServeThreads) {
    const int32_t own = i & (peers.size - 1), place = i >> __popc(peers.size - 1);  // clusters are powers of two
    const uint64_t key = lists[own * kListPitch + place];
    int32_t above[kClusterBlocks] = {};
    for (int32_t step = top; step > 0; step /= 2) {
#pragma unroll
      for (int32_t other = 0; other < kClusterBlocks; ++other) {
        if (other < peers.size && lists[other * kListPitch + above[other] + step - 1] > key) above[other] += step;
      }
    }
    int32_t rank = 0;  // in its own list it finds its place
#pragma unroll
    for (int32_t other = 0; other < kClusterBlocks; ++other) rank += above[other];
    if (key != 0 && rank < ranks) best[rank] = key;
  }
}

}  // namespace fkv
