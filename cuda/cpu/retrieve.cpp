// retrieve.cpp: the fused retrieval runs the bodies of the separate operations in their order: the same bits.
#include "../checks_retrieve.h"
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
  if (stalls) {
    p.stall[1] = context.clock_ns();
    p.stall[0] += p.stall[1] - start;
  }
  if (p.finish) finish_rows(context, cache, p.digest_kind, p.layer, p.n_rows);
}

}  // namespace
}  // namespace fkv

using namespace fkv;

int32_t fkv_retrieve(const fkv_cache* cache, const fkv_retrieve_params* params, fkv_stream* stream) {
  const char* call = "fkv_retrieve";
  if (const int32_t status = check_retrieve(call, cache, params)) return status;
  return launch(stream, call,
                [cache = *cache, params = *params](Context& context) { retrieve(context, cache, params); });
}
