// estimate.cu: page scores: an upper bound of q·k over a page's keys, from the least and greatest value of each channel.
//
// floor: candidates·2·d values a KV head at HBM read speed (32K tokens, d 128, bf16, 8 heads: 4 MiB → 1.3 us on an H100), and one exchange
// between blocks for the softmax. Source: Quest §3; pooling over the group: FreeKV §4.
#include "cluster.cuh"
#include "pages.cuh"
#include "stages.cuh"

namespace fkv {
namespace {

constexpr int kBlockPages = 256;  // pages whose softmax terms are summed before the tree; a thread a page
constexpr int kThreads = kBlockPages, kWarps = kThreads / kWarp;
constexpr int kSetHeads = 4;          // query heads that share one pass over the digests
constexpr int64_t kMostKept = 8192;   // raw scores a block keeps between its two passes; where there are more it scores again

// One KV head of one row.
struct Unit {
  const float* q;          // [G][d]
  const int32_t* blocks;   // block of each candidate
  int32_t n, layer, head;  // n candidates
};

// Of a set of scores: their maximum, and Σ exp(score − maximum).
struct Tally {
  float maximum, sum;
};

// raw[h] = score of page first + lane for H query heads of `q`, by one warp; NaN past the candidates. max(q·min, q·max) is q times
// the end that q's sign picks, as min <= max. A page's row is shared by `width` lanes, eight channels each: ascending in a lane, then
// the lanes' tree.
template <class T, int H>
__device__ __forceinline__ void score_pages(float (&raw)[kSetHeads], const fkv_cache& cache, const Unit& unit, const float* q,
                                            int32_t width, int32_t first) {
  constexpr int kTurns = sizeof(T) == 2 ? 4 : 2;  // pages a lane has in flight
  const int32_t lane = threadIdx.x % kWarp, d = cache.head_dim, c = 8 * (lane % width), pages = kWarp / width, member = lane / width;
  const bool reads = c < d;
  int32_t block = 0;
  if (first + lane < unit.n) block = unit.blocks[first + lane];
  require(block >= 0);
  float x[H][8];
#pragma unroll
  for (int h = 0; h < H; ++h) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[h][i] = reads ? q[h * d + c + i] : 0.0f;
  }
  for (int32_t turn = 0; turn < width; turn += kTurns) {
    Packed<T> low[kTurns], high[kTurns];
#pragma unroll
    for (int j = 0; j < kTurns; ++j) {
      const int32_t page = (turn + j) * pages + member;  // of the warp's 32
      const int32_t of = __shfl_sync(kAllLanes, block, page % kWarp);
      const bool there = reads && page < kWarp && first + page < unit.n;
      const char* digest = frame_address(cache.digests, of, unit.layer, unit.head, 0, 0) + c * static_cast<int64_t>(sizeof(T));
      low[j] = there ? load_packed<T>(digest) : packed_zeros<T>();
      high[j] = there ? load_packed<T>(digest + cache.digests.kv) : packed_zeros<T>();
    }
#pragma unroll
    for (int j = 0; j < kTurns; ++j) {
      const Eight least = unpack<T>(low[j]), greatest = unpack<T>(high[j]);
#pragma unroll
      for (int h = 0; h < H; ++h) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) sum = fmaf(x[h][i], x[h][i] > 0.0f ? greatest.v[i] : least.v[i], sum);
        for (int32_t step = width / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
        sum = __shfl_sync(kAllLanes, sum, lane % pages * width);  // to the lane that the page belongs to
        if (lane / pages == turn + j) raw[h] = __fmul_rn(cache.score_scale, sum);  // never contracted with what follows
      }
    }
  }
#pragma unroll
  for (int h = 0; h < H; ++h) {
    if (first + lane >= unit.n) raw[h] = __int_as_float(0x7fc00000);
  }
}

// The same for the `heads` query heads from `set` on; `first`: of the block's 256 pages.
template <class T>
__device__ __forceinline__ void score_set(float (&raw)[kSetHeads], const fkv_cache& cache, const Unit& unit, int32_t set, int32_t heads,
                                          int32_t width, int32_t first) {
  const float* q = unit.q + static_cast<int64_t>(set) * cache.head_dim;
  first += threadIdx.x / kWarp * kWarp;
  switch (heads) {
    case 1: return score_pages<T, 1>(raw, cache, unit, q, width, first);
    case 2: return score_pages<T, 2>(raw, cache, unit, q, width, first);
    case 3: return score_pages<T, 3>(raw, cache, unit, q, width, first);
    default: return score_pages<T, 4>(raw, cache, unit, q, width, first);
  }
}

// e^(score − maximum), of which an infinite maximum is still one of the best; NaN stays NaN.
__device__ __forceinline__ float weight_of(float score, float maximum) { return score == maximum ? 1.0f : expf(score - maximum); }

// The tallies of `heads` sets of 256 scores, a thread's own in raw[]: warps' trees, then the warps in order. A NaN counts for nothing, so
// that one bad page does not cost the others their ranks.
__device__ __forceinline__ void tally_block(Tally* tallies, const float (&raw)[kSetHeads], int32_t heads) {
  __shared__ float warps[kSetHeads][kWarps];
  const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float maximum[kSetHeads];
#pragma unroll
  for (int h = 0; h < kSetHeads; ++h) {
    if (h >= heads) break;
    const float best = warp_max(fmaxf(raw[h], -INFINITY));
    if (lane == 0) warps[h][warp] = best;
  }
  __syncthreads();
#pragma unroll
  for (int h = 0; h < kSetHeads; ++h) {
    if (h >= heads) break;
    maximum[h] = warps[h][0];
    for (int w = 1; w < kWarps; ++w) maximum[h] = fmaxf(maximum[h], warps[h][w]);
  }
  __syncthreads();
#pragma unroll
  for (int h = 0; h < kSetHeads; ++h) {
    if (h >= heads) break;
    const float weight = weight_of(raw[h], maximum[h]), sum = warp_sum(weight == weight ? weight : 0.0f);
    if (lane == 0) warps[h][warp] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int h = 0; h < kSetHeads; ++h) {
    if (h >= heads || threadIdx.x != 0) break;
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += warps[h][w];
    tallies[h] = {maximum[h], sum};
  }
  __syncthreads();
}

// Blocks of 256 pages go round the kBlocks blocks of a head's cluster.
template <class T, int kBlocks>
__global__ void __launch_bounds__(kThreads, 2)
    estimate_kernel(const __grid_constant__ fkv_cache cache, const __grid_constant__ fkv_workspace workspace, const float* qkv,
                    int32_t layer, int32_t stage, int32_t width, int64_t kept) {
  extern __shared__ __align__(16) float shared[];  // tallies [own blocks][G], then `kept` raw scores
  __shared__ Tally whole[kMaxGroup];  // of all candidates; `sum` as its reciprocal
  const int32_t rank = Cluster<kBlocks>::rank(), head = blockIdx.y, row_index = blockIdx.z, group = cache.n_q_heads / cache.n_kv_heads;
  const fkv_row& row = cache.rows[row_index];
  const fkv_lane* lane = lane_of(cache, row);
  if (lane == nullptr) return;
  const Query query = serves(cache, row, *lane, layer, row_index, head, stage);
  const int32_t n = n_candidates(*lane, target_length(row, stage), cache.page_size);
  if (query == Query::none || n <= lane->k) return;
  require(lane->sink_pages + n <= cache.max_pages);
  const Unit unit{query == Query::current ? group_query(cache, qkv, row_index, head) : group_query_before(cache, *lane, layer, head),
                  cache.block_table + static_cast<int64_t>(row.sequence) * cache.max_pages + lane->sink_pages, n, layer, head};
  float* out = workspace.scores + miss_list(cache, row_index, head) * cache.max_pages;
  const int32_t blocks = (n + kBlockPages - 1) / kBlockPages, own = (blocks + kBlocks - 1 - rank) / kBlocks;
  const float share = static_cast<float>(group);

  if (cache.pooling != 0) {
    for (int32_t i = 0; i < own; ++i) {
      const int32_t first = (i * kBlocks + rank) * kBlockPages, page = first + static_cast<int32_t>(threadIdx.x);
      float sum = 0.0f;
      for (int32_t set = 0; set < group; set += kSetHeads) {
        float raw[kSetHeads] = {};
        score_set<T>(raw, cache, unit, set, min(group - set, kSetHeads), width, first);
#pragma unroll
        for (int h = 0; h < kSetHeads; ++h) sum += set + h < group ? raw[h] : 0.0f;
      }
      if (page < n) out[page] = sum / share;
    }
    return;
  }

  Tally* tallies = reinterpret_cast<Tally*>(shared);
  float* scores = shared + static_cast<int64_t>(sizeof(Tally) / sizeof(float)) * ((blocks + kBlocks - 1) / kBlocks) * group;
  const bool keeps = static_cast<int64_t>((blocks + kBlocks - 1) / kBlocks) * group * kBlockPages <= kept;
  for (int32_t i = 0; i < own; ++i) {
    for (int32_t set = 0; set < group; set += kSetHeads) {
      const int32_t heads = min(group - set, kSetHeads);
      float raw[kSetHeads] = {};
      score_set<T>(raw, cache, unit, set, heads, width, (i * kBlocks + rank) * kBlockPages);
      if (keeps) {
#pragma unroll
        for (int h = 0; h < kSetHeads; ++h) {
          if (h < heads) scores[(i * group + set + h) * kBlockPages + threadIdx.x] = raw[h];
        }
      }
      tally_block(tallies + i * group + set, raw, heads);
    }
  }
  Cluster<kBlocks>::sync();
  for (int32_t h = threadIdx.x / kWarp; h < group; h += kWarps) {
    const auto tally = [&](int32_t block) { return Cluster<kBlocks>::of(tallies, block % kBlocks)[block / kBlocks * group + h]; };
    float maximum = -INFINITY, sum = 0.0f;
    for (int32_t b = threadIdx.x % kWarp; b < blocks; b += kWarp) maximum = fmaxf(maximum, tally(b).maximum);
    maximum = warp_max(maximum);
    for (int32_t b = threadIdx.x % kWarp; b < blocks; b += kWarp) sum = fmaf(tally(b).sum, weight_of(tally(b).maximum, maximum), sum);
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) whole[h] = {maximum, 1.0f / sum};
  }
  Cluster<kBlocks>::sync();  // and no block ends while another reads its tallies
  for (int32_t i = 0; i < own; ++i) {
    const int32_t first = (i * kBlocks + rank) * kBlockPages, page = first + static_cast<int32_t>(threadIdx.x);
    float sum = 0.0f;
    for (int32_t set = 0; set < group; set += kSetHeads) {
      const int32_t heads = min(group - set, kSetHeads);
      float raw[kSetHeads] = {};
      if (!keeps) score_set<T>(raw, cache, unit, set, heads, width, first);
#pragma unroll
      for (int h = 0; h < kSetHeads; ++h) {
        if (h >= heads) break;
        if (keeps) raw[h] = scores[(i * group + set + h) * kBlockPages + threadIdx.x];
        sum = fmaf(weight_of(raw[h], whole[set + h].maximum), whole[set + h].sum, sum);
      }
    }
    if (page < n) out[page] = sum / share;
  }
}

template <class T, int kBlocks>
int32_t issue(const char* call, const fkv_cache& cache, const fkv_workspace& workspace, const float* qkv, int32_t layer, int32_t stage,
              int32_t n_rows, fkv_stream* stream) {
  const int64_t own = divide_up(divide_up(cache.max_pages, kBlockPages), kBlocks), heads = own * group_of(cache);
  const int64_t kept = heads * kBlockPages < kMostKept ? heads * kBlockPages : kMostKept;
  const size_t shared = static_cast<size_t>(heads) * sizeof(Tally) + static_cast<size_t>(kept) * sizeof(float);
  return launch_clusters(stream, call, estimate_kernel<T, kBlocks>, kBlocks, dim3(kBlocks, cache.n_kv_heads, n_rows), kThreads, shared,
                         cache, workspace, qkv, layer, stage, lanes_of_row(cache.head_dim), kept);
}

}  // namespace

int32_t issue_estimate(const char* call, const fkv_cache& cache, const fkv_workspace& workspace, const float* qkv, int32_t layer,
                       int32_t stage, int32_t n_rows, fkv_stream* stream) {
  if (n_rows == 0) return FKV_OK;
  return with_dtype(cache.dtype, [&](auto zero) {
    using T = decltype(zero);
    return has_clusters(stream) ? issue<T, kClusterBlocks>(call, cache, workspace, qkv, layer, stage, n_rows, stream)
                                : issue<T, 1>(call, cache, workspace, qkv, layer, stage, n_rows, stream);
  });
}

}  // namespace fkv

using namespace fkv;

int32_t fkv_estimate(const fkv_cache* cache, const fkv_workspace* workspace, const float* qkv, int32_t layer, int32_t stage,
                     int32_t n_rows, fkv_stream* stream) {
  const char* call = "fkv_estimate";
  if (const int32_t status = require_tables(call, cache, layer, n_rows)) return status;
  if (const int32_t status = require_workspace(call, workspace)) return status;
  if (const int32_t status = require_scoring(call, *cache, stage, qkv)) return status;
  if (const int32_t status = require_query_shape(call, *cache)) return status;
  if (const int32_t status = ready(stream, call)) return status;
  return issue_estimate(call, *cache, *workspace, qkv, layer, stage, n_rows, stream);
}
