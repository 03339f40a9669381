// recall.cu: head pages into slots: straight from the host's blocks by the miss lists (gather), or from a staging buffer (scatter).
//
// floors: gather 2·P·d values a miss over the link (16 KiB at 54 GB/s → 0.3 us on an H100, beside 1.5 us of the bus's latency); a page
// that leaves the window, and scatter, the same bytes read and written in HBM.
#include "recall.cuh"
#include "stages.cuh"

namespace fkv {
namespace {

constexpr int kThreads = 256;
// Sixteen blocks with four loads in flight a thread fill the link of an H100 (eight do not); what more they would take is the SMs'
// that compute beside. The bus answers after about 2 us: 256 KiB under way carry more than twice what it brings in that time.
constexpr int kGatherBlocks = 16;
constexpr int kScatterBlocks = 128;

// first[i] = misses in the lists before list i, first[n_lists] = all; by the whole block.
__device__ void count_misses(int32_t* first, const fkv_cache& cache, const fkv_workspace& workspace, int32_t n_lists) {
  __shared__ int32_t warps[kThreads / kWarp];
  const int32_t each = (n_lists + kThreads - 1) / kThreads, begin = min(static_cast<int32_t>(threadIdx.x) * each, n_lists),
                end = min(begin + each, n_lists), lane = threadIdx.x % kWarp;
  const auto count = [&](int32_t list) {
    return cache.rows[list / cache.n_kv_heads].sequence < 0 ? 0 : workspace.n_misses[list];
  };
  int32_t own = 0;
  for (int32_t list = begin; list < end; ++list) own += count(list);
  int32_t before = own;
  for (int32_t step = 1; step < kWarp; step *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, before, step);
    if (lane >= step) before += other;
  }
  if (lane == kWarp - 1) warps[threadIdx.x / kWarp] = before;
  __syncthreads();
  before -= own;
  for (int32_t w = 0; w < static_cast<int32_t>(threadIdx.x) / kWarp; ++w) before += warps[w];
  for (int32_t list = begin; list < end; ++list) {
    first[list] = before;
    before += count(list);
  }
  if (threadIdx.x == kThreads - 1) first[n_lists] = before;
  __syncthreads();
}

// The last list that begins at or before miss `i`, which is the one that holds it.
__device__ __forceinline__ int32_t list_of(const int32_t* first, int32_t n_lists, int32_t i) {
  int32_t low = 0, high = n_lists;  // first[low] <= i < first[high]
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (first[middle] <= i) low = middle;
    else high = middle;
  }
  return low;
}

// What a warp brings at once: kPieceLoads·32 pieces of one head page. `n`: pieces that there are.
struct Portion {
  Route route;
  uint32_t first, n;
};

// A warp brings every gridDim.x·warps-th portion of all lists. It looks up the next one while the bus brings this one.
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ fkv_cache cache, const __grid_constant__ fkv_workspace workspace, int32_t layer,
                  int32_t n_lists) {
  extern __shared__ int32_t first[];  // [n_lists + 1]
  count_misses(first, cache, workspace, n_lists);
  const Pieces pieces(cache);
  constexpr uint32_t kWarps = kThreads / kWarp, kPieces = kPieceLoads * kWarp;
  const uint32_t portions = (pieces.all + kPieces - 1) / kPieces, n = first[n_lists] * portions, lane_index = threadIdx.x % kWarp;
  const auto locate = [&](uint32_t i) -> Portion {
    if (i >= n) return {};
    const uint32_t entry = i / portions, part = i - entry * portions;
    const int32_t list = list_of(first, n_lists, static_cast<int32_t>(entry)), head = list % cache.n_kv_heads;
    const fkv_miss miss = workspace.misses[static_cast<int64_t>(list) * cache.max_slots + (static_cast<int32_t>(entry) - first[list])];
    const fkv_lane& lane = cache.lanes[cache.rows[list / cache.n_kv_heads].sequence];
    return {route_of(cache, lane, miss, layer, head), part * kPieces + lane_index, pieces.all};
  };
  uint32_t i = blockIdx.x * kWarps + threadIdx.x / kWarp;
  for (Portion portion = locate(i); i < n;) {
    uint4 data[kPieceLoads];
#pragma unroll
    for (int j = 0; j < kPieceLoads; ++j) {
      const uint32_t piece = portion.first + j * kWarp;
      if (piece < portion.n) data[j] = *pieces.spot(piece).in(portion.route.from);
    }
    i += gridDim.x * kWarps;
    const Portion next = locate(i);
#pragma unroll
    for (int j = 0; j < kPieceLoads; ++j) {
      const uint32_t piece = portion.first + j * kWarp;
      if (piece < portion.n) *pieces.spot(piece).in(portion.route.to) = data[j];
    }
    portion = next;
  }
}

// `staging` holds K then V of each entry, token rows contiguous; a block an entry at a time.
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const __grid_constant__ fkv_cache cache, const char* staging, const fkv_scatter_entry* entries, int32_t n,
                   int32_t layer) {
  const int32_t row_bytes = cache.head_dim * static_cast<int32_t>(dtype_bytes(cache.dtype));
  const int64_t half = static_cast<int64_t>(cache.page_size) * row_bytes;
  for (int32_t i = blockIdx.x; i < n; i += gridDim.x) {
    const fkv_scatter_entry entry = entries[i];
    require(entry.lane >= 0 && entry.head >= 0 && entry.head < cache.n_kv_heads);
    const fkv_lane& lane = cache.lanes[entry.lane];
    require(entry.slot >= 0 && entry.slot < lane.n_slots);
    const HeadPage from{const_cast<char*>(staging) + i * 2 * half, half, row_bytes};
    copy_head_page(page_in(cache, lane, layer, lane_frame_of_slot(lane, entry.slot), entry.head), from, cache.page_size, row_bytes);
  }
}

}  // namespace

int32_t issue_gather(const char* call, const fkv_cache& cache, const fkv_workspace& workspace, int32_t layer, int32_t n_rows,
                     fkv_stream* stream) {
  if (n_rows == 0) return FKV_OK;
  const int32_t n_lists = n_rows * cache.n_kv_heads;
  const size_t shared = (static_cast<size_t>(n_lists) + 1) * sizeof(int32_t);
  if (const int32_t status = side_kernel(stream, call, gather_kernel, shared)) return status;
  gather_kernel<<<kGatherBlocks, kThreads, shared, stream->handle>>>(cache, workspace, layer, n_lists);
  return launched(stream, call);
}

}  // namespace fkv

using namespace fkv;

int32_t fkv_recall_gather(const fkv_cache* cache, const fkv_workspace* workspace, int32_t layer, int32_t n_rows, fkv_stream* stream) {
  const char* call = "fkv_recall_gather";
  if (const int32_t status = require_tables(call, cache, layer, n_rows)) return status;
  if (const int32_t status = require_workspace(call, workspace)) return status;
  if (const int32_t status = check_frames(call, "cache.host", cache->host)) return status;
  if (const int32_t status = ready(stream, call)) return status;
  return issue_gather(call, *cache, *workspace, layer, n_rows, stream);
}

int32_t fkv_recall_scatter(const fkv_cache* cache, const void* staging, const fkv_scatter_entry* entries, int32_t n, int32_t layer,
                           fkv_stream* stream) {
  const char* call = "fkv_recall_scatter";
  if (const int32_t status = require_tables(call, cache, layer, 0)) return status;
  FKV_REQUIRE(n >= 0, FKV_BAD_ARGUMENT, "%s: n is %d", call, n);
  FKV_REQUIRE(n == 0 || (staging != nullptr && entries != nullptr), FKV_BAD_ARGUMENT, "%s: staging or entries is null", call);
  if (const int32_t status = require_aligned(call, "staging", staging)) return status;
  if (const int32_t status = ready(stream, call)) return status;
  if (n == 0) return FKV_OK;
  const auto blocks = static_cast<unsigned>(n < kScatterBlocks ? n : kScatterBlocks);
  scatter_kernel<<<blocks, kThreads, 0, stream->handle>>>(*cache, static_cast<const char*>(staging), entries, n, layer);
  return launched(stream, call);
}
