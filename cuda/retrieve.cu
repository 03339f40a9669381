// retrieve.cu: the fused retrieval: with the step's token before it and its completed page after it, one launch, in which a cluster of
// blocks serves a KV head of a row. On chips without clusters: the launches of the separate operations in their order, with the same bits.
//
// floor: a launch (2 us from one to the next); where heads are served, their digests at HBM read speed (32K tokens, d 128, bf16, 8 heads:
// 4 MiB → 1.3 us on an H100), two barriers of the cluster and the latency of five dependent reads; misses at the rate of the link.
#include "checks_retrieve.h"
#include "early.cuh"
#include "retrieve.cuh"
#include "stages.cuh"

namespace fkv {
namespace {

constexpr int kStallThreads = 256;
constexpr size_t kStaticShared = 1536;  // of retrieve_kernel's variables, which count towards kSideShared

template <class T>
__global__ void __maxnreg__(kSideRegisters)
    retrieve_kernel(const __grid_constant__ fkv_cache cache, const __grid_constant__ fkv_retrieve_params params,
                    const __grid_constant__ ServiceLayout layout) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) char shared[];
  run_service<T>(cache, params, layout, shared);
#else
  __trap();  // never launched there
#endif
}

// How many blocks share a head: as many as there is room for at once (`most`), but so many that none has more pages than it can list.
int blocks_of_head(const fkv_cache& cache, int32_t n_rows, int64_t most) {
  int blocks = kClusterBlocks;
  while (blocks > 1 && int64_t{blocks} * cache.n_kv_heads * n_rows > most &&
         most_pages_of_block(cache.max_pages, blocks / 2) <= kRawFloats)
    blocks /= 2;
  return blocks;
}

// One launch, if the shared memory that it needs is there.
template <class T>
int32_t issue_fused(const char* call, const fkv_cache& cache, const fkv_retrieve_params& params, int blocks, const ServiceLayout& layout,
                    fkv_stream* stream) {
  const dim3 grid(blocks, cache.n_kv_heads, params.n_rows);
  return launch_early(stream, call, Kind::retrieve, bit(Kind::chain), retrieve_kernel<T>,
                      {grid, kServeThreads, static_cast<size_t>(layout.bytes), blocks}, cache, params, layout);
}

// ---- in several launches ----

// One block. stall[0] −= clock before the retrieval and += clock after it, wherever it serves any head: what serves nobody makes nobody
// wait. u64 arithmetic wraps, so the sum of both is exact.
__global__ void __launch_bounds__(kStallThreads)
    stall_kernel(uint64_t* stall, const __grid_constant__ fkv_cache cache, int32_t layer, int32_t stage, int32_t n_rows, bool before) {
  bool any = false;
  for (int32_t i = threadIdx.x; i < n_rows * cache.n_kv_heads; i += kStallThreads) {
    const int32_t row_index = i / cache.n_kv_heads;
    const fkv_row& row = cache.rows[row_index];
    const fkv_lane* lane = lane_of(cache, row);
    any |= lane != nullptr && serves(cache, row, *lane, layer, row_index, i % cache.n_kv_heads, stage) != Query::none;
  }
  if (!__syncthreads_or(any) || threadIdx.x != 0) return;
  const uint64_t now = clock_ns();
  stall[0] += before ? 0 - now : now;
  stall[1] = now;
}

int32_t issue_stall(const char* call, uint64_t* stall, const fkv_cache& cache, int32_t layer, int32_t n_rows, bool before,
                    fkv_stream* stream) {
  if (stall == nullptr || n_rows == 0) return FKV_OK;
  stall_kernel<<<1, kStallThreads, 0, stream->handle>>>(stall, cache, layer, FKV_NOW, n_rows, before);
  return launched(stream, call);
}

int32_t issue_separate(const char* call, const fkv_cache& cache, const fkv_retrieve_params& params, fkv_stream* stream) {
  const int32_t layer = params.layer, stage = params.stage, n_rows = params.n_rows;
  const fkv_workspace& workspace = params.workspace;
  uint64_t* stall = stage == FKV_NOW ? params.stall : nullptr;
  if (params.prepare) {
    if (const int32_t status = fkv_rope(&params.rope, stream)) return status;
    if (const int32_t status = issue_token(call, cache, params.qkv, layer, n_rows, true, true, stream)) return status;
  }
  if (const int32_t status = issue_stall(call, stall, cache, layer, n_rows, true, stream)) return status;
  if (const int32_t status = issue_estimate(call, cache, workspace, params.qkv, layer, stage, n_rows, stream)) return status;
  if (const int32_t status = issue_select(call, cache, workspace, layer, stage, n_rows, stream)) return status;
  if (const int32_t status = issue_gather(call, cache, workspace, layer, n_rows, stream)) return status;
  if (const int32_t status = issue_stall(call, stall, cache, layer, n_rows, false, stream)) return status;
  return params.finish ? issue_finish(call, cache, params.digest_kind, layer, n_rows, stream) : FKV_OK;
}

// What the twin does not mind: shapes beyond what a kernel's registers hold, rows that 16-byte loads cannot read.
int32_t require_kernel(const char* call, const fkv_cache& cache, const fkv_retrieve_params& params) {
  if (const int32_t status = require_query_shape(call, cache)) return status;
  return params.qkv != nullptr ? require_aligned(call, "qkv", params.qkv) : FKV_OK;
}

}  // namespace
}  // namespace fkv

using namespace fkv;

int32_t fkv_retrieve(const fkv_cache* cache, const fkv_retrieve_params* params, fkv_stream* stream) {
  const char* call = "fkv_retrieve";
  if (const int32_t status = check_retrieve(call, cache, params)) return status;
  if (const int32_t status = require_kernel(call, *cache, *params)) return status;
  if (const int32_t status = ready(stream, call)) return status;
  if (params->n_rows == 0) return FKV_OK;
  // Before attention nothing runs beside; after it a chain does, and leaves one block's room on each SM.
  const bool beside = params->stage == FKV_NEXT;
  const int blocks = blocks_of_head(*cache, params->n_rows, int64_t{stream->device->properties.multiProcessorCount} * (beside ? 1 : 4) / 2);
  const ServiceLayout layout = lay_out_service(*cache, blocks);
  const size_t most = beside ? kSideShared - kStaticShared : kPlainShared;
  if (!has_clusters(stream) || static_cast<size_t>(layout.bytes) > most) return issue_separate(call, *cache, *params, stream);
  return with_dtype(cache->dtype, [&](auto zero) {
    using T = decltype(zero);
    return issue_fused<T>(call, *cache, *params, blocks, layout, stream);
  });
}
