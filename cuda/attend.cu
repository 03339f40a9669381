// attend.cu: paged attention of one token a row over its sink, selected and window pages (design section 3, Order).
//
// The pages that a head visits are split at every eighth. Splits s, s + 8, s + 16, … make a strand; a strand's splits are combined in order,
// then the eight strands in order. A warp takes a page of the split. Which slot a page sits in, the device layout, other rows and the number
// of blocks that share a head change addresses and who does the work, never a sum.
//
// floor: the visited pages' K and V once, 2·tokens·d values a KV head, at HBM read speed (2080 tokens, d 128, bf16, 8 heads: 8.1 MiB →
// 2.5 us on an H100). Eight blocks a head: at batch 1 they are 64 of its 132 SMs, and a ninth split is a second round.
#include "cluster.cuh"
#include "pages.cuh"

namespace fkv {
namespace {

constexpr int kSplitPages = 8;  // part of the numerics
constexpr int kStrands = 8;     // part of the numerics
constexpr int kThreads = kSplitPages * kWarp;

// ---- the pages that one KV head visits ----

// `front` sink pages (every page where the lane attends all), then its selection, then the window.
struct Visits {
  const int32_t *selected_page, *selected_slot;
  int32_t front, selected, window, window_begin;

  __device__ int32_t count() const { return front + selected + window; }
};

__device__ Visits visits_of(const fkv_cache& cache, const fkv_lane& lane, int32_t layer, int32_t head, int32_t position) {
  const int32_t pages = position / cache.page_size + 1;
  if (lane.attend_all) return {nullptr, nullptr, pages, 0, 0, pages};
  const int64_t entry = lane_head(cache, layer, head);
  const int32_t begin = window_begin(lane, position + 1, cache.page_size);
  return {lane.selected_page + entry * lane.k, lane.selected_slot + entry * lane.k, min(lane.sink_pages, pages),
          lane.k > 0 ? min(lane.n_selected[entry], lane.k) : 0, max(0, pages - begin), begin};
}

// One visited page: where its K starts, and how many of its rows are attended.
struct Page {
  const char* keys;
  int32_t rows;
};

// The i-th visited page; none past the last.
__device__ Page visited(const fkv_cache& cache, const fkv_lane& lane, const Visits& visits, int32_t layer, int32_t head,
                        int32_t position, int32_t i) {
  if (i >= visits.count()) return {nullptr, 0};
  int32_t page = i, frame;
  if (i >= visits.front && i < visits.front + visits.selected) {
    page = visits.selected_page[i - visits.front];
    frame = lane.resident ? page : lane_frame_of_slot(lane, visits.selected_slot[i - visits.front]);
  } else {
    if (i >= visits.front) page = visits.window_begin + i - visits.front - visits.selected;
    frame = lane_frame_of_window_page(lane, page);
  }
  require(frame >= 0 && frame < lane.n_frames);
  return {lane_address(cache, lane, layer, frame, head, 0, 0), min(cache.page_size, position + 1 - page * cache.page_size)};
}

// ---- softmax in pieces ----

// What one query head has of some tokens: the maximum of their scores, Σ exp(score − maximum) and, elsewhere, Σ exp(score − maximum)·V.
struct Sums {
  float maximum, total;
};
// How two pieces become one: both are scaled to the greater maximum.
struct Scales {
  float maximum, first, second;
};
__device__ __forceinline__ Scales scales_of(float first, float second) {
  const float maximum = fmaxf(first, second);
  return {maximum, expf(first - maximum), expf(second - maximum)};
}
__device__ __forceinline__ float combined(const Scales& scales, float first, float second) {
  return fmaf(first, scales.first, __fmul_rn(second, scales.second));
}

// ---- one split, by the whole block ----

// Shared memory. Query heads are taken H at a time: scores [sets][8·P][H], parts [8 warps][H][d] of Σ weight·V, strand [G][d] and
// whole [G][d]: Σ weight·V of the strand, and of the strands before (one block a head only).
struct Shared {
  float *scores, *parts, *strand, *whole;
};
__device__ Shared shared_of(float* memory, int32_t set_heads, int32_t group, int32_t page_size, int32_t d) {
  const int32_t sets = (group + set_heads - 1) / set_heads;
  Shared shared{};
  shared.scores = memory;
  shared.parts = shared.scores + sets * set_heads * kSplitPages * page_size;
  shared.strand = shared.parts + kSplitPages * set_heads * d;
  shared.whole = shared.strand + group * d;
  return shared;
}

// H scores of a token as one access.
template <int H>
struct alignas(4 * H) Heads {
  float v[H];
};

// Scores of this warp's page for H query heads `q`; −inf past its rows. A row is shared by `width` lanes, eight channels each: ascending
// in a lane, then the lanes' tree.
template <class T, int H>
__device__ __forceinline__ void score_page(float* scores, const fkv_cache& cache, const Page& page, const float* q, int32_t heads,
                                           int32_t width) {
  constexpr int kTurns = sizeof(T) == 2 ? 8 : 4;  // rows a lane has in flight
  const int32_t lane = threadIdx.x % kWarp, d = cache.head_dim, c = 8 * (lane % width), rows = kWarp / width, member = lane / width;
  float x[H][8];
#pragma unroll
  for (int h = 0; h < H; ++h) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[h][i] = h < heads && c < d ? q[h * d + c + i] * cache.attention_scale : 0.0f;
  }
  for (int32_t first = member; first - member < cache.page_size; first += kTurns * rows) {
    Packed<T> keys[kTurns];
#pragma unroll
    for (int j = 0; j < kTurns; ++j) {
      const int32_t row = first + j * rows;
      keys[j] = row < page.rows && c < d ? load_packed<T>(page.keys + row * cache.device.row + c * static_cast<int64_t>(sizeof(T)))
                                         : packed_zeros<T>();
    }
#pragma unroll
    for (int j = 0; j < kTurns; ++j) {
      const int32_t row = first + j * rows;
      const Eight k = unpack<T>(keys[j]);
      Heads<H> out;
#pragma unroll
      for (int h = 0; h < H; ++h) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) sum = fmaf(x[h][i], k.v[i], sum);
        for (int32_t step = width / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
        out.v[h] = row < page.rows ? sum : -INFINITY;
      }
      if (lane % width == 0 && row < cache.page_size) *reinterpret_cast<Heads<H>*>(scores + row * H) = out;
    }
  }
}

// One query head's scores of the split → weights, by one warp; the strand's sums take them in. `stride` floats between tokens.
__device__ __forceinline__ void weigh_tokens(float* scores, int32_t stride, int32_t n, Sums* sums, Scales* scales, bool first) {
  const int32_t lane = threadIdx.x % kWarp;
  float maximum = -INFINITY, total = 0.0f;
  for (int32_t t = lane; t < n; t += kWarp) maximum = fmaxf(maximum, scores[t * stride]);
  maximum = warp_max(maximum);
  for (int32_t t = lane; t < n; t += kWarp) {
    const float weight = expf(scores[t * stride] - maximum);
    scores[t * stride] = weight;
    total += weight;
  }
  total = warp_sum(total);
  if (lane != 0) return;
  *scales = first ? Scales{maximum, 0.0f, 1.0f} : scales_of(sums->maximum, maximum);
  *sums = {scales->maximum, first ? total : combined(*scales, sums->total, total)};
}

// Σ weight·V of this warp's page for H query heads: a lane adds its rows, ascending; then the tree over the lanes of a channel.
template <class T, int H>
__device__ __forceinline__ void add_values(float* parts, const float* weights, const fkv_cache& cache, const Page& page, int32_t width) {
  constexpr int kTurns = sizeof(T) == 2 ? 8 : 4;
  const int32_t lane = threadIdx.x % kWarp, d = cache.head_dim, c = 8 * (lane % width), rows = kWarp / width, member = lane / width;
  float sums[H][8] = {};
  for (int32_t first = member; first < page.rows && c < d; first += kTurns * rows) {
    Packed<T> values[kTurns];
#pragma unroll
    for (int j = 0; j < kTurns; ++j) {
      const int32_t row = first + j * rows;
      values[j] = row < page.rows ? load_packed<T>(page.keys + cache.device.kv + row * cache.device.row +
                                                   c * static_cast<int64_t>(sizeof(T)))
                                  : packed_zeros<T>();
    }
#pragma unroll
    for (int j = 0; j < kTurns; ++j) {
      const int32_t row = first + j * rows;
      if (row >= page.rows) continue;
      const Eight v = unpack<T>(values[j]);
      const Heads<H> weight = *reinterpret_cast<const Heads<H>*>(weights + row * H);
#pragma unroll
      for (int h = 0; h < H; ++h) {
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[h][i] = fmaf(weight.v[h], v.v[i], sums[h][i]);
      }
    }
  }
  for (int32_t step = width; step < kWarp; step *= 2) {
#pragma unroll
    for (int h = 0; h < H; ++h) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[h][i] += __shfl_xor_sync(kAllLanes, sums[h][i], step);
    }
  }
  if (member != 0 || c >= d) return;
#pragma unroll
  for (int h = 0; h < H; ++h) {
    *reinterpret_cast<float4*>(parts + h * d + c) = make_float4(sums[h][0], sums[h][1], sums[h][2], sums[h][3]);
    *reinterpret_cast<float4*>(parts + h * d + c + 4) = make_float4(sums[h][4], sums[h][5], sums[h][6], sums[h][7]);
  }
}

// The strand takes in the split whose warps' pages are `page`.
template <class T, int H>
__device__ void attend_split(const Shared& shared, Sums* sums, Scales* scales, const fkv_cache& cache, const Page& page, const float* q,
                             int32_t width, bool first) {
  const int32_t warp = threadIdx.x / kWarp, d = cache.head_dim, group = cache.n_q_heads / cache.n_kv_heads;
  const int32_t tokens = kSplitPages * cache.page_size;
  for (int32_t set = 0; set < group; set += H) {
    score_page<T, H>(shared.scores + set * tokens + warp * cache.page_size * H, cache, page, q + set * d, group - set, width);
  }
  __syncthreads();
  for (int32_t h = warp; h < group; h += kSplitPages)
    weigh_tokens(shared.scores + h / H * H * tokens + h % H, H, tokens, sums + h, scales + h, first);
  __syncthreads();
  for (int32_t set = 0; set < group; set += H) {
    add_values<T, H>(shared.parts + warp * H * d, shared.scores + set * tokens + warp * cache.page_size * H, cache, page, width);
    __syncthreads();
    const int32_t n = min(H, group - set) * d;
    for (int32_t e = threadIdx.x; e < n; e += kThreads) {
      float sum = shared.parts[e];
      for (int32_t w = 1; w < kSplitPages; ++w) sum += shared.parts[w * H * d + e];
      float& to = shared.strand[set * d + e];
      to = first ? sum : combined(scales[set + e / d], to, sum);
    }
    __syncthreads();
  }
}

// ---- the operation: kBlocks blocks a KV head and row ----

template <class T, int H, int kBlocks>
__global__ void __launch_bounds__(kThreads, 2)
    attend_kernel(float* out, const __grid_constant__ fkv_cache cache, const float* qkv, int32_t layer, int32_t width) {
  static_assert(kBlocks == 1 || kBlocks == kStrands);
  extern __shared__ __align__(16) float memory[];
  __shared__ Sums strand_sums[kMaxGroup], whole_sums[kMaxGroup];
  __shared__ Scales scales[kMaxGroup];
  const int32_t rank = Cluster<kBlocks>::rank(), head = blockIdx.y, row_index = blockIdx.z, d = cache.head_dim;
  const int32_t group = cache.n_q_heads / cache.n_kv_heads, n = group * d, thread = rank * kThreads + threadIdx.x;
  const fkv_row& row = cache.rows[row_index];
  float* to = out + (static_cast<int64_t>(row_index) * cache.n_kv_heads + head) * n;
  if (row.sequence < 0) {
    for (int32_t e = thread; e < n; e += kBlocks * kThreads) to[e] = 0.0f;
    return;
  }
  const fkv_lane& lane = cache.lanes[row.sequence];
  const float* q = group_query(cache, qkv, row_index, head);
  const Visits visits = visits_of(cache, lane, layer, head, row.position);
  const int32_t splits = (visits.count() + kSplitPages - 1) / kSplitPages, strands = min(splits, kStrands);
  const Shared shared = shared_of(memory, H, group, cache.page_size, d);

  for (int32_t strand = rank; strand < strands; strand += kBlocks) {
    for (int32_t split = strand; split < splits; split += kStrands) {
      const Page page = visited(cache, lane, visits, layer, head, row.position, split * kSplitPages + threadIdx.x / kWarp);
      attend_split<T, H>(shared, strand_sums, scales, cache, page, q, width, split == strand);
    }
    if (kBlocks > 1) break;
    // The strands before and this one.
    if (threadIdx.x < group) {
      const Sums before = whole_sums[threadIdx.x], own = strand_sums[threadIdx.x];
      const Scales both = scales_of(before.maximum, own.maximum);
      scales[threadIdx.x] = both;
      whole_sums[threadIdx.x] = strand == 0 ? own : Sums{both.maximum, combined(both, before.total, own.total)};
    }
    __syncthreads();
    for (int32_t e = threadIdx.x; e < n; e += kThreads)
      shared.whole[e] = strand == 0 ? shared.strand[e] : combined(scales[e / d], shared.whole[e], shared.strand[e]);
    __syncthreads();
  }

  Cluster<kBlocks>::sync();
  float* q_prev = lane.q_prev + (static_cast<int64_t>(layer) * cache.n_q_heads + head * group) * d;
  for (int32_t e = thread; e < n; e += kBlocks * kThreads) {
    float sum = 0.0f;
    Sums sums{0.0f, 0.0f};
    if constexpr (kBlocks == 1) {
      if (strands > 0) sums = whole_sums[e / d], sum = shared.whole[e];
    } else {
      for (int32_t strand = 0; strand < strands; ++strand) {
        const Sums own = Cluster<kBlocks>::of(strand_sums, strand)[e / d];
        const float value = Cluster<kBlocks>::of(shared.strand, strand)[e];
        const Scales both = scales_of(sums.maximum, own.maximum);
        sum = strand == 0 ? value : combined(both, sum, value);
        sums = strand == 0 ? own : Sums{both.maximum, combined(both, sums.total, own.total)};
      }
    }
    to[e] = sum / sums.total;
    q_prev[e] = q[e];
  }
  Cluster<kBlocks>::sync();  // no block ends while another reads its strand
}

template <class T, int H, int kBlocks>
int32_t issue(const char* call, float* out, const fkv_cache& cache, const float* qkv, int32_t layer, int32_t n_rows, fkv_stream* stream) {
  const int64_t group = group_of(cache), d = cache.head_dim, tokens = kSplitPages * cache.page_size;
  const int64_t floats = divide_up(group, H) * H * tokens + kSplitPages * H * d + (kBlocks > 1 ? 1 : 2) * group * d;
  return launch_clusters(stream, call, attend_kernel<T, H, kBlocks>, kBlocks, dim3(kBlocks, cache.n_kv_heads, n_rows), kThreads,
                         static_cast<size_t>(floats) * sizeof(float), out, cache, qkv, layer, lanes_of_row(cache.head_dim));
}

template <class T, int H>
int32_t issue(const char* call, float* out, const fkv_cache& cache, const float* qkv, int32_t layer, int32_t n_rows, fkv_stream* stream) {
  static_assert(kClusterBlocks == kStrands);
  return has_clusters(stream) ? issue<T, H, kStrands>(call, out, cache, qkv, layer, n_rows, stream)
                              : issue<T, H, 1>(call, out, cache, qkv, layer, n_rows, stream);
}

}  // namespace
}  // namespace fkv

using namespace fkv;

int32_t fkv_attend(float* out, const fkv_cache* cache, float* qkv, int32_t layer, int32_t n_rows, fkv_stream* stream) {
  const char* call = "fkv_attend";
  if (const int32_t status = check_step(call, cache, layer, n_rows)) return status;
  FKV_REQUIRE(out != nullptr && qkv != nullptr, FKV_BAD_ARGUMENT, "%s: %s is null", call, out == nullptr ? "out" : "qkv");
  if (const int32_t status = require_query_shape(call, *cache)) return status;
  if (const int32_t status = ready(stream, call)) return status;
  if (n_rows == 0) return FKV_OK;
  return with_dtype(cache->dtype, [&](auto zero) {
    using T = decltype(zero);
    const int32_t group = group_of(*cache);
    if (group == 1) return issue<T, 1>(call, out, *cache, qkv, layer, n_rows, stream);
    if (group == 2) return issue<T, 2>(call, out, *cache, qkv, layer, n_rows, stream);
    return issue<T, 4>(call, out, *cache, qkv, layer, n_rows, stream);
  });
}
