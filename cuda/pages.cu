// pages.cu: whole pages: copied between pools of any layout, digested, and finished (digested and written to the host) in a step.
//
// floors: a copy reads and writes 2·tokens·Hkv·d values a page and layer: within the device at half of HBM's rate, to or from the host at
// the link's; a digest reads Hkv·P·d values at HBM read speed. Finishing: a frame over the link (128 KiB → 2.4 us on an H100).
// Source of the digests: Quest (channel-wise minimum and maximum of K); ArkVale (centre ± mean absolute deviation).
#include "checks_pages.h"
#include "pages.cuh"
#include "stages.cuh"

namespace fkv {
namespace {

constexpr int kThreads = 256;
// Blocks that copy: enough to fill the link, and no more of the device than that; or enough to fill HBM.
constexpr int64_t kLinkBlocks = 32, kDeviceBlocks = 1024;

// ---- digests ----

struct Channel {
  float low, high;
};

// A NaN among a channel's keys makes both NaN: the page's score is NaN then, and ranks last.
template <class T>
__device__ Channel min_max(const char* keys, int64_t stride, int32_t rows) {
  float low = to_f32(*reinterpret_cast<const T*>(keys)), high = low;
  for (int32_t r = 1; r < rows; ++r) {
    const float k = to_f32(*reinterpret_cast<const T*>(keys + r * stride));
    low = k < low || k != k ? k : low;
    high = k > high || k != k ? k : high;
  }
  return {low, high};
}

// Mean −/+ mean absolute deviation; both sums over ascending rows.
template <class T>
__device__ Channel mean_deviation(const char* keys, int64_t stride, int32_t rows) {
  const float share = 1.0f / static_cast<float>(rows);  // exact: pages hold a power of two of rows
  float sum = 0.0f, deviation = 0.0f;
  for (int32_t r = 0; r < rows; ++r) sum += to_f32(*reinterpret_cast<const T*>(keys + r * stride));
  const float mean = sum * share;
  for (int32_t r = 0; r < rows; ++r) deviation += fabsf(to_f32(*reinterpret_cast<const T*>(keys + r * stride)) - mean);
  deviation *= share;
  return {mean - deviation, mean + deviation};
}

// One head's digest by the whole block: low and high [d] of `block` from a page's K rows; a thread a channel.
template <class T>
__device__ void digest_page(const fkv_cache& cache, int32_t kind, const HeadPage& page, int64_t block, int32_t layer, int32_t head) {
  T* low = reinterpret_cast<T*>(frame_address(cache.digests, block, layer, head, 0, 0));
  T* high = reinterpret_cast<T*>(frame_address(cache.digests, block, layer, head, 1, 0));
  for (int32_t c = threadIdx.x; c < cache.head_dim; c += blockDim.x) {
    const char* keys = page.start + c * static_cast<int64_t>(sizeof(T));
    const Channel channel =
        kind == kQuest ? min_max<T>(keys, page.row, cache.page_size) : mean_deviation<T>(keys, page.row, cache.page_size);
    low[c] = from_f32<T>(channel.low);
    high[c] = from_f32<T>(channel.high);
  }
}

// ---- lists of pages ----

// The caller's lists, which are not read once the call has returned.
struct Pairs {
  int32_t from[kMaxPairs], to[kMaxPairs];
};

// A head page of a pair and layer at a time, by the whole block.
__global__ void __launch_bounds__(kThreads)
    copy_kernel(const __grid_constant__ fkv_cache cache, const __grid_constant__ fkv_pages_params params,
                const __grid_constant__ Pairs pairs, int64_t n) {
  const int32_t row_bytes = cache.head_dim * static_cast<int32_t>(dtype_bytes(cache.dtype));
  for (int64_t i = blockIdx.x; i < n; i += gridDim.x) {
    const int32_t head = static_cast<int32_t>(i % cache.n_kv_heads);
    const int32_t layer = static_cast<int32_t>(i / cache.n_kv_heads % params.n_layers);
    const int32_t pair = static_cast<int32_t>(i / cache.n_kv_heads / params.n_layers);
    copy_head_page(page_in(params.dst, pairs.to[pair], params.dst_layer0 + layer, head),
                   page_in(params.src, pairs.from[pair], params.src_layer0 + layer, head), params.n_tokens, row_bytes);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    digest_kernel(const __grid_constant__ fkv_cache cache, const __grid_constant__ fkv_pages_params params,
                  const __grid_constant__ Pairs pairs, int32_t kind) {
  const int32_t head = blockIdx.x, layer = blockIdx.y, pair = blockIdx.z;
  digest_page<T>(cache, kind, page_in(params.src, pairs.from[pair], params.src_layer0 + layer, head), pairs.to[pair],
                 params.dst_layer0 + layer, head);
}

// ---- a step's completed pages ----

// One block a KV head and row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ fkv_cache cache, int32_t kind, int32_t layer) {
  const int32_t head = blockIdx.x;
  const fkv_row& row = cache.rows[blockIdx.y];
  if (row.sequence < 0 || row.block < 0 || (row.position + 1) % cache.page_size != 0) return;
  const fkv_lane& lane = cache.lanes[row.sequence];
  const int32_t frame = lane_frame_of_window_page(lane, row.position / cache.page_size);
  require(frame < lane.n_frames);
  const HeadPage page = page_in(cache, lane, layer, frame, head);
  digest_page<T>(cache, kind, page, row.block, layer, head);
  copy_head_page(page_in(cache.host, row.block, layer, head), page, cache.page_size,
                 cache.head_dim * static_cast<int32_t>(sizeof(T)));
}

Pairs pairs_of(const fkv_pages_params& params) {
  Pairs pairs{};
  for (int32_t i = 0; i < params.n; ++i) {
    pairs.from[i] = params.from[i];
    pairs.to[i] = params.to[i];
  }
  return pairs;
}

}  // namespace

int32_t issue_finish(const char* call, const fkv_cache& cache, int32_t digest_kind, int32_t layer, int32_t n_rows, fkv_stream* stream) {
  if (n_rows == 0) return FKV_OK;
  return with_dtype(cache.dtype, [&](auto zero) {
    using T = decltype(zero);
    finish_kernel<T><<<dim3(cache.n_kv_heads, n_rows), kThreads, 0, stream->handle>>>(cache, digest_kind, layer);
    return launched(stream, call);
  });
}

}  // namespace fkv

using namespace fkv;

int32_t fkv_pages_copy(const fkv_cache* cache, const fkv_pages_params* params, fkv_stream* stream) {
  const char* call = "fkv_pages_copy";
  if (const int32_t status = check_pages(call, cache, params)) return status;
  if (const int32_t status = check_frames(call, "params.dst", params->dst)) return status;
  FKV_REQUIRE(params->n_tokens >= 0 && params->n_tokens <= cache->page_size, FKV_BAD_SHAPE, "%s: %d tokens of pages of %d", call,
              params->n_tokens, cache->page_size);
  if (const int32_t status = ready(stream, call)) return status;
  const int64_t n = int64_t{params->n} * params->n_layers * cache->n_kv_heads;
  if (n == 0) return FKV_OK;
  // The host pool is the one in chunks.
  const bool crosses = (params->src.chunks != nullptr) != (params->dst.chunks != nullptr);
  const int64_t most = crosses ? kLinkBlocks : kDeviceBlocks;
  const auto blocks = static_cast<unsigned>(n < most ? n : most);
  copy_kernel<<<blocks, kThreads, 0, stream->handle>>>(*cache, *params, pairs_of(*params), n);
  return launched(stream, call);
}

int32_t fkv_pages_digest(const fkv_cache* cache, const fkv_pages_params* params, int32_t digest_kind, fkv_stream* stream) {
  const char* call = "fkv_pages_digest";
  if (const int32_t status = check_pages(call, cache, params)) return status;
  if (const int32_t status = check_digests(call, cache, digest_kind)) return status;
  if (const int32_t status = ready(stream, call)) return status;
  if (params->n == 0 || params->n_layers == 0) return FKV_OK;
  return with_dtype(cache->dtype, [&](auto zero) {
    using T = decltype(zero);
    const dim3 grid(cache->n_kv_heads, params->n_layers, params->n);
    digest_kernel<T><<<grid, kThreads, 0, stream->handle>>>(*cache, *params, pairs_of(*params), digest_kind);
    return launched(stream, call);
  });
}

int32_t fkv_page_finish(const fkv_cache* cache, int32_t digest_kind, int32_t layer, int32_t n_rows, fkv_stream* stream) {
  const char* call = "fkv_page_finish";
  if (const int32_t status = check_step(call, cache, layer, n_rows)) return status;
  if (const int32_t status = check_digests(call, cache, digest_kind)) return status;
  if (const int32_t status = check_frames(call, "cache.host", cache->host)) return status;
  if (const int32_t status = ready(stream, call)) return status;
  return issue_finish(call, *cache, digest_kind, layer, n_rows, stream);
}
