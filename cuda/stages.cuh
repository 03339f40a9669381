// stages.cuh: launches that the separate operations and the fused retrieval share, so that both run the same kernels and leave the
// same bits. Arguments have been checked and the stream is ready; `call` is the entry's name, for the text.
#pragma once
#include "common.cuh"

namespace fkv {

// What fkv_append and fkv_check do, either or both of them in one launch.
int32_t issue_token(const char* call, const fkv_cache& cache, const float* qkv, int32_t layer, int32_t n_rows, bool append, bool check,
                    fkv_stream* stream);
int32_t issue_estimate(const char* call, const fkv_cache& cache, const fkv_workspace& workspace, const float* qkv, int32_t layer,
                       int32_t stage, int32_t n_rows, fkv_stream* stream);
int32_t issue_select(const char* call, const fkv_cache& cache, const fkv_workspace& workspace, int32_t layer, int32_t stage,
                     int32_t n_rows, fkv_stream* stream);
int32_t issue_gather(const char* call, const fkv_cache& cache, const fkv_workspace& workspace, int32_t layer, int32_t n_rows,
                     fkv_stream* stream);
int32_t issue_finish(const char* call, const fkv_cache& cache, int32_t digest_kind, int32_t layer, int32_t n_rows, fkv_stream* stream);

}  // namespace fkv
