// checks.h: what every entry of the ABI refuses before it defers or launches anything. Plain C++, compiled into the twin and into
// the CUDA library alike, so that both refuse the same calls with the same code and text.
#pragma once
#include <cstdint>

#include "freekv.h"

namespace fkv {

// Sets the calling thread's error text (printf style) and returns `status`.
int32_t fail(int32_t status, const char* format, ...) __attribute__((format(printf, 2, 3)));

#define FKV_REQUIRE(condition, status, ...) \
  do {                                      \
    if (!(condition)) return fkv::fail(status, __VA_ARGS__); \
  } while (0)

inline bool is_dtype(int32_t dtype) { return dtype == FKV_F32 || dtype == FKV_BF16 || dtype == FKV_F16; }

// FKV_OK, or the status and text for a geometry that no operation can run on. `call` is the entry's name, for the text.
int32_t check_cache(const char* call, const fkv_cache* cache);
// The same for one layer of one step: also the step's tables, 0 <= layer < n_layers and 0 <= n_rows <= max_rows.
int32_t check_step(const char* call, const fkv_cache* cache, int32_t layer, int32_t n_rows);
// The same for a chunk of a prompt: layer, start and n, qkv and frames (`out` is attention's own).
int32_t check_chunk(const char* call, const fkv_cache* cache, const fkv_prefill_params* params);
// Strides of `frames` (named `name` in the text): positive multiples of 16, and a base or chunks.
int32_t check_frames(const char* call, const char* name, const fkv_frames& frames);

// Geometry, layer, rows and the tables that a step writes.
inline int32_t require_tables(const char* call, const fkv_cache* cache, int32_t layer, int32_t n_rows) {
  if (const int32_t status = check_step(call, cache, layer, n_rows)) return status;
  FKV_REQUIRE(cache->max_pages > 0 && cache->max_slots >= 0, FKV_BAD_SHAPE,
              "%s: max_pages is %d and max_slots %d; they cannot be less than 1 and 0", call, cache->max_pages,
              cache->max_slots);
  FKV_REQUIRE(
      cache->block_table && cache->flags && cache->counters && cache->tokens && cache->positions && cache->sampled,
      FKV_BAD_ARGUMENT, "%s: block_table, flags, counters, tokens, positions or sampled of the cache is null", call);
  return FKV_OK;
}

// The memory of one retrieval in flight.
inline int32_t require_workspace(const char* call, const fkv_workspace* workspace) {
  FKV_REQUIRE(workspace != nullptr, FKV_BAD_ARGUMENT, "%s: workspace is null", call);
  FKV_REQUIRE(workspace->scores && workspace->raw && workspace->n_misses && workspace->misses, FKV_BAD_ARGUMENT,
              "%s: scores, raw, n_misses or misses of the workspace is null", call);
  return FKV_OK;
}

inline int32_t require_stage(const char* call, int32_t stage) {
  FKV_REQUIRE(stage == FKV_NOW || stage == FKV_NEXT || stage == FKV_FIRST, FKV_BAD_ARGUMENT,
              "%s: stage %d is none of NOW, NEXT, FIRST", call, stage);
  return FKV_OK;
}

// Where pages are scored from, with whose q and with which pooling.
inline int32_t require_scoring(const char* call, const fkv_cache& cache, int32_t stage, const float* qkv) {
  if (const int32_t status = require_stage(call, stage)) return status;
  FKV_REQUIRE(qkv != nullptr || stage != FKV_NOW, FKV_BAD_ARGUMENT, "%s: qkv is null; stage NOW scores with its q",
              call);
  FKV_REQUIRE(cache.pooling == 0 || cache.pooling == 1, FKV_BAD_ARGUMENT,
              "%s: pooling is %d; it is 0 (softmax) or 1 (raw)", call, cache.pooling);
  return check_frames(call, "cache.digests", cache.digests);
}

}  // namespace fkv
