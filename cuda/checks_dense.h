// checks_dense.h: what the dense part's entries refuse, on the twin and on CUDA alike.
#pragma once
#include <cstdint>

#include "checks.h"

namespace fkv {

constexpr uint64_t kScratchAlignment = 64;
constexpr int32_t kMaxRopeDim = 1024;

inline int32_t check_phase(const fkv_phase& phase, int32_t i) {
  FKV_REQUIRE(phase.weight && phase.x && phase.y, FKV_BAD_ARGUMENT,
              "fkv_dense_chain: weight, x or y of phase %d is null", i);
  FKV_REQUIRE(is_dtype(phase.dtype), FKV_BAD_ARGUMENT,
              "fkv_dense_chain: dtype %d of phase %d is none of F32, BF16, F16", phase.dtype, i);
  FKV_REQUIRE(phase.epilogue == FKV_STORE || phase.epilogue == FKV_ADD || phase.epilogue == FKV_SWIGLU,
              FKV_BAD_ARGUMENT, "fkv_dense_chain: epilogue %d of phase %d is none of STORE, ADD, SWIGLU",
              phase.epilogue, i);
  FKV_REQUIRE(phase.n_out > 0 && phase.k > 0, FKV_BAD_SHAPE,
              "fkv_dense_chain: phase %d has n_out %d and k %d; both must be positive", i, phase.n_out, phase.k);
  FKV_REQUIRE(phase.epilogue != FKV_SWIGLU || phase.n_out % 2 == 0, FKV_BAD_SHAPE,
              "fkv_dense_chain: phase %d is SWIGLU with n_out %d; gate and up rows come in pairs", i, phase.n_out);
  const int64_t y_width = phase.epilogue == FKV_SWIGLU ? phase.n_out / 2 : phase.n_out;
  FKV_REQUIRE(phase.x_stride >= phase.k && phase.y_stride >= y_width, FKV_BAD_SHAPE,
              "fkv_dense_chain: rows of phase %d overlap: x_stride %lld for k %d, y_stride %lld for %lld outputs", i,
              static_cast<long long>(phase.x_stride), phase.k, static_cast<long long>(phase.y_stride),
              static_cast<long long>(y_width));
  FKV_REQUIRE(phase.norm == nullptr || phase.eps >= 0.0f, FKV_BAD_ARGUMENT,
              "fkv_dense_chain: eps of phase %d is %g; it cannot be negative", i, static_cast<double>(phase.eps));
  return FKV_OK;
}

inline int32_t check_chain(const fkv_phase* phases, int32_t n_phases, int32_t n_rows, int32_t family, const void* scratch,
                           const fkv_stream* stream) {
  FKV_REQUIRE(phases && scratch && stream, FKV_BAD_ARGUMENT, "fkv_dense_chain: phases, scratch or stream is null");
  FKV_REQUIRE(n_phases > 0 && n_rows > 0, FKV_BAD_SHAPE, "fkv_dense_chain: n_phases %d and n_rows %d must be positive",
              n_phases, n_rows);
  FKV_REQUIRE(family >= FKV_DECODE && family <= FKV_FAST, FKV_BAD_ARGUMENT,
              "fkv_dense_chain: family %d is none of DECODE, PREFILL, FAST", family);
  FKV_REQUIRE(reinterpret_cast<uintptr_t>(scratch) % kScratchAlignment == 0, FKV_BAD_ARGUMENT,
              "fkv_dense_chain: scratch is not aligned to %llu bytes",
              static_cast<unsigned long long>(kScratchAlignment));
  for (int32_t i = 0; i < n_phases; ++i)
    if (const int32_t status = check_phase(phases[i], i)) return status;
  return FKV_OK;
}

inline int32_t check_chain_scratch(const uint64_t* bytes, int32_t n_rows, int32_t max_k, int32_t max_out) {
  FKV_REQUIRE(bytes != nullptr, FKV_BAD_ARGUMENT, "fkv_chain_scratch_bytes: bytes is null");
  FKV_REQUIRE(n_rows > 0 && max_k > 0 && max_out > 0, FKV_BAD_SHAPE,
              "fkv_chain_scratch_bytes: n_rows %d, max_k %d and max_out %d must be positive", n_rows, max_k, max_out);
  return FKV_OK;
}

inline int32_t check_embed(const float* out, const int32_t* tokens, const void* table, int32_t dtype, int32_t hidden,
                           int32_t vocab, int32_t n_rows, const fkv_stream* stream) {
  FKV_REQUIRE(out && tokens && table && stream, FKV_BAD_ARGUMENT, "fkv_embed: out, tokens, table or stream is null");
  FKV_REQUIRE(is_dtype(dtype), FKV_BAD_ARGUMENT, "fkv_embed: dtype %d is none of F32, BF16, F16", dtype);
  FKV_REQUIRE(hidden > 0 && vocab > 0 && n_rows > 0, FKV_BAD_SHAPE,
              "fkv_embed: hidden %d, vocab %d and n_rows %d must be positive", hidden, vocab, n_rows);
  return FKV_OK;
}

// `call` is the entry's name: fkv_retrieve prepares with RoPE, too.
inline int32_t check_rope(const char* call, const fkv_rope_params* params) {
  FKV_REQUIRE(params != nullptr, FKV_BAD_ARGUMENT, "%s: rope params is null", call);
  FKV_REQUIRE(params->struct_bytes == sizeof(fkv_rope_params), FKV_ABI_MISMATCH,
              "%s: rope struct_bytes is %u, this library's is %zu", call, params->struct_bytes,
              sizeof(fkv_rope_params));
  FKV_REQUIRE(params->qkv && params->positions && params->inv_freq, FKV_BAD_ARGUMENT,
              "%s: qkv, positions or inv_freq of rope is null", call);
  FKV_REQUIRE(params->n_rows > 0 && params->n_q_heads > 0 && params->n_kv_heads > 0, FKV_BAD_SHAPE,
              "%s: rope n_rows %d, n_q_heads %d and n_kv_heads %d must be positive", call, params->n_rows,
              params->n_q_heads, params->n_kv_heads);
  FKV_REQUIRE(params->head_dim > 0 && params->head_dim % 2 == 0 && params->head_dim <= kMaxRopeDim, FKV_BAD_SHAPE,
              "%s: head_dim %d of rope must be even and at most %d", call, params->head_dim, kMaxRopeDim);
  FKV_REQUIRE(is_dtype(params->dtype), FKV_BAD_ARGUMENT, "%s: dtype %d of rope is none of F32, BF16, F16", call,
              params->dtype);
  FKV_REQUIRE(params->eps >= 0.0f || !(params->q_norm || params->k_norm), FKV_BAD_ARGUMENT,
              "%s: eps %g of rope cannot be negative", call, static_cast<double>(params->eps));
  return FKV_OK;
}

inline int32_t check_sample(const fkv_cache* cache, const fkv_sample_params* params, const fkv_stream* stream) {
  FKV_REQUIRE(params && stream, FKV_BAD_ARGUMENT, "fkv_sample: params or stream is null");
  FKV_REQUIRE(params->struct_bytes == sizeof(fkv_sample_params), FKV_ABI_MISMATCH,
              "fkv_sample: params.struct_bytes is %u, this library's is %zu", params->struct_bytes,
              sizeof(fkv_sample_params));
  if (const int32_t status = check_step("fkv_sample", cache, 0, params->n_rows)) return status;
  FKV_REQUIRE(cache->sampled && cache->counters, FKV_BAD_ARGUMENT,
              "fkv_sample: sampled or counters of the cache is null");
  FKV_REQUIRE(params->results && params->step && params->scratch, FKV_BAD_ARGUMENT,
              "fkv_sample: results, step or scratch is null");
  FKV_REQUIRE(params->vocab > 0 && params->ring_entries > 0, FKV_BAD_SHAPE,
              "fkv_sample: vocab %d and ring_entries %d must be positive", params->vocab, params->ring_entries);
  return FKV_OK;
}

}  // namespace fkv
