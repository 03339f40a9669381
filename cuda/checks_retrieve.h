// checks_retrieve.h: what the fused retrieval refuses, on the twin and on CUDA alike.
#pragma once
#include <cstdint>

#include "checks_dense.h"

namespace fkv {

inline int32_t require_prepare(const char* call, const fkv_cache& cache, const fkv_retrieve_params& p) {
  FKV_REQUIRE(p.stage == FKV_NOW, FKV_BAD_ARGUMENT, "%s: prepare goes with stage NOW, not %d", call, p.stage);
  FKV_REQUIRE(p.qkv != nullptr, FKV_BAD_ARGUMENT, "%s: qkv is null; prepare appends from it", call);
  const fkv_rope_params& rope = p.rope;
  FKV_REQUIRE(rope.n_rows == p.n_rows && rope.n_q_heads == cache.n_q_heads && rope.n_kv_heads == cache.n_kv_heads &&
                  rope.head_dim == cache.head_dim && rope.qkv == p.qkv,
              FKV_BAD_SHAPE, "%s: rows, heads, head_dim and qkv of rope must be the retrieval's", call);
  return check_rope(call, &rope);
}

inline int32_t require_finish(const char* call, const fkv_retrieve_params& p) {
  FKV_REQUIRE(p.stage == FKV_NEXT, FKV_BAD_ARGUMENT, "%s: finish goes with stage NEXT, not %d", call, p.stage);
  FKV_REQUIRE(p.digest_kind == 0 || p.digest_kind == 1, FKV_BAD_ARGUMENT,
              "%s: digest_kind %d is neither 0 (min, max) nor 1 (mean, deviation)", call, p.digest_kind);
  return FKV_OK;
}

inline int32_t check_retrieve(const char* call, const fkv_cache* cache, const fkv_retrieve_params* params) {
  FKV_REQUIRE(params != nullptr, FKV_BAD_ARGUMENT, "%s: params is null", call);
  FKV_REQUIRE(params->struct_bytes == sizeof(fkv_retrieve_params), FKV_ABI_MISMATCH,
              "%s: params.struct_bytes is %u, this library's fkv_retrieve_params has %zu", call, params->struct_bytes,
              sizeof(fkv_retrieve_params));
  if (const int32_t status = require_tables(call, cache, params->layer, params->n_rows)) return status;
  if (const int32_t status = require_workspace(call, &params->workspace)) return status;
  if (const int32_t status = require_scoring(call, *cache, params->stage, params->qkv)) return status;
  if (const int32_t status = check_frames(call, "cache.host", cache->host)) return status;
  if (params->prepare) {
    if (const int32_t status = require_prepare(call, *cache, *params)) return status;
  }
  return params->finish ? require_finish(call, *params) : FKV_OK;
}

}  // namespace fkv
