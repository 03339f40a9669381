// checks.cpp: what every call on a cache refuses before it defers anything.
#include "checks.h"

#include "frames.h"

namespace fkv {
namespace {

// Wider heads than any model has; bounds the scratch of both backends.
constexpr int32_t kMaxHeadDim = 1024;

bool is_stride(int64_t bytes) { return bytes > 0 && bytes % 16 == 0; }

}  // namespace

int32_t check_cache(const char* call, const fkv_cache* cache) {
  FKV_REQUIRE(cache != nullptr, FKV_BAD_ARGUMENT, "%s: cache is null", call);
  FKV_REQUIRE(cache->struct_bytes == sizeof(fkv_cache), FKV_ABI_MISMATCH,
              "%s: cache.struct_bytes is %u, this library's fkv_cache has %zu", call, cache->struct_bytes,
              sizeof(fkv_cache));
  FKV_REQUIRE(cache->dtype >= FKV_F32 && cache->dtype <= FKV_F16, FKV_BAD_ARGUMENT,
              "%s: cache.dtype %d is no dtype (0 f32, 1 bf16, 2 f16)", call, cache->dtype);
  FKV_REQUIRE(cache->n_layers > 0 && cache->n_q_heads > 0 && cache->n_kv_heads > 0, FKV_BAD_SHAPE,
              "%s: %d layers, %d query heads, %d KV heads: each must be positive", call, cache->n_layers,
              cache->n_q_heads, cache->n_kv_heads);
  FKV_REQUIRE(cache->n_q_heads % cache->n_kv_heads == 0, FKV_BAD_SHAPE,
              "%s: %d query heads are no multiple of %d KV heads", call, cache->n_q_heads, cache->n_kv_heads);
  FKV_REQUIRE(cache->head_dim > 0 && cache->head_dim % 8 == 0 && cache->head_dim <= kMaxHeadDim, FKV_BAD_SHAPE,
              "%s: head_dim is %d; it must be a multiple of 8, at most %d", call, cache->head_dim, kMaxHeadDim);
  FKV_REQUIRE(cache->page_size == 16 || cache->page_size == 32 || cache->page_size == 64, FKV_BAD_SHAPE,
              "%s: page_size is %d; it must be 16, 32 or 64", call, cache->page_size);
  const int64_t bytes = int64_t{cache->n_kv_heads} * 2 * cache->page_size * cache->head_dim * dtype_bytes(cache->dtype);
  FKV_REQUIRE(cache->frame_bytes == bytes, FKV_BAD_SHAPE, "%s: frame_bytes is %lld, the geometry makes it %lld", call,
              static_cast<long long>(cache->frame_bytes), static_cast<long long>(bytes));
  return FKV_OK;
}

int32_t check_step(const char* call, const fkv_cache* cache, int32_t layer, int32_t n_rows) {
  if (const int32_t status = check_cache(call, cache)) return status;
  FKV_REQUIRE(layer >= 0 && layer < cache->n_layers, FKV_BAD_ARGUMENT, "%s: layer %d of %d", call, layer,
              cache->n_layers);
  FKV_REQUIRE(n_rows >= 0 && n_rows <= cache->max_rows, FKV_BAD_ARGUMENT, "%s: %d rows, the cache's tables hold %d",
              call, n_rows, cache->max_rows);
  FKV_REQUIRE(cache->lanes != nullptr && cache->rows != nullptr, FKV_BAD_ARGUMENT, "%s: cache.%s is null", call,
              cache->lanes == nullptr ? "lanes" : "rows");
  const fkv_frames& device = cache->device;
  FKV_REQUIRE(is_stride(device.head) && is_stride(device.kv) && is_stride(device.row), FKV_BAD_ARGUMENT,
              "%s: cache.device strides (head %lld, kv %lld, row %lld) must be positive multiples of 16 bytes", call,
              static_cast<long long>(device.head), static_cast<long long>(device.kv),
              static_cast<long long>(device.row));
  return FKV_OK;
}

int32_t check_frames(const char* call, const char* name, const fkv_frames& frames) {
  FKV_REQUIRE(frames.base != 0 || frames.chunks != nullptr, FKV_BAD_ARGUMENT, "%s: %s has neither base nor chunks",
              call, name);
  FKV_REQUIRE(frames.base % 16 == 0, FKV_BAD_ARGUMENT, "%s: %s.base is not aligned to 16 bytes", call, name);
  FKV_REQUIRE(frames.shift >= 0 && frames.shift < 31, FKV_BAD_ARGUMENT, "%s: %s.shift is %d; it must be 0 to 30", call,
              name, frames.shift);
  // A pool of one layer may leave `layer` 0, a single KV head `head`.
  FKV_REQUIRE(frames.layer >= 0 && frames.layer % 16 == 0 && frames.head >= 0 && frames.head % 16 == 0 &&
                  is_stride(frames.frame) && is_stride(frames.kv) && frames.row >= 0 && frames.row % 16 == 0,
              FKV_BAD_ARGUMENT,
              "%s: %s strides (layer %lld, frame %lld, head %lld, kv %lld, row %lld) must be multiples of 16 bytes",
              call, name, static_cast<long long>(frames.layer), static_cast<long long>(frames.frame),
              static_cast<long long>(frames.head), static_cast<long long>(frames.kv),
              static_cast<long long>(frames.row));
  return FKV_OK;
}

int32_t check_chunk(const char* call, const fkv_cache* cache, const fkv_prefill_params* params) {
  if (const int32_t status = check_cache(call, cache)) return status;
  FKV_REQUIRE(params != nullptr, FKV_BAD_ARGUMENT, "%s: params is null", call);
  FKV_REQUIRE(params->struct_bytes == sizeof(fkv_prefill_params), FKV_ABI_MISMATCH,
              "%s: params.struct_bytes is %u, this library's fkv_prefill_params has %zu", call, params->struct_bytes,
              sizeof(fkv_prefill_params));
  FKV_REQUIRE(params->layer >= 0 && params->layer < cache->n_layers, FKV_BAD_ARGUMENT, "%s: layer %d of %d", call,
              params->layer, cache->n_layers);
  FKV_REQUIRE(params->start >= 0 && params->n >= 0 && params->start <= INT32_MAX - params->n, FKV_BAD_ARGUMENT,
              "%s: %d tokens from position %d", call, params->n, params->start);
  FKV_REQUIRE(params->qkv != nullptr, FKV_BAD_ARGUMENT, "%s: params.qkv is null", call);
  return check_frames(call, "params.frames", params->frames);
}

}  // namespace fkv
