// select.cu: the k best pages of a head, and its slots as a cache of them, as an operation of its own. Residency changes what is copied,
// never what is selected.
//
// floor: a candidate's score read six times from the nearest cache by one block a head, and some twenty barriers of about 30 ns: 3 us at
// 1024 candidates on an H100.
#include "select.cuh"
#include "stages.cuh"

namespace fkv {
namespace {

constexpr int32_t kTableSlots = 2048;

// One block a KV head and row.
__global__ void __launch_bounds__(kServeThreads)
    select_kernel(const __grid_constant__ fkv_cache cache, const __grid_constant__ fkv_workspace workspace, int32_t layer, int32_t stage,
                  int32_t capacity) {
  extern __shared__ int32_t tables[];
  const int32_t head = blockIdx.x, row_index = blockIdx.y;
  const fkv_row& row = cache.rows[row_index];
  const fkv_lane* lane = lane_of(cache, row);
  if (lane != nullptr && serves(cache, row, *lane, layer, row_index, head, stage) != Query::none) {
    select_head(tables, capacity, cache, workspace, row, *lane, layer, stage, row_index, head);
  } else if (threadIdx.x == 0) {
    workspace.n_misses[miss_list(cache, row_index, head)] = 0;
  }
}

}  // namespace

int32_t issue_select(const char* call, const fkv_cache& cache, const fkv_workspace& workspace, int32_t layer, int32_t stage,
                     int32_t n_rows, fkv_stream* stream) {
  if (n_rows == 0) return FKV_OK;
  const int32_t capacity = std::min(cache.max_slots, kTableSlots);
  const size_t shared = 5 * static_cast<size_t>(capacity) * sizeof(int32_t);
  if (const int32_t status = side_kernel(stream, call, select_kernel, shared)) return status;
  select_kernel<<<dim3(cache.n_kv_heads, n_rows), kServeThreads, shared, stream->handle>>>(cache, workspace, layer, stage, capacity);
  return launched(stream, call);
}

}  // namespace fkv

using namespace fkv;

int32_t fkv_select(const fkv_cache* cache, const fkv_workspace* workspace, int32_t layer, int32_t stage, int32_t n_rows,
                   fkv_stream* stream) {
  const char* call = "fkv_select";
  if (const int32_t status = require_tables(call, cache, layer, n_rows)) return status;
  if (const int32_t status = require_workspace(call, workspace)) return status;
  if (const int32_t status = require_stage(call, stage)) return status;
  if (const int32_t status = ready(stream, call)) return status;
  return issue_select(call, *cache, *workspace, layer, stage, n_rows, stream);
}
