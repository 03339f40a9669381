// recall.cpp: head pages into slots: straight from the host's blocks by the miss lists (gather), or from a staging
// buffer (scatter).
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "../frames.h"
#include "../serves.h"
#include "stages.h"

namespace fkv {
namespace {

// Where K and V of a head page start and how far apart their token rows are.
template <class Byte>
struct Place {
  Byte* k;
  Byte* v;
  int64_t row;
};
using Target = Place<char>;
using Source = Place<const char>;

// All rows of K and V; contiguous where both layouts are.
void copy_head_page(const fkv_cache& cache, const Target& to, const Source& from) {
  const size_t bytes = cache.head_dim * static_cast<size_t>(dtype_bytes(cache.dtype));
  const bool contiguous = to.row == static_cast<int64_t>(bytes) && from.row == to.row;
  const size_t piece = contiguous ? bytes * cache.page_size : bytes;
  const int32_t pieces = contiguous ? 1 : cache.page_size;
  for (int32_t i = 0; i < pieces; ++i) std::memcpy(to.k + i * to.row, from.k + i * from.row, piece);
  for (int32_t i = 0; i < pieces; ++i) std::memcpy(to.v + i * to.row, from.v + i * from.row, piece);
}

Target device_page(const fkv_cache& cache, const fkv_lane& lane, int32_t layer, int32_t frame, int32_t head) {
  return {lane_address(cache, lane, layer, frame, head, 0, 0), lane_address(cache, lane, layer, frame, head, 1, 0),
          cache.device.row};
}

Source host_page(const fkv_cache& cache, int32_t layer, int32_t block, int32_t head) {
  return {frame_address(cache.host, block, layer, head, 0, 0), frame_address(cache.host, block, layer, head, 1, 0),
          cache.host.row};
}

int64_t head_page_bytes(const fkv_cache& cache) {
  return 2LL * cache.page_size * cache.head_dim * dtype_bytes(cache.dtype);
}

// The miss list of one head of one row that has any.
struct List {
  const fkv_lane* lane;
  const fkv_miss* misses;
  int32_t head;
  int64_t first;  // misses in the lists before
};

void gather_one(const fkv_cache& cache, const List& list, const fkv_miss& miss, int32_t layer) {
  const Target slot = device_page(cache, *list.lane, layer, lane_frame_of_slot(*list.lane, miss.slot), list.head);
  if (miss.frame < 0) return copy_head_page(cache, slot, host_page(cache, layer, miss.block, list.head));
  const Target window = device_page(cache, *list.lane, layer, miss.frame, list.head);
  copy_head_page(cache, slot, {window.k, window.v, window.row});
}

// `staging` holds K then V of each entry, token rows contiguous.
void scatter_entries(Context& context, const fkv_cache& cache, const char* staging, const fkv_scatter_entry* entries,
                     int32_t n, int32_t layer) {
  const int64_t bytes = head_page_bytes(cache);
  for (int32_t i = 0; i < n; ++i) {
    const fkv_scatter_entry& entry = entries[i];
    if (entry.lane < 0 || entry.head < 0 || entry.head >= cache.n_kv_heads || entry.slot < 0 ||
        entry.slot >= cache.lanes[entry.lane].n_slots)
      throw std::runtime_error("an entry of a scatter names no slot; were the entries written before it ran?");
  }
  context.parallel(n, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const fkv_scatter_entry& entry = entries[i];
      const fkv_lane& lane = cache.lanes[entry.lane];
      const char* page = staging + i * bytes;
      copy_head_page(cache, device_page(cache, lane, layer, lane_frame_of_slot(lane, entry.slot), entry.head),
                     {page, page + bytes / 2, bytes / (2 * cache.page_size)});
    }
  });
}

}  // namespace

void gather_rows(Context& context, const fkv_cache& cache, const fkv_workspace& workspace, int32_t layer,
                 int32_t n_rows) {
  std::vector<List> lists;
  int64_t n = 0, n_host = 0;
  for (int32_t i = 0; i < n_rows; ++i) {
    const fkv_lane* lane = lane_of(cache, cache.rows[i]);
    for (int32_t h = 0; h < cache.n_kv_heads && lane != nullptr; ++h) {
      const int64_t index = miss_list(cache, i, h);
      const int32_t n_misses = workspace.n_misses[index];
      if (n_misses == 0) continue;
      const fkv_miss* misses = workspace.misses + index * cache.max_slots;
      for (int32_t m = 0; m < n_misses; ++m) {
        if (misses[m].frame >= 0) continue;
        if (misses[m].block < 0) throw std::runtime_error("a selected page has no host block");
        ++n_host;
      }
      lists.push_back({lane, misses, h, n});
      n += n_misses;
    }
  }
  if (n == 0) return;
  if (n_host > 0) context.link(static_cast<uint64_t>(n_host * head_page_bytes(cache)), true);
  context.parallel(n, 4, [&](int64_t begin, int64_t end) {
    const auto after = [](int64_t miss, const List& list) { return miss < list.first; };
    auto list = std::upper_bound(lists.begin(), lists.end(), begin, after) - 1;
    for (int64_t i = begin; i < end; ++i) {
      if (list + 1 != lists.end() && i >= (list + 1)->first) ++list;
      gather_one(cache, *list, list->misses[i - list->first], layer);
    }
  });
}

}  // namespace fkv

using namespace fkv;

int32_t fkv_recall_gather(const fkv_cache* cache, const fkv_workspace* workspace, int32_t layer, int32_t n_rows,
                          fkv_stream* stream) {
  if (const int32_t status = require_tables("fkv_recall_gather", cache, layer, n_rows)) return status;
  if (const int32_t status = require_workspace("fkv_recall_gather", workspace)) return status;
  if (const int32_t status = check_frames("fkv_recall_gather", "cache.host", cache->host)) return status;
  return launch(stream, "fkv_recall_gather", [cache = *cache, workspace = *workspace, layer, n_rows](Context& context) {
    gather_rows(context, cache, workspace, layer, n_rows);
  });
}

int32_t fkv_recall_scatter(const fkv_cache* cache, const void* staging, const fkv_scatter_entry* entries, int32_t n,
                           int32_t layer, fkv_stream* stream) {
  if (const int32_t status = require_tables("fkv_recall_scatter", cache, layer, 0)) return status;
  FKV_REQUIRE(n >= 0, FKV_BAD_ARGUMENT, "fkv_recall_scatter: n is %d", n);
  FKV_REQUIRE(n == 0 || (staging != nullptr && entries != nullptr), FKV_BAD_ARGUMENT,
              "fkv_recall_scatter: staging or entries is null");
  FKV_REQUIRE(reinterpret_cast<uintptr_t>(staging) % 16 == 0, FKV_BAD_ARGUMENT,
              "fkv_recall_scatter: staging is not aligned to 16 bytes");
  return launch(stream, "fkv_recall_scatter", [cache = *cache, staging, entries, n, layer](Context& context) {
    scatter_entries(context, cache, static_cast<const char*>(staging), entries, n, layer);
  });
}
