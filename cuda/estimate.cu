// estimate.cu: page scores as an operation of its own: an upper bound of q·k over a page's keys, from the least and greatest value of
// each channel. Source: Quest §3; pooling over the group: FreeKV §4.
//
// floor: candidates·2·d values a KV head at HBM read speed (32K tokens, d 128, bf16, 8 heads: 4 MiB → 1.3 us on an H100), and one exchange
// between blocks for the softmax.
#include "score.cuh"
#include "stages.cuh"

namespace fkv {
namespace {

template <class T>
__global__ void __launch_bounds__(kServeThreads, 2)
    estimate_kernel(const __grid_constant__ fkv_cache cache, const __grid_constant__ fkv_workspace workspace, const float* qkv,
                    int32_t layer, int32_t stage, const __grid_constant__ ScoreLayout layout) {
  extern __shared__ __align__(16) char shared[];
  const Peers peers;
  const int32_t head = blockIdx.y, row_index = blockIdx.z, group = cache.n_q_heads / cache.n_kv_heads;
  const fkv_row& row = cache.rows[row_index];
  const fkv_lane* lane = lane_of(cache, row);
  if (lane == nullptr) return;
  const Query query = serves(cache, row, *lane, layer, row_index, head, stage);
  const int32_t n = n_candidates(*lane, target_length(row, stage), cache.page_size);
  if (query == Query::none || n <= lane->k) return;
  peers.arrive();
  const ScoreMemory memory(shared, layout);
  const Scored scored = scored_head(cache, workspace, row, *lane, query, layer, row_index, head, stage);
  const Share share(peers, n);
  TileWalk walk(scored, share);
  walk.resolve(cache);
  take_query(memory.q, query == Query::current ? group_query(cache, qkv, row_index, head) : group_query_before(cache, *lane, layer, head),
             group * cache.head_dim);
  __syncthreads();
  const RawPlanes raw(memory, cache, scored, share);
  score_share<T>(memory, raw, cache, scored, share, walk);
  peers.wait();
  exchange_tallies(memory, cache, group, peers);
  float* out = workspace.scores + miss_list(cache, row_index, head) * cache.max_pages;
  pool_share(memory, raw, cache, scored, share, [out](int32_t, int32_t page, float score) { out[page] = score; });
}

}  // namespace

int32_t issue_estimate(const char* call, const fkv_cache& cache, const fkv_workspace& workspace, const float* qkv, int32_t layer,
                       int32_t stage, int32_t n_rows, fkv_stream* stream) {
  if (n_rows == 0) return FKV_OK;
  return with_dtype(cache.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int blocks = has_clusters(stream) ? kClusterBlocks : 1;
    const ScoreLayout layout = lay_out_scores(cache, blocks, 0);
    const Launch launch{dim3(blocks, cache.n_kv_heads, n_rows), kServeThreads, static_cast<size_t>(layout.bytes), blocks};
    return launch_clusters(stream, call, estimate_kernel<T>, launch, cache, workspace, qkv, layer, stage, layout);
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
  if (const int32_t status = require_aligned(call, "qkv", qkv)) return status;
  if (const int32_t status = ready(stream, call)) return status;
  return issue_estimate(call, *cache, *workspace, qkv, layer, stage, n_rows, stream);
}
