// prefill.cpp: causal attention of a chunk of a prompt to itself and to everything before it.
// Keys come in blocks of 64 absolute positions, ascending, so that a token's bits do not depend on where chunks begin;
// the work is split over KV heads and tiles of queries, and each tile turns a block of keys into floats once for all
// its queries.
#include "../frames.h"
#include "math.h"
#include "prefill_tile.h"
#include "scratch.h"

namespace fkv {
namespace {

// Queries in a tile: enough for a block's conversion to be small beside them, few enough for q and sums to stay in the
// second-level cache.
constexpr int32_t kTileQueries = 256;

// Token rows first .. first + n − 1 of the chunk under one KV head.
void attend_tile(const fkv_cache& cache, const fkv_prefill_params& params, int32_t head, int32_t first, int32_t n) {
  thread_local Scratch scratch;
  const int32_t group = cache.n_q_heads / cache.n_kv_heads, d = cache.head_dim;
  const int64_t width = pad_lanes(d), padded = (int64_t{n} * group + kTileStep - 1) / kTileStep * kTileStep;
  const int64_t numbers = pad_lanes(padded);
  float* memory = scratch.floats(static_cast<size_t>(2 * padded * width + 2 * numbers + 3 * kBlockKeys * width));
  const auto take = [&memory](int64_t floats) { return memory += floats, memory - floats; };
  const QueryTile tile{
      take(padded * width), take(padded * width), take(numbers), take(numbers), width, n * group, group, d,
      params.start + first};
  const KeyBlock block{take(width * kBlockKeys), take(width * kBlockKeys), take(width * kBlockKeys)};

  const int64_t qkv_width = (int64_t{cache.n_q_heads} + 2 * cache.n_kv_heads) * d;
  for (int64_t i = 0; i < padded; ++i) {
    const int64_t query = std::min<int64_t>(i, tile.n_queries - 1);
    const float* q = params.qkv + (first + query / group) * qkv_width + (int64_t{head} * group + query % group) * d;
    for (int32_t c = 0; c < d; ++c) tile.q[i * width + c] = q[c] * cache.attention_scale;
  }
  clear_tile(tile);
  const int32_t length = params.start + first + n;
  for (int32_t key = 0; key < length; key += kBlockKeys) {
    const char *keys[kBlockKeys], *values[kBlockKeys];
    const int32_t n_keys = std::min(kBlockKeys, length - key);
    for (int32_t t = 0; t < n_keys; ++t) {
      const int32_t page = (key + t) / cache.page_size, row = (key + t) % cache.page_size;
      keys[t] = frame_address(params.frames, page, params.layer, head, 0, row);
      values[t] = keys[t] + params.frames.kv;
    }
    load_block(block, keys, values, n_keys, width, d, cache.dtype);
    attend_block(tile, block, key);
  }
  for (int32_t i = 0; i < tile.n_queries; ++i) {
    finish_query(params.out + ((int64_t{first} + i / group) * cache.n_q_heads + head * group + i % group) * d, tile, i);
  }
}

void attend_chunk(Context& context, const fkv_cache& cache, const fkv_prefill_params& params) {
  const int32_t heads = cache.n_kv_heads, group = cache.n_q_heads / heads;
  const int32_t tile_tokens = std::max(1, kTileQueries / group), tiles = (params.n + tile_tokens - 1) / tile_tokens;
  context.parallel(int64_t{tiles} * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      // The last tile has the most keys: it goes first.
      const int32_t first = static_cast<int32_t>(tiles - 1 - i / heads) * tile_tokens;
      attend_tile(cache, params, static_cast<int32_t>(i % heads), first, std::min(tile_tokens, params.n - first));
    }
  });
}

}  // namespace
}  // namespace fkv

using namespace fkv;

int32_t fkv_prefill_attend(const fkv_cache* cache, const fkv_prefill_params* params, fkv_stream* stream) {
  if (const int32_t status = check_chunk("fkv_prefill_attend", cache, params)) return status;
  FKV_REQUIRE(params->out != nullptr, FKV_BAD_ARGUMENT, "fkv_prefill_attend: params.out is null");
  return launch(stream, "fkv_prefill_attend",
                [cache = *cache, params = *params](Context& context) { attend_chunk(context, cache, params); });
}
