// pages.cpp: whole pages: copied between pools of any layout, digested, and finished (digested and written to the host)
// in a step.
//
// Source of the digests: Quest (channel-wise minimum and maximum of K); ArkVale (centre ± mean absolute deviation).
#include <stdexcept>
#include <vector>

#include "../checks_pages.h"
#include "../frames.h"
#include "math.h"
#include "stages.h"

namespace fkv {
namespace {

// Rows 0..n−1 of one head's K or V between two row strides.
void copy_rows(char* to, int64_t to_stride, const char* from, int64_t from_stride, int32_t n, int64_t row_bytes) {
  if (to_stride == row_bytes && from_stride == row_bytes) {
    std::memcpy(to, from, static_cast<size_t>(n * row_bytes));
    return;
  }
  for (int32_t r = 0; r < n; ++r)
    std::memcpy(to + r * to_stride, from + r * from_stride, static_cast<size_t>(row_bytes));
}

struct Channels {
  vec low, high;
};

FKV_INLINE vec keys_at(const char* keys, int64_t c, int64_t n, int32_t dtype) {
  return n < kLanes ? load_vec_tail(keys, c, dtype, n) : load_vec(keys, c, dtype);
}

// A NaN among a channel's keys makes both NaN: the page's score is NaN then, and ranks last.
FKV_INLINE Channels min_max(const char* keys, int64_t stride, int32_t rows, int64_t c, int64_t n, int32_t dtype) {
  vec low = keys_at(keys, c, n, dtype), high = low;
  for (int32_t r = 1; r < rows; ++r) {
    const vec k = keys_at(keys + r * stride, c, n, dtype);
    low = ((k < low) | (k != k)) ? k : low;
    high = ((k > high) | (k != k)) ? k : high;
  }
  return {low, high};
}

// Mean −/+ mean absolute deviation; both sums in f32 over ascending rows.
FKV_INLINE Channels mean_deviation(const char* keys, int64_t stride, int32_t rows, int64_t c, int64_t n,
                                   int32_t dtype) {
  const float share = 1.0f / static_cast<float>(rows);  // exact: pages hold a power of two of rows
  vec sum{}, deviation{};
  for (int32_t r = 0; r < rows; ++r) sum += keys_at(keys + r * stride, c, n, dtype);
  const vec mean = sum * share;
  for (int32_t r = 0; r < rows; ++r) {
    const vec from_mean = keys_at(keys + r * stride, c, n, dtype) - mean;
    deviation += vec_from_bits(reinterpret_cast<vecu>(from_mean) & 0x7fffffffu);
  }
  deviation *= share;
  return {mean - deviation, mean + deviation};
}

// One head's digest: low[d] and high[d] of `dtype` from `rows` rows of K.
FKV_VECTOR void digest_head(char* low, char* high, const char* keys, int64_t stride, int32_t rows, int32_t head_dim,
                            int32_t dtype, int32_t kind) {
  for (int64_t c = 0; c < head_dim; c += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, head_dim - c);
    const Channels channels =
        kind == kQuest ? min_max(keys, stride, rows, c, n, dtype) : mean_deviation(keys, stride, rows, c, n, dtype);
    if (n == kLanes) {
      store_vec(low, c, dtype, channels.low);
      store_vec(high, c, dtype, channels.high);
      continue;
    }
    for (int64_t i = 0; i < n; ++i) {
      store(low, c + i, dtype, channels.low[i]);
      store(high, c + i, dtype, channels.high[i]);
    }
  }
}

void digest_page(const fkv_cache& cache, int32_t kind, const char* keys, int64_t stride, int64_t block, int32_t layer,
                 int32_t head) {
  digest_head(frame_address(cache.digests, block, layer, head, 0, 0),
              frame_address(cache.digests, block, layer, head, 1, 0), keys, stride, cache.page_size, cache.head_dim,
              cache.dtype, kind);
}

struct Pair {
  int32_t from, to;
};
struct Pages {
  fkv_cache cache;
  fkv_pages_params params;  // its from and to are the caller's and not read once the call has returned
  std::vector<Pair> pairs;
};

// Calls each(pair, layer, head) for all of them, on several threads.
template <typename Each>
void for_each_head(Context& context, const Pages& pages, const Each& each) {
  const int32_t layers = pages.params.n_layers, heads = pages.cache.n_kv_heads;
  context.parallel(static_cast<int64_t>(pages.pairs.size()) * layers * heads, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      each(pages.pairs[static_cast<size_t>(i / heads / layers)], static_cast<int32_t>(i / heads % layers),
           static_cast<int32_t>(i % heads));
    }
  });
}

void copy_pages(Context& context, const Pages& pages) {
  const fkv_frames &src = pages.params.src, &dst = pages.params.dst;
  const int32_t tokens = pages.params.n_tokens;
  const int64_t row_bytes = pages.cache.head_dim * dtype_bytes(pages.cache.dtype);
  // The host pool is the one in chunks; a copy that has it on one side crosses the link.
  const bool from_host = src.chunks != nullptr, to_host = dst.chunks != nullptr;
  if (from_host != to_host) {
    const int64_t heads = static_cast<int64_t>(pages.pairs.size()) * pages.params.n_layers * pages.cache.n_kv_heads;
    context.link(static_cast<uint64_t>(heads * 2 * tokens * row_bytes), from_host);
  }
  for_each_head(context, pages, [&](Pair pair, int32_t layer, int32_t head) {
    for (int32_t kv = 0; kv < 2; ++kv) {
      copy_rows(frame_address(dst, pair.to, pages.params.dst_layer0 + layer, head, kv, 0), dst.row,
                frame_address(src, pair.from, pages.params.src_layer0 + layer, head, kv, 0), src.row, tokens,
                row_bytes);
    }
  });
}

void digest_pages(Context& context, const Pages& pages, int32_t kind) {
  const fkv_frames& src = pages.params.src;
  for_each_head(context, pages, [&](Pair pair, int32_t layer, int32_t head) {
    digest_page(pages.cache, kind, frame_address(src, pair.from, pages.params.src_layer0 + layer, head, 0, 0), src.row,
                pair.to, pages.params.dst_layer0 + layer, head);
  });
}

Pages copy_of(const fkv_cache* cache, const fkv_pages_params* params) {
  Pages pages{*cache, *params, {}};
  pages.pairs.reserve(static_cast<size_t>(params->n));
  for (int32_t i = 0; i < params->n; ++i) pages.pairs.push_back({params->from[i], params->to[i]});
  return pages;
}

}  // namespace

void finish_rows(Context& context, const fkv_cache& cache, int32_t digest_kind, int32_t layer, int32_t n_rows) {
  const int32_t heads = cache.n_kv_heads;
  const auto finishes = [&](const fkv_row& row) {
    return row.sequence >= 0 && row.block >= 0 && (row.position + 1) % cache.page_size == 0;
  };
  int64_t bytes = 0;
  for (int32_t r = 0; r < n_rows; ++r) bytes += finishes(cache.rows[r]) ? cache.frame_bytes : 0;
  if (bytes == 0) return;
  context.link(static_cast<uint64_t>(bytes), false);
  context.parallel(int64_t{n_rows} * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const fkv_row& row = cache.rows[i / heads];
      if (!finishes(row)) continue;
      const int32_t head = static_cast<int32_t>(i % heads);
      const fkv_lane& lane = cache.lanes[row.sequence];
      const int32_t frame = lane_frame_of_window_page(lane, row.position / cache.page_size);
      if (frame >= lane.n_frames) throw std::runtime_error("page_finish: the page lies outside its lane's frames");
      digest_page(cache, digest_kind, lane_address(cache, lane, layer, frame, head, 0, 0), cache.device.row, row.block,
                  layer, head);
      for (int32_t kv = 0; kv < 2; ++kv) {
        copy_rows(frame_address(cache.host, row.block, layer, head, kv, 0), cache.host.row,
                  lane_address(cache, lane, layer, frame, head, kv, 0), cache.device.row, cache.page_size,
                  cache.head_dim * dtype_bytes(cache.dtype));
      }
    }
  });
}

}  // namespace fkv

using namespace fkv;

int32_t fkv_pages_copy(const fkv_cache* cache, const fkv_pages_params* params, fkv_stream* stream) {
  const char* call = "fkv_pages_copy";
  if (const int32_t status = check_pages(call, cache, params)) return status;
  if (const int32_t status = check_frames(call, "params.dst", params->dst)) return status;
  FKV_REQUIRE(params->n_tokens >= 0 && params->n_tokens <= cache->page_size, FKV_BAD_SHAPE,
              "%s: %d tokens of pages of %d", call, params->n_tokens, cache->page_size);
  return launch(stream, call, [pages = copy_of(cache, params)](Context& context) { copy_pages(context, pages); });
}

int32_t fkv_pages_digest(const fkv_cache* cache, const fkv_pages_params* params, int32_t digest_kind,
                         fkv_stream* stream) {
  const char* call = "fkv_pages_digest";
  if (const int32_t status = check_pages(call, cache, params)) return status;
  if (const int32_t status = check_digests(call, cache, digest_kind)) return status;
  return launch(stream, call, [pages = copy_of(cache, params), digest_kind](Context& context) {
    digest_pages(context, pages, digest_kind);
  });
}

int32_t fkv_page_finish(const fkv_cache* cache, int32_t digest_kind, int32_t layer, int32_t n_rows,
                        fkv_stream* stream) {
  const char* call = "fkv_page_finish";
  if (const int32_t status = check_step(call, cache, layer, n_rows)) return status;
  if (const int32_t status = check_digests(call, cache, digest_kind)) return status;
  if (const int32_t status = check_frames(call, "cache.host", cache->host)) return status;
  return launch(stream, call, [cache = *cache, digest_kind, layer, n_rows](Context& context) {
    finish_rows(context, cache, digest_kind, layer, n_rows);
  });
}
