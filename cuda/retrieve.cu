// retrieve.cu: the fused retrieval: the launches of the separate operations in their order, by one call, so that their bits are the same.
//
// floor: estimate's, select's and gather's; each launch beyond them costs 1–3 us on the critical path of an H100.
#include "checks_retrieve.h"
#include "pages.cuh"
#include "stages.cuh"

namespace fkv {
namespace {

constexpr int kThreads = 256;

// One block. *stall −= clock before the retrieval and += clock after it, wherever it serves any head: what serves nobody makes nobody wait.
// u64 arithmetic wraps, so the sum of both is exact.
__global__ void __launch_bounds__(kThreads)
    stall_kernel(uint64_t* stall, const __grid_constant__ fkv_cache cache, int32_t layer, int32_t stage, int32_t n_rows, bool before) {
  bool any = false;
  for (int32_t i = threadIdx.x; i < n_rows * cache.n_kv_heads; i += kThreads) {
    const int32_t row_index = i / cache.n_kv_heads;
    const fkv_row& row = cache.rows[row_index];
    const fkv_lane* lane = lane_of(cache, row);
    any |= lane != nullptr && serves(cache, row, *lane, layer, row_index, i % cache.n_kv_heads, stage) != Query::none;
  }
  if (__syncthreads_or(any) && threadIdx.x == 0) *stall += before ? 0 - clock_ns() : clock_ns();
}

int32_t issue_stall(const char* call, uint64_t* stall, const fkv_cache& cache, int32_t layer, int32_t stage, int32_t n_rows, bool before,
                    fkv_stream* stream) {
  stall_kernel<<<1, kThreads, 0, stream->handle>>>(stall, cache, layer, stage, n_rows, before);
  return launched(stream, call);
}

// What the twin does not mind: shapes beyond what a kernel's registers hold, rows that 16-byte loads cannot read.
int32_t require_kernel(const char* call, const fkv_cache& cache, const fkv_retrieve_params& params) {
  if (const int32_t status = require_query_shape(call, cache)) return status;
  return params.prepare ? require_aligned(call, "qkv", params.qkv) : FKV_OK;
}

}  // namespace
}  // namespace fkv

using namespace fkv;

int32_t fkv_retrieve(const fkv_cache* cache, const fkv_retrieve_params* params, fkv_stream* stream) {
  const char* call = "fkv_retrieve";
  if (const int32_t status = check_retrieve(call, cache, params)) return status;
  if (const int32_t status = require_kernel(call, *cache, *params)) return status;
  if (const int32_t status = ready(stream, call)) return status;
  const int32_t layer = params->layer, stage = params->stage, n_rows = params->n_rows;
  const fkv_workspace& workspace = params->workspace;
  if (params->prepare) {
    if (const int32_t status = fkv_rope(&params->rope, stream)) return status;
    if (const int32_t status = issue_token(call, *cache, params->qkv, layer, n_rows, true, true, stream)) return status;
  }
  const bool stalls = params->stall != nullptr && stage == FKV_NOW;
  if (stalls) {
    if (const int32_t status = issue_stall(call, params->stall, *cache, layer, stage, n_rows, true, stream)) return status;
  }
  if (const int32_t status = issue_estimate(call, *cache, workspace, params->qkv, layer, stage, n_rows, stream)) return status;
  if (const int32_t status = issue_select(call, *cache, workspace, layer, stage, n_rows, stream)) return status;
  if (const int32_t status = issue_gather(call, *cache, workspace, layer, n_rows, stream)) return status;
  if (stalls) {
    if (const int32_t status = issue_stall(call, params->stall, *cache, layer, stage, n_rows, false, stream)) return status;
  }
  return params->finish ? issue_finish(call, *cache, params->digest_kind, layer, n_rows, stream) : FKV_OK;
}
