// stages.h: bodies of operations that another operation runs as a part of itself, so that fused and separate give the same bits.
#pragma once
#include <atomic>

#include "twin.h"

namespace fkv {

// What fkv_rope does when the stream gets there: QK-norm, then RoPE, in place on params.qkv.
void rope_rows(Context& context, const fkv_rope_params& params);

// What fkv_append does: K and V of each row's token into its page.
void append_rows(Context& context, const fkv_cache& cache, const float* qkv, int32_t layer, int32_t n_rows);
// What fkv_page_finish does: digests and host copies of the pages that this step's tokens completed.
void finish_rows(Context& context, const fkv_cache& cache, int32_t digest_kind, int32_t layer, int32_t n_rows);

// ---- retrieval ----
// Bodies read lanes, rows and tables when they run: one captured call serves every length. They throw where device memory holds what no
// call could check (a page without a block, a lane wider than the miss lists).

// Adds to a counter of a row. The retrieval for the next step counts beside the main stream's.
inline void add_count(int32_t& counter, int32_t n) {
  std::atomic_ref<int32_t>(counter).fetch_add(n, std::memory_order_relaxed);
}

// What fkv_check does: flags and counts of the heads checked.
void check_rows(const fkv_cache& cache, const float* qkv, int32_t layer, int32_t n_rows);
// What fkv_estimate does: page scores of the heads that `stage` serves.
void estimate_rows(Context& context, const fkv_cache& cache, const fkv_workspace& workspace, const float* qkv, int32_t layer, int32_t stage,
                   int32_t n_rows);
// What fkv_select does: selection, slots, miss lists, counts.
void select_rows(Context& context, const fkv_cache& cache, const fkv_workspace& workspace, int32_t layer, int32_t stage, int32_t n_rows);
// What fkv_recall_gather does: head pages of the miss lists into their slots.
void gather_rows(Context& context, const fkv_cache& cache, const fkv_workspace& workspace, int32_t layer, int32_t n_rows);

}  // namespace fkv
