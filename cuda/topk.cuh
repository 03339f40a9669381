// topk.cuh: the best candidates of a cluster's blocks, in order of rank, in every block: each block lists its own best, hands the list to
// all, and all merge the lists alike.
//
// Ranks are counted, not sorted for: a key's rank is the number of keys above it, as no two are equal. Where a block has more than 256
// candidates only those compete that reach the K-th best of 128 groups' best keys: at most K groups' members, and the K best are among
// them.
#pragma once
#include "score.cuh"

namespace fkv {

constexpr int32_t kMostListed = 128;   // ranks wanted
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
  return ranks <= kMostListed && (pages <= kServeThreads || ranks * (pages / kGroups) <= kMostKeys);
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

// Of the block's pages i (score(i, page), a number or NaN), the best `ranks` into list peers.rank of every block, zeros where there
// are fewer. keys: [kMostKeys]. Between two peers.sync().
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
  for (int32_t i = threadIdx.x; i < (ranks - there) * peers.size; i += kServeThreads)
    *peers.of(own_list + there + (i >> __popc(peers.size - 1)), i & (peers.size - 1)) = 0;
}

// best[0..ranks) of all lists; a barrier follows before they are read. Only keys compete that reach the worst of the lists' keys at the
// place where all lists together have `ranks` of them: seldom twice as many as are wanted. keys: [kMostKeys].
__device__ __forceinline__ void merge_lists(uint64_t* best, uint64_t* keys, const uint64_t* lists, int32_t ranks, const Peers& peers) {
  __shared__ int32_t n_keys;
  const int32_t shift = __popc(peers.size - 1), place = (ranks + peers.size - 1) >> shift;  // clusters are powers of two
  uint64_t least = ~uint64_t{0};
  for (int32_t list = 0; list < peers.size; ++list) {
    const uint64_t key = lists[list * kListPitch + place - 1];
    least = key < least ? key : least;
  }
  if (threadIdx.x == 0) n_keys = 0;
  __syncthreads();
  for (int32_t first = 0; first < ranks * peers.size; first += kServeThreads) {
    const int32_t i = first + static_cast<int32_t>(threadIdx.x), lane = threadIdx.x % kWarp;
    const uint64_t key = i < ranks * peers.size ? lists[(i & (peers.size - 1)) * kListPitch + (i >> shift)] : 0;
    const bool competes = key != 0 && key >= least;
    const unsigned competing = __ballot_sync(kAllLanes, competes);
    int32_t at = 0;
    if (lane == 0 && competing != 0) at = atomicAdd(&n_keys, __popc(competing));
    at = __shfl_sync(kAllLanes, at, 0) + __popc(competing & ((1u << lane) - 1));
    if (competes) keys[at] = key;
  }
  __syncthreads();
  count_ranks(keys, n_keys, [&](int32_t i, int32_t rank) {
    if (rank < ranks && threadIdx.x % 2 == 0) best[rank] = keys[i];
  });
}

}  // namespace fkv
