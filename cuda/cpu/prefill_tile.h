// prefill_tile.h: attention of a tile of queries of one KV head to one block of keys, with an online softmax between
// blocks.
#pragma once
#include <cstdint>

#include "twin.h"

namespace fkv {

constexpr int32_t kBlockKeys = 64;  // part of the numerics: blocks of absolute positions, on every device
constexpr int32_t kTileStep = 6;    // queries taken together; a tile's arrays hold a multiple of them

// Keys of one block as floats: K transposed so that lanes are keys, V as it is.
struct KeyBlock {
  float* keys;    // [head_dim][kBlockKeys]
  float* values;  // [kBlockKeys][width]
  float* rows;    // [kBlockKeys][width] work memory
};

// Queries of one KV head and the state of their softmax. `width` is head_dim rounded up to whole vectors; arrays are
// aligned to 64 bytes. Rows past n_queries, up to a multiple of kTileStep, exist and are computed like the last query.
struct QueryTile {
  float* q;        // [..][width] times attention_scale
  float* sums;     // [..][width] Σ weight·V so far
  float* maximum;  // [..] of the scores so far
  float* total;    // [..] Σ weight so far
  int64_t width;
  int32_t n_queries, group, head_dim;
  int32_t position;  // of the first query; `group` queries each
};

// Makes the tile ready: no key seen.
void clear_tile(const QueryTile& tile);
// Fills the block from `n` rows of K and V; rows past n are not written and their keys must be masked.
void load_block(const KeyBlock& block, const char* const* keys, const char* const* values, int32_t n, int64_t width,
                int32_t head_dim, int32_t dtype);
// Attends keys first_key .. first_key + 63, those at most at each query's position. A masked key is not read, nor does
// it count.
void attend_block(const QueryTile& tile, const KeyBlock& block, int32_t first_key);
// out [head_dim] of one query.
void finish_query(float* out, const QueryTile& tile, int32_t query);

}  // namespace fkv
