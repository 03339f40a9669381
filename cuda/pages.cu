// pages.cu: whole pages: copied between pools of any layout, digested, and finished (digested and written to the host) in a step.
//
// floors: a copy reads and writes 2·tokens·Hkv·d values a page and layer: within the device at half of HBM's rate, to or from the
// host at the link's; a digest reads Hkv·P·d values at HBM read speed. Finishing: a frame over the link (128 KiB → 2.4 us on an
// H100). Source of the digests: Quest (channel-wise minimum and maximum of K); ArkVale (centre ± mean absolute deviation).
#include "digest.cuh"
#include "stages.cuh"

namespace fkv {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kDeviceBlocks = 1024;  // enough to fill HBM
// Blocks of one warp that fill the link: what is in flight at once is its rate times a round trip, and some.
constexpr int64_t kLinkWarps = 96;

// ---- lists of pages ----

// The caller's lists, which are not read once the call has returned.
struct Pairs {
  int32_t from[kMaxPairs], to[kMaxPairs];
};

// A head page of a pair and layer at a time, by the whole block.
__device__ __forceinline__ void copy_list(const fkv_cache& cache, const fkv_pages_params& params, const Pairs& pairs,
                                          uint32_t n) {
  const int32_t row_bytes = cache.head_dim * static_cast<int32_t>(dtype_bytes(cache.dtype));
  for (uint32_t i = blockIdx.x; i < n; i += gridDim.x) {
    const uint32_t layered = i / cache.n_kv_heads, pair = layered / params.n_layers;
    const auto head = static_cast<int32_t>(i - layered * cache.n_kv_heads);
    const auto layer = static_cast<int32_t>(layered - pair * params.n_layers);
    copy_head_page(page_in(params.dst, pairs.to[pair], params.dst_layer0 + layer, head),
                   page_in(params.src, pairs.from[pair], params.src_layer0 + layer, head), params.n_tokens, row_bytes);
  }
}

__global__ void __launch_bounds__(kThreads)
    copy_kernel(const __grid_constant__ fkv_cache cache, const __grid_constant__ fkv_pages_params params,
                const __grid_constant__ Pairs pairs, uint32_t n) {
  copy_list(cache, params, pairs, n);
}

// One warp a block and 1024 registers: what prefill attention on Hopper leaves of a multiprocessor, so that a chunk's pages go to
// the host beside it rather than in its place (blocks of 256 threads on 32 multiprocessors cost it 19%, H100).
__global__ void __maxnreg__(32)
    link_kernel(const __grid_constant__ fkv_cache cache, const __grid_constant__ fkv_pages_params params,
                const __grid_constant__ Pairs pairs, uint32_t n) {
  copy_list(cache, params, pairs, n);
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
  const fkv_row& row = cache.rows[blockIdx.y];
  if (completes_page(cache, row)) finish_head<T>(cache, row, cache.lanes[row.sequence], kind, layer, blockIdx.x);
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
  FKV_REQUIRE(n <= INT32_MAX, FKV_BAD_SHAPE, "%s: %lld head pages in one call", call, static_cast<long long>(n));
  if (n == 0) return FKV_OK;
  // The host pool is the one in chunks. Few pages are a matter of latency, for which more threads are better.
  const bool crosses = (params->src.chunks != nullptr) != (params->dst.chunks != nullptr);
  if (crosses && n >= kLinkWarps) {
    link_kernel<<<kLinkWarps, kWarp, 0, stream->handle>>>(*cache, *params, pairs_of(*params), static_cast<uint32_t>(n));
  } else {
    const auto blocks = static_cast<unsigned>(n < kDeviceBlocks ? n : kDeviceBlocks);
    copy_kernel<<<blocks, kThreads, 0, stream->handle>>>(*cache, *params, pairs_of(*params), static_cast<uint32_t>(n));
  }
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
