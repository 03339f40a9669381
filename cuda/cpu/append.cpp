// append.cpp: K and V of new tokens into their pages: of one token a row (decode), of a chunk of one prompt (prefill).
#include <stdexcept>

#include "../frames.h"
#include "math.h"
#include "stages.h"

namespace fkv {
namespace {

// One head's row, rounded to nearest even.
FKV_VECTOR void store_row(char* to, const float* from, int32_t head_dim, int32_t dtype) {
  int64_t i = 0;
  for (; i + kLanes <= head_dim; i += kLanes) store_vec(to, i, dtype, StoredF32::load(from + i));
  for (; i < head_dim; ++i) store(to, i, dtype, from[i]);
}

// K of KV head `head` in a token's row of qkv; its V lies n_kv_heads heads further.
const float* key_of(const fkv_cache& cache, const float* qkv, int64_t token, int32_t head) {
  const int64_t width = int64_t{cache.n_q_heads} + 2 * cache.n_kv_heads;
  return qkv + (token * width + cache.n_q_heads + head) * cache.head_dim;
}

void append_chunk(Context& context, const fkv_cache& cache, const fkv_prefill_params& params) {
  const int32_t heads = cache.n_kv_heads;
  context.parallel(int64_t{params.n} * heads, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int32_t position = params.start + static_cast<int32_t>(i / heads), head = static_cast<int32_t>(i % heads);
      for (int32_t kv = 0; kv < 2; ++kv) {
        char* to = frame_address(params.frames, position / cache.page_size, params.layer, head, kv,
                                 position % cache.page_size);
        store_row(to, key_of(cache, params.qkv, i / heads, head + kv * heads), cache.head_dim, cache.dtype);
      }
    }
  });
}

}  // namespace

void append_rows(Context& context, const fkv_cache& cache, const float* qkv, int32_t layer, int32_t n_rows) {
  const int32_t heads = cache.n_kv_heads;
  context.parallel(int64_t{n_rows} * heads, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const fkv_row& row = cache.rows[i / heads];
      if (row.sequence < 0) continue;
      const int32_t head = static_cast<int32_t>(i % heads);
      const fkv_lane& lane = cache.lanes[row.sequence];
      const int32_t frame = lane_frame_of_window_page(lane, row.position / cache.page_size);
      if (row.position < 0 || frame >= lane.n_frames)
        throw std::runtime_error("append: the token's page lies outside its lane's frames");
      for (int32_t kv = 0; kv < 2; ++kv) {
        char* to = lane_address(cache, lane, layer, frame, head, kv, row.position % cache.page_size);
        store_row(to, key_of(cache, qkv, i / heads, head + kv * heads), cache.head_dim, cache.dtype);
      }
    }
  });
}

}  // namespace fkv

using namespace fkv;

int32_t fkv_append(const fkv_cache* cache, const float* qkv, int32_t layer, int32_t n_rows, fkv_stream* stream) {
  if (const int32_t status = check_step("fkv_append", cache, layer, n_rows)) return status;
  FKV_REQUIRE(qkv != nullptr, FKV_BAD_ARGUMENT, "fkv_append: qkv is null");
  return launch(stream, "fkv_append", [cache = *cache, qkv, layer, n_rows](Context& context) {
    append_rows(context, cache, qkv, layer, n_rows);
  });
}

int32_t fkv_prefill_append(const fkv_cache* cache, const fkv_prefill_params* params, fkv_stream* stream) {
  if (const int32_t status = check_chunk("fkv_prefill_append", cache, params)) return status;
  return launch(stream, "fkv_prefill_append",
                [cache = *cache, params = *params](Context& context) { append_chunk(context, cache, params); });
}
