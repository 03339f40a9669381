// attend.cu: paged attention of one token a row over its sink, selected and window pages (design section 3, Order).
//
// The pages that a head visits are cut into splits of 128 tokens (8, 4 or 2 pages); a warp takes a tile of sixteen of them.
// Splits s, s + n, s + 2n, … make strand s of n, which takes them in one after another; then the strands are combined in order,
// by the block that is done last. n belongs to the geometry. Which slot a page sits in, the device layout, other rows and the
// number of blocks that share a head change addresses and who does the work, never a sum.
//
// floor: the visited pages' K and V once, 2·tokens·d values a KV head, at HBM read speed (2080 tokens, d 128, bf16, 8 heads:
// 8.1 MiB → 2.5 us on an H100); measured on an H100 that reads 3.08 TB/s: 9.7 us at batch 1, 32 at 8, 104 at 32; every page of
// 131,072 tokens 191 us = 91% of that rate. What is over the floor is 6 us of a launch, four trips to memory in a row and the
// combination.
#include "attend_combine.cuh"
#include "attend_visits.cuh"
#include "early.cuh"

namespace fkv {
namespace {

constexpr const char* kCall = "fkv_attend";
constexpr int32_t kLeastStrands = 32, kMostStrands = 128;  // part of the numerics
constexpr int kBlocks = 16 / kWarps;  // of up to 128 registers a thread: what a multiprocessor holds at a time

// Strands of a KV head, a power of two; with few heads more, so that a long context has work for every multiprocessor.
int32_t strands_of(const fkv_cache& cache) {
  int32_t strands = kLeastStrands;
  while (strands < kMostStrands && strands * cache.n_kv_heads < 8 * kLeastStrands) strands *= 2;
  return strands;
}

template <int N>
struct alignas(4 * N) Floats {
  float v[N];
};

// How the block's threads share a set of heads: kThreads / 4 of them a head, kVector channels each, kPanel channels at a time.
template <int D>
struct Shares {
  static constexpr int kPanel = D < 128 ? D : 128, kPanels = D / kPanel, kVector = kSetHeads * kPanel / kThreads;
  static_assert(kVector >= 1);
  static __device__ __forceinline__ int head() { return static_cast<int>(threadIdx.x) / (kThreads / kSetHeads); }
  static __device__ __forceinline__ int channel() { return static_cast<int>(threadIdx.x) % (kThreads / kSetHeads) * kVector; }
};

// A strand's sums so far: of this thread's head and channels.
template <int D, int S>
struct Strand {
  Sums sums[S];
  float values[S][Shares<D>::kPanels][Shares<D>::kVector];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int set = 0; set < S; ++set) {
      sums[set] = {-INFINITY, 0.0f};
#pragma unroll
      for (int i = 0; i < Shares<D>::kPanels * Shares<D>::kVector; ++i) values[set][0][i] = 0.0f;
    }
  }
};

// *count + 1, after what the block wrote and before what it reads next, as other blocks see it.
__device__ __forceinline__ unsigned arrive(unsigned* count) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(count) : "memory");
  return before + 1;
}

// Block (KV head, row, rank): strands rank, rank + blocks, …
template <class T, int D, int S>
__global__ void __launch_bounds__(kThreads, D > 128 ? kBlocks / 2 : kBlocks)
    attend_kernel(const __grid_constant__ fkv_cache cache, const __grid_constant__ Job job) {
  typedef Shares<D> Share;
  constexpr int kWidth = Share::kPanel + kPartPad;
  __shared__ typename Tile<T, D, S>::Query query;
  __shared__ __align__(16) float parts[kWarps][kSetHeads * kWidth];
  __shared__ Sums tile_sums[kWarps][S * kSetHeads];
  static_assert(kMostStrands * S * kSetHeads <= kWarps * kSetHeads * kWidth);  // combine_strands' weights
  __shared__ float totals[S * kSetHeads];
  __shared__ bool last;
  const int32_t head = blockIdx.x, row_index = blockIdx.y, rank = blockIdx.z, blocks = gridDim.z, d = cache.head_dim;
  const int32_t warp = threadIdx.x / kWarp, group = cache.n_q_heads / cache.n_kv_heads;
  const int32_t pair = row_index * cache.n_kv_heads + head;
  const int32_t sequence = cache.rows[row_index].sequence, position = cache.rows[row_index].position;
  constexpr float kLog2E = 1.4426950408889634f;
  const float* q = group_query(cache, job.qkv, row_index, head);
  float* out = job.out + int64_t{pair} * group * d;
  if (sequence < 0) {
    take_over();
    if (rank == 0)
      for (int e = threadIdx.x; e < group * d; e += kThreads) out[e] = 0.0f;
    return;
  }
  const fkv_lane lane = cache.lanes[sequence];
  take_over();
  // While it is on its way, so is what tells where pages lie.
  Tile<T, D, S>::load_query(query, q, group, d, cache.attention_scale * kLog2E);
  const Visits visits = visits_of(cache, lane, job.layer, head, position);
  const int32_t per_page = cache.page_size / kTile, tile_row = warp % per_page * kTile;
  const auto place_of = [&](int32_t split) -> TilePlace {
    const Visit visit = visited(cache, lane, visits, position, (split * kWarps + warp) / per_page);
    return {lane_address(cache, lane, job.layer, visit.frame, head, 0, tile_row), cache.device.kv, cache.device.row,
            min(kTile, max(0, visit.rows - tile_row)), d};
  };

  Tile<T, D, S> tile;
  TilePlace place = place_of(rank);
  const int32_t tiles = visits.count() * per_page, splits = (tiles + kWarps - 1) / kWarps, strands = min(splits, job.strands);
  if (rank >= strands) return;
  tile.load_keys(place);
  tile.load_values(place);
  __syncthreads();

  Strand<D, S> strand;
  strand.clear();
  int32_t number = rank;
  for (int32_t split = rank; number < strands;) {
    const bool ends = split + job.strands >= splits;
    const int32_t next_number = ends ? number + blocks : number, next = ends ? next_number : split + job.strands;
    const bool more = next_number < strands;
    if (more) place = place_of(next);
    tile.score(query);
    if (more) tile.load_keys(place);
    tile.weigh(tile_sums[warp]);
#pragma unroll
    for (int set = 0; set < S; ++set) {
      float before, scales[kWarps];
#pragma unroll
      for (int panel = 0; panel < Share::kPanels; ++panel) {
        tile.sum_values(parts[warp], kWidth, set, panel);
        if (set == S - 1 && panel == Share::kPanels - 1 && more) tile.load_values(place);
        __syncthreads();
        const int h = set * kSetHeads + Share::head();
        if (panel == 0) {
          Sums& sums = strand.sums[set];
          float maximum = sums.maximum;
#pragma unroll
          for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, tile_sums[w][h].maximum);
          before = exp2f(sums.maximum - maximum);
          sums = {maximum, sums.total * before};
#pragma unroll
          for (int w = 0; w < kWarps; ++w) {
            scales[w] = exp2f(tile_sums[w][h].maximum - maximum);
            sums.total = fmaf(scales[w], tile_sums[w][h].total, sums.total);
          }
        }
#pragma unroll
        for (int v = 0; v < Share::kVector; ++v) strand.values[set][panel][v] *= before;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          const float* from = parts[w] + Share::head() * kWidth + Share::channel();
          const auto part = *reinterpret_cast<const Floats<Share::kVector>*>(from);
#pragma unroll
          for (int v = 0; v < Share::kVector; ++v) {
            float& sum = strand.values[set][panel][v];
            sum = fmaf(scales[w], part.v[v], sum);
          }
        }
        __syncthreads();
      }
    }
    if (ends) {
      const int64_t at = (int64_t{pair} * job.strands + number) * group;
#pragma unroll
      for (int set = 0; set < S; ++set) {
        const int h = set * kSetHeads + Share::head();
        if (h >= group) break;
        if (Share::channel() == 0) job.sums[at + h] = strand.sums[set];
#pragma unroll
        for (int panel = 0; panel < Share::kPanels; ++panel) {
          const int c = panel * Share::kPanel + Share::channel();
          Floats<Share::kVector> piece;
#pragma unroll
          for (int v = 0; v < Share::kVector; ++v) piece.v[v] = strand.values[set][panel][v];
          if (c < d) *reinterpret_cast<Floats<Share::kVector>*>(job.values + (at + h) * d + c) = piece;
        }
      }
      strand.clear();
    }
    number = next_number;
    split = next;
  }

  // Whoever comes last combines; what the others wrote is seen.
  const unsigned all = min(blocks, strands);
  __syncthreads();
  if (threadIdx.x == 0) {
    last = arrive(job.arrived + pair) == all;
    if (last) job.arrived[pair] = 0;
  }
  __syncthreads();
  if (last) combine_strands(out, job, int64_t{pair} * job.strands, strands, group, d, parts[0], totals);
  if (rank == 0) {
    // Nobody in this launch waits for it.
    float* to = lane.q_prev + (int64_t{job.layer} * cache.n_q_heads + head * group) * d;
    for (int e = threadIdx.x; e < group * d / 4; e += kThreads)
      reinterpret_cast<float4*>(to)[e] = reinterpret_cast<const float4*>(q)[e];
  }
}

// ---- memory of its own ----

constexpr int64_t kCounterUnit = 64;
struct Layout {
  int64_t sums, values, bytes;  // counters first
};
// The same for any number of rows: a launch of few must leave the counters of one of many alone.
Layout layout_of(const fkv_cache& cache) {
  const int64_t pairs = int64_t{cache.max_rows} * cache.n_kv_heads, partials = pairs * strands_of(cache) * group_of(cache);
  const int64_t counters = divide_up(pairs, kCounterUnit) * kCounterUnit * static_cast<int64_t>(sizeof(unsigned));
  const int64_t values = divide_up(counters + partials * static_cast<int64_t>(sizeof(Sums)), 256) * 256;
  return {counters, values, values + partials * cache.head_dim * static_cast<int64_t>(sizeof(float))};
}

template <class T, int D, int S>
int32_t issue(const fkv_cache& cache, const Job& job, int32_t n_rows, fkv_stream* stream) {
  // As many blocks a head as the multiprocessors take at a time, a power of two, so that they share long contexts evenly.
  const int64_t slots = int64_t{stream->device->properties.multiProcessorCount} * (D > 128 ? kBlocks / 2 : kBlocks);
  const int64_t pairs = int64_t{cache.n_kv_heads} * n_rows;
  int32_t blocks = 1;
  while (blocks < job.strands && 2 * blocks * pairs <= slots) blocks *= 2;
  return launch_early(stream, kCall, Kind::attend, bit(Kind::chain) | bit(Kind::retrieve), attend_kernel<T, D, S>,
                      {dim3(cache.n_kv_heads, n_rows, blocks), kThreads, 0}, cache, job);
}

template <class T, int D>
int32_t issue(const fkv_cache& cache, const Job& job, int32_t n_rows, fkv_stream* stream) {
  const int32_t group = group_of(cache);
  if (group <= kSetHeads) return issue<T, D, 1>(cache, job, n_rows, stream);
  if (group <= 2 * kSetHeads) return issue<T, D, 2>(cache, job, n_rows, stream);
  return issue<T, D, 4>(cache, job, n_rows, stream);
}

template <class T>
int32_t issue(const fkv_cache& cache, const Job& job, int32_t n_rows, fkv_stream* stream) {
  if (cache.head_dim <= 64) return issue<T, 64>(cache, job, n_rows, stream);
  if (cache.head_dim <= 128) return issue<T, 128>(cache, job, n_rows, stream);
  return issue<T, 256>(cache, job, n_rows, stream);
}

}  // namespace
}  // namespace fkv

using namespace fkv;

int32_t fkv_attend_scratch_bytes(uint64_t* bytes, const fkv_cache* cache) {
  const char* call = "fkv_attend_scratch_bytes";
  FKV_REQUIRE(bytes != nullptr, FKV_BAD_ARGUMENT, "%s: bytes is null", call);
  if (const int32_t status = check_cache(call, cache)) return status;
  *bytes = static_cast<uint64_t>(layout_of(*cache).bytes);
  return FKV_OK;
}

int32_t fkv_attend(float* out, const fkv_cache* cache, float* qkv, int32_t layer, int32_t n_rows, fkv_stream* stream) {
  if (const int32_t status = check_step(kCall, cache, layer, n_rows)) return status;
  FKV_REQUIRE(out != nullptr && qkv != nullptr && cache->attend_scratch != nullptr, FKV_BAD_ARGUMENT, "%s: %s is null", kCall,
              out == nullptr ? "out" : qkv == nullptr ? "qkv" : "cache.attend_scratch");
  if (const int32_t status = require_query_shape(kCall, *cache)) return status;
  if (const int32_t status = require_aligned(kCall, "out", out)) return status;
  if (const int32_t status = require_aligned(kCall, "qkv", qkv)) return status;
  if (const int32_t status = ready(stream, kCall)) return status;
  if (n_rows == 0) return FKV_OK;
  const Layout layout = layout_of(*cache);
  char* memory = static_cast<char*>(cache->attend_scratch);
  const Job job{out,
                qkv,
                reinterpret_cast<unsigned*>(memory),
                reinterpret_cast<Sums*>(memory + layout.sums),
                reinterpret_cast<float*>(memory + layout.values),
                layer,
                strands_of(*cache)};
  return with_dtype(cache->dtype, [&](auto zero) { return issue<decltype(zero)>(*cache, job, n_rows, stream); });
}
