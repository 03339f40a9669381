// score.cuh: page scores of one KV head by the blocks of a cluster: what fkv_estimate and the fused retrieval share, so that their bits
// are the same.
//
// Pages come in units of 128 (a tile of sixteen for each of the block's warps), units in eight interleaved classes (unit u is of class
// u mod 8). A softmax's sum is made of a class's units in their order, by lane; then over the lanes of a warp, the warps, the classes:
// the same terms in the same order for any number of blocks, among which whole classes are dealt out.
#pragma once
#include "peers.cuh"
#include "tile.cuh"

namespace fkv {

constexpr int kServeThreads = 256, kServeWarps = kServeThreads / kWarp;
constexpr int kUnitPages = kServeWarps * kTilePages;
constexpr int kClasses = 8;
constexpr int32_t kRawFloats = 2112;  // raw scores that a block keeps in shared memory: 512 pages of four heads

// One KV head of one row, and what its pages are scored with.
struct Scored {
  const int32_t* blocks;       // block of each candidate
  float* raw;                  // global [G][max_pages], for what shared memory does not hold
  int32_t n, layer, head;      // n candidates
  int32_t group, first_page;   // query heads; page of candidate 0
  int32_t position;            // of q
};

__device__ __forceinline__ Scored scored_head(const fkv_cache& cache, const fkv_workspace& workspace, const fkv_row& row,
                                              const fkv_lane& lane, Query query, int32_t layer, int32_t row_index, int32_t head,
                                              int32_t stage) {
  const int32_t n = n_candidates(lane, target_length(row, stage), cache.page_size), group = cache.n_q_heads / cache.n_kv_heads;
  require(lane.sink_pages + n <= cache.max_pages);
  return {cache.block_table + static_cast<int64_t>(row.sequence) * cache.max_pages + lane.sink_pages,
          workspace.raw + miss_list(cache, row_index, head) * group * cache.max_pages,
          n,
          layer,
          head,
          group,
          lane.sink_pages,
          query_position(row, query, stage)};
}

// n floats, a multiple of 8, into shared memory; a barrier follows before they are read.
__device__ __forceinline__ void take_query(float* to, const float* from, int32_t n) {
  for (int32_t i = 4 * threadIdx.x; i < n; i += 4 * kServeThreads)
    *reinterpret_cast<float4*>(to + i) = *reinterpret_cast<const float4*>(from + i);
}

// Of some scores: their maximum, and Σ exp(score − maximum). In `whole` the reciprocal of that sum, over the group's size.
struct Tally {
  float maximum, sum;
};

// Which candidates are a block's: its classes, `depth` units of each, one after the other.
struct Share {
  int32_t rank, size, depth;

  __device__ Share(const Peers& peers, int32_t n)
      : rank(peers.rank), size(peers.size), depth((n + kClasses * kUnitPages - 1) / (kClasses * kUnitPages)) {}
  __device__ int32_t units() const { return kClasses / size * depth; }
  __device__ int32_t pages() const { return units() * kUnitPages; }
  __device__ int32_t first_page(int32_t unit) const {
    int32_t turn = 0;  // unit / depth, of few classes
    while (turn + 1 < kClasses / size && unit >= (turn + 1) * depth) ++turn;
    return ((unit - turn * depth) * kClasses + rank + turn * size) * kUnitPages;
  }
  // Candidate of the block's page i; it may lie beyond the last.
  __device__ int32_t page(int32_t i) const { return first_page(i / kUnitPages) + i % kUnitPages; }
};

constexpr int64_t most_pages_of_block(int64_t max_pages, int64_t blocks) {
  return kClasses / blocks * divide_up(max_pages, kClasses * kUnitPages) * kUnitPages;
}

// Shared memory of a block: bytes from its start, worked out by the launch, so that the kernel finds them among its constants.
struct ScoreLayout {
  int32_t q;         // float [G][d]
  int32_t columns;   // uint4 [steps][32]; none where digests have four bytes
  int32_t tallies;   // Tally [own classes][warps][G]
  int32_t classes;   // Tally [kClasses][G], of all blocks
  int32_t whole;     // Tally [G]
  int32_t scales;    // float2 [G]
  int32_t raw;       // float [kRawFloats]
  int32_t bytes;     // in all
};

// All parts that live longer than scoring lie after q and columns, which have `least` bytes or more.
inline ScoreLayout lay_out_scores(const fkv_cache& cache, int32_t blocks, int32_t least) {
  const int32_t group = group_of(cache);
  ScoreLayout layout{};
  const auto part = [&layout](int32_t bytes) {
    const int32_t start = layout.bytes;
    layout.bytes += (bytes + 15) / 16 * 16;
    return start;
  };
  layout.q = part(group * cache.head_dim * 4);
  layout.columns = part(cache.dtype == FKV_F32 ? 0 : tile_steps(cache.head_dim) * kWarp * 16);
  layout.bytes = std::max(layout.bytes, least);
  layout.tallies = part(kClasses / blocks * kServeWarps * group * 8);
  layout.classes = part(kClasses * group * 8);
  layout.whole = part(group * 8);
  layout.scales = part(group * 8);
  layout.raw = part(kRawFloats * 4);
  return layout;
}

struct ScoreMemory {
  float* q;
  uint4* columns;
  Tally *tallies, *classes, *whole;
  float2* scales;
  float* raw;

  __device__ __forceinline__ ScoreMemory(char* shared, const ScoreLayout& layout)
      : q(reinterpret_cast<float*>(shared + layout.q)),
        columns(reinterpret_cast<uint4*>(shared + layout.columns)),
        tallies(reinterpret_cast<Tally*>(shared + layout.tallies)),
        classes(reinterpret_cast<Tally*>(shared + layout.classes)),
        whole(reinterpret_cast<Tally*>(shared + layout.whole)),
        scales(reinterpret_cast<float2*>(shared + layout.scales)),
        raw(reinterpret_cast<float*>(shared + layout.raw)) {}
};

// e^(score − maximum), of which an infinite maximum is still one of the best; NaN stays NaN.
__device__ __forceinline__ float weight_of(float score, float maximum) { return score == maximum ? 1.0f : __expf(score - maximum); }
// The same where a NaN counts for nothing, so that one bad page does not cost the others their ranks.
__device__ __forceinline__ float term_of(float score, float maximum) {
  const float weight = weight_of(score, maximum);
  return weight == weight ? weight : 0.0f;
}

// Scores of the block's tiles. The block id of the first one may be loaded long before they are needed.
struct TileWalk {
  int32_t first = 0;  // block of this lane's page of the first tile
  int32_t ahead = 0;  // of the tile after the next
  const char* origin = nullptr;  // of the digests of this lane's page of the next tile, lanes 0..15 and again 16..31

  __device__ int32_t block_of(const Scored& scored, const Share& share, int32_t unit) const {
    if (unit >= share.units()) return 0;
    const int32_t page = share.first_page(unit) + static_cast<int32_t>(threadIdx.x) / kWarp * kTilePages;
    return scored.blocks[min(page + static_cast<int32_t>(threadIdx.x) % kTilePages, scored.n - 1)];
  }
  TileWalk() = default;
  __device__ TileWalk(const Scored& scored, const Share& share) {
    first = block_of(scored, share, 0);
    ahead = block_of(scored, share, 1);
  }
  // Before the first next(), once the blocks are there.
  __device__ void resolve(const fkv_cache& cache) {
    require(first >= 0);
    origin = frame_origin(cache.digests, first);
  }
  // The rows of this lane's pages of tile `unit`; then the next tile's are on their way.
  __device__ Rows next(const fkv_cache& cache, const Scored& scored, const Share& share, int32_t unit) {
    const int32_t r = static_cast<int32_t>(threadIdx.x) % kWarp / 4;
    const int64_t offset = scored.layer * cache.digests.layer + scored.head * cache.digests.head;
    const auto address = reinterpret_cast<uint64_t>(origin);
    const Rows rows{reinterpret_cast<const char*>(__shfl_sync(kAllLanes, address, r)) + offset,
                    reinterpret_cast<const char*>(__shfl_sync(kAllLanes, address, r + 8)) + offset};
    require(ahead >= 0);
    origin = frame_origin(cache.digests, ahead);
    ahead = block_of(scored, share, unit + 2);
    return rows;
  }
};

// Sends for the digests of the block's first units, of so many bytes: whether the head is flagged or not, they are needed in this layer,
// before attention or after it.
__device__ __forceinline__ void send_for_digests(const fkv_cache& cache, const Scored& scored, const Share& share, int32_t most_bytes) {
  constexpr int32_t kLine = 128;
  const int32_t bytes = cache.head_dim * static_cast<int32_t>(dtype_bytes(cache.dtype)), kv = threadIdx.x % 2;
  const int32_t units = min(share.units(), max(1, most_bytes / (2 * bytes * kUnitPages)));
  static_assert(kServeThreads == 2 * kUnitPages);
#pragma unroll 1
  for (int32_t unit = 0; unit < units; ++unit) {
    const int32_t page = share.first_page(unit) + static_cast<int32_t>(threadIdx.x) / 2;
    if (page >= scored.n) continue;
    const int32_t block = scored.blocks[page];
    require(block >= 0);
    const char* from = frame_address(cache.digests, block, scored.layer, scored.head, kv, 0);
    for (int32_t at = 0; at < bytes; at += kLine) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
  }
}

// One tile for the heads from `first_head` on, as `tile.cuh` says, scaled.
template <class T>
__device__ __forceinline__ TileScores score_tile(const fkv_cache& cache, const Rows& rows, const ScoreMemory& memory, int32_t first_head,
                                                 int32_t group) {
  TileScores scores{};
  bool bad = sizeof(T) == 4;
  if constexpr (sizeof(T) == 2) {
    scores = multiply_tile<T>(rows, cache.digests.kv, memory.columns, cache.head_dim);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (Stored<T>::kDtype == FKV_F16) {
        const int32_t head = first_head + 2 * (static_cast<int32_t>(threadIdx.x) % 2) + i % 2;
        scores.v[i] *= head < group ? memory.scales[head].y : 1.0f;
      }
      bad |= !(fabsf(scores.v[i]) < INFINITY);
    }
  }
  if (__any_sync(kAllLanes, bad)) {
    const TileScores sums = sum_tile<T>(rows, cache.digests.kv, memory.q + first_head * cache.head_dim, min(group - first_head, kSetHeads),
                                        cache.head_dim);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (sizeof(T) == 4 || !(fabsf(scores.v[i]) < INFINITY)) scores.v[i] = sums.v[i];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) scores.v[i] = __fmul_rn(cache.score_scale, scores.v[i]);  // never contracted with what follows
  return scores;
}

// Where a block's raw scores go: plane h, `stride` floats behind the one before, of query head h; a page's place is its own number, or
// that among the block's pages.
struct RawPlanes {
  float* start;
  int32_t stride;
  bool kept;  // in shared memory

  __device__ RawPlanes(const ScoreMemory& memory, const fkv_cache& cache, const Scored& scored, const Share& share) {
    stride = share.pages() + 8;  // two planes' rows in banks of their own
    kept = scored.group * stride <= kRawFloats;
    start = kept ? memory.raw : scored.raw;
    if (!kept) stride = cache.max_pages;
  }
};

// Raw scores of the block's pages under memory.q, and memory.tallies of its classes (of softmax pooling).
template <class T>
__device__ __forceinline__ void score_share(const ScoreMemory& memory, const RawPlanes& raw, const fkv_cache& cache, const Scored& scored,
                                            const Share& share, TileWalk walk) {
  const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, r = lane / 4, units = share.units(), group = scored.group;
  const bool f16 = Stored<T>::kDtype == FKV_F16;
  if (f16) {
    for (int32_t h = warp; h < group; h += kServeWarps) {
      const float2 scale = scale_of(memory.q + h * cache.head_dim, cache.head_dim);
      if (lane == 0) memory.scales[h] = scale;
    }
    __syncthreads();
  }
  for (int32_t first_head = 0; first_head < group; first_head += kSetHeads) {
    if constexpr (sizeof(T) == 2) {
      if (first_head > 0) __syncthreads();
      make_columns<T>(memory.columns, memory.q, f16 ? memory.scales : nullptr, group, cache.head_dim, first_head);
      __syncthreads();
    }
    if (first_head > 0) {
      walk = TileWalk(scored, share);
      walk.resolve(cache);
    }
    const int32_t head = first_head + 2 * (lane % 2);  // and the next one
    Tally own[2];
    for (int32_t unit = 0, turn = 0; unit < units; ++unit) {
      const int32_t page = share.first_page(unit) + warp * kTilePages;
      if (turn == 0) own[0] = own[1] = {-INFINITY, 0.0f};
      const Rows rows = walk.next(cache, scored, share, unit);
      if (page < scored.n) {
        const TileScores scores = score_tile<T>(cache, rows, memory, first_head, group);
        const bool has_low = page + r < scored.n, has_high = page + r + 8 < scored.n;
        float* to = raw.start + static_cast<int64_t>(head) * raw.stride + r + (raw.kept ? unit * kUnitPages + warp * kTilePages : page);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (head + i >= group) break;
          if (lane % 4 < 2) {
            if (has_low) to[0] = scores.v[i];
            if (has_high) to[8] = scores.v[i + 2];
            to += raw.stride;
          }
          const float low = has_low ? scores.v[i] : NAN, high = has_high ? scores.v[i + 2] : NAN;
          const float maximum = fmaxf(own[i].maximum, fmaxf(low, high));
          own[i].sum = fmaf(own[i].sum, weight_of(own[i].maximum, maximum), term_of(low, maximum) + term_of(high, maximum));
          own[i].maximum = maximum;
        }
      }
      if (++turn < share.depth) continue;
      turn = 0;
      if (cache.pooling != 0) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float maximum = own[i].maximum;
#pragma unroll
        for (int step = 16; step >= 4; step /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, step));
        float sum = __fmul_rn(own[i].sum, weight_of(own[i].maximum, maximum));
#pragma unroll
        for (int step = 16; step >= 4; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
        if (lane < 2 && head + i < group) memory.tallies[(unit / share.depth * kServeWarps + warp) * group + head + i] = {maximum, sum};
      }
    }
  }
}

// memory.whole of all candidates, from every block's tallies. All blocks have started. Whatever the pooling, all blocks of the cluster
// have scored their pages afterwards.
__device__ __forceinline__ void exchange_tallies(const ScoreMemory& memory, const fkv_cache& cache, int32_t group, const Peers& peers) {
  __syncthreads();
  const int32_t own = kClasses / peers.size * group;
  for (int32_t i = threadIdx.x; i < peers.size * own && cache.pooling == 0; i += kServeThreads) {
    const int32_t other = i / own, turn = i % own / group, head = i % group;
    const Tally* warps = memory.tallies + turn * kServeWarps * group + head;
    float maximum = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kServeWarps; ++w) maximum = fmaxf(maximum, warps[w * group].maximum);
#pragma unroll
    for (int w = 0; w < kServeWarps; ++w) sum = fmaf(warps[w * group].sum, weight_of(warps[w * group].maximum, maximum), sum);
    *peers.of(memory.classes + (peers.rank + turn * peers.size) * group + head, other) = {maximum, sum};
  }
  peers.sync();
  if (cache.pooling != 0) return;
  const int32_t c = threadIdx.x % kClasses;
  for (int32_t first = 0; first < group; first += kServeThreads / kClasses) {
    const int32_t head = first + static_cast<int32_t>(threadIdx.x) / kClasses;
    const Tally tally = head < group ? memory.classes[c * group + head] : Tally{-INFINITY, 0.0f};
    float maximum = tally.maximum;
#pragma unroll
    for (int step = kClasses / 2; step > 0; step /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, step));
    float sum = __fmul_rn(tally.sum, weight_of(tally.maximum, maximum));
#pragma unroll
    for (int step = kClasses / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (head < group && c == 0) memory.whole[head] = {maximum, 1.0f / (sum * static_cast<float>(group))};
  }
  __syncthreads();
}

// put(i, candidate, score) for the block's pages i, each by one thread.
template <class Put>
__device__ __forceinline__ void pool_share(const ScoreMemory& memory, const RawPlanes& raw, const fkv_cache& cache, const Scored& scored,
                                           const Share& share, const Put& put) {
  const fkv_forced* forced = cache.forced;
  const bool draws = forced != nullptr && forced->period > 0;
  const float share_of_one = 1.0f / static_cast<float>(scored.group);
  for (int32_t i = threadIdx.x; i < share.pages(); i += kServeThreads) {
    const int32_t page = share.page(i);
    if (page >= scored.n) continue;
    const float* of = raw.start + (raw.kept ? i : page);
    float sum = 0.0f;
    for (int32_t h = 0; h < scored.group; ++h, of += raw.stride) {
      const float score = *of;
      sum = cache.pooling != 0 ? sum + score : fmaf(weight_of(score, memory.whole[h].maximum), memory.whole[h].sum, sum);
    }
    if (cache.pooling != 0) sum *= share_of_one;
    put(i, page, draws ? forced_score(*forced, scored.position, scored.layer, scored.head, scored.first_page + page) : sum);
  }
}

}  // namespace fkv
