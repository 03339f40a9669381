// checks_pages.h: what the entries on whole pages refuse, on the twin and on CUDA alike.
#pragma once
#include <cstdint>

#include "checks.h"

namespace fkv {

enum { kQuest = 0, kArkVale = 1 };
// That one call takes.
constexpr int32_t kMaxPairs = 256;

inline int32_t check_pages(const char* call, const fkv_cache* cache, const fkv_pages_params* params) {
  if (const int32_t status = check_cache(call, cache)) return status;
  FKV_REQUIRE(params != nullptr, FKV_BAD_ARGUMENT, "%s: params is null", call);
  FKV_REQUIRE(params->struct_bytes == sizeof(fkv_pages_params), FKV_ABI_MISMATCH,
              "%s: params.struct_bytes is %u, this library's fkv_pages_params has %zu", call, params->struct_bytes,
              sizeof(fkv_pages_params));
  FKV_REQUIRE(params->n >= 0 && params->n <= kMaxPairs, FKV_BAD_ARGUMENT, "%s: %d pages; a call takes 0 to %d", call,
              params->n, kMaxPairs);
  FKV_REQUIRE(params->n == 0 || (params->from != nullptr && params->to != nullptr), FKV_BAD_ARGUMENT,
              "%s: params.%s is null", call, params->from == nullptr ? "from" : "to");
  FKV_REQUIRE(params->n_layers >= 0 && params->src_layer0 >= 0 && params->dst_layer0 >= 0 &&
                  params->n_layers <= cache->n_layers - params->src_layer0 &&
                  params->n_layers <= cache->n_layers - params->dst_layer0,
              FKV_BAD_ARGUMENT, "%s: %d layers from %d to %d; the cache has %d", call, params->n_layers,
              params->src_layer0, params->dst_layer0, cache->n_layers);
  for (int32_t i = 0; i < params->n; ++i) {
    FKV_REQUIRE(params->from[i] >= 0 && params->to[i] >= 0, FKV_BAD_ARGUMENT, "%s: pair %d is page %d to page %d", call,
                i, params->from[i], params->to[i]);
  }
  return check_frames(call, "params.src", params->src);
}

inline int32_t check_digests(const char* call, const fkv_cache* cache, int32_t kind) {
  FKV_REQUIRE(kind == kQuest || kind == kArkVale, FKV_BAD_ARGUMENT,
              "%s: digest_kind %d is neither 0 (min, max) nor 1 (mean, deviation)", call, kind);
  return check_frames(call, "cache.digests", cache->digests);
}

}  // namespace fkv
