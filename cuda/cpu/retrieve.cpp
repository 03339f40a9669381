// retrieve.cpp: the fused retrieval runs the bodies of the separate operations in their order: the same bits.
#include "../checks_dense.h"
#include "../frames.h"
#include "../serves.h"
#include "stages.h"

namespace fkv {
namespace {

bool serves_any(const fkv_cache& cache, int32_t layer, int32_t stage, int32_t n_rows) {
  for (int32_t i = 0; i < n_rows; ++i) {
    const fkv_lane* lane = lane_of(cache, cache.rows[i]);
    for (int32_t h = 0; h < cache.n_kv_heads && lane != nullptr; ++h) {
      if (serves(cache, cache.rows[i], *lane, layer, i, h, stage) != Query::none) return true;
    }
  }
  return false;
}

void retrieve(Context& context, const fkv_cache& cache, const fkv_retrieve_params& p) {
  if (p.prepare) {
    rope_rows(context, p.rope);
    append_rows(context, cache, p.qkv, p.layer, p.n_rows);
    check_rows(cache, p.qkv, p.layer, p.n_rows);
  }
  const bool any = serves_any(cache, p.layer, p.stage, p.n_rows);
  const bool stalls = p.stall != nullptr && p.stage == FKV_NOW && any;  // what serves nobody makes nobody wait
  const uint64_t start = stalls ? context.clock_ns() : 0;
  if (any) estimate_rows(context, cache, p.workspace, p.qkv, p.layer, p.stage, p.n_rows);
  select_rows(context, cache, p.workspace, p.layer, p.stage, p.n_rows);  // clears the miss lists in any case
  if (any) gather_rows(context, cache, p.workspace, p.layer, p.n_rows);
  if (stalls) *p.stall += context.clock_ns() - start;
  if (p.finish) finish_rows(context, cache, p.digest_kind, p.layer, p.n_rows);
}

int32_t require_prepare(const char* call, const fkv_cache& cache, const fkv_retrieve_params& p) {
  FKV_REQUIRE(p.stage == FKV_NOW, FKV_BAD_ARGUMENT, "%s: prepare goes with stage NOW, not %d", call, p.stage);
  FKV_REQUIRE(p.qkv != nullptr, FKV_BAD_ARGUMENT, "%s: qkv is null; prepare appends from it", call);
  const fkv_rope_params& rope = p.rope;
  FKV_REQUIRE(rope.n_rows == p.n_rows && rope.n_q_heads == cache.n_q_heads && rope.n_kv_heads == cache.n_kv_heads &&
                  rope.head_dim == cache.head_dim && rope.qkv == p.qkv,
              FKV_BAD_SHAPE, "%s: rows, heads, head_dim and qkv of rope must be the retrieval's", call);
  return check_rope(call, &rope);
}

int32_t require_finish(const char* call, const fkv_retrieve_params& p) {
  FKV_REQUIRE(p.stage == FKV_NEXT, FKV_BAD_ARGUMENT, "%s: finish goes with stage NEXT, not %d", call, p.stage);
  FKV_REQUIRE(p.digest_kind == 0 || p.digest_kind == 1, FKV_BAD_ARGUMENT,
              "%s: digest_kind %d is neither 0 (min, max) nor 1 (mean, deviation)", call, p.digest_kind);
  return FKV_OK;
}

}  // namespace
}  // namespace fkv

using namespace fkv;

int32_t fkv_retrieve(const fkv_cache* cache, const fkv_retrieve_params* params, fkv_stream* stream) {
  const char* call = "fkv_retrieve";
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
  if (params->finish) {
    if (const int32_t status = require_finish(call, *params)) return status;
  }
  return launch(stream, call,
                [cache = *cache, params = *params](Context& context) { retrieve(context, cache, params); });
}
