// control.cpp: the first operation of a step, which tells the device what each row is.
#include <stdexcept>

#include "../serves.h"
#include "twin.h"

namespace fkv {
namespace {

// Rows, counters, tokens, positions and block tables of one step. Block tables take the new block before anything reads
// them.
void load_rows(const fkv_cache& cache, const fkv_row* entry, int32_t n_rows) {
  for (int32_t i = 0; i < n_rows; ++i) {
    const fkv_row row = entry[i];
    cache.rows[i] = row;
    cache.counters[i] = fkv_counters{};
    if (row.sequence < 0) {
      cache.tokens[i] = -1;
      cache.positions[i] = -1;
      continue;
    }
    const int32_t page = row.position / cache.page_size;
    if (row.position < 0 || page >= cache.max_pages)
      throw std::runtime_error("a row's position lies outside its block table");
    cache.tokens[i] = row.token >= 0 ? row.token : cache.sampled[row.sequence];
    cache.positions[i] = row.position;
    if (row.block >= 0) cache.block_table[static_cast<int64_t>(row.sequence) * cache.max_pages + page] = row.block;
  }
}

}  // namespace
}  // namespace fkv

using namespace fkv;

int32_t fkv_control_load(const fkv_cache* cache, const fkv_row* ring, const uint32_t* step, int32_t ring_entries,
                         int32_t n_rows, fkv_stream* stream) {
  if (const int32_t status = require_tables("fkv_control_load", cache, 0, n_rows)) return status;
  FKV_REQUIRE(ring != nullptr && step != nullptr, FKV_BAD_ARGUMENT, "fkv_control_load: ring or step is null");
  FKV_REQUIRE(ring_entries > 0, FKV_BAD_ARGUMENT, "fkv_control_load: ring_entries is %d; it must be positive",
              ring_entries);
  return launch(stream, "fkv_control_load", [cache = *cache, ring, step, ring_entries, n_rows](Context&) {
    const int64_t entry = *step % static_cast<uint32_t>(ring_entries);
    load_rows(cache, ring + entry * cache.max_rows, n_rows);
  });
}
