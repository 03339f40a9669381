// prefill.cuh: the kernels that prefill attention chooses from (prefill.cu).
#pragma once
#include "pages.cuh"

namespace fkv {

// K and V of two bytes, by warps of tensor cores on any chip; parts: how many values of their type q and the weights are the sum
// of.
int32_t attend_mma(const char* call, const fkv_cache& cache, const fkv_prefill_params& params, int parts, fkv_stream* stream);

// The same sums in the same order by Hopper's warpgroups.
bool has_warpgroups(const fkv_stream* stream, const fkv_prefill_params& params);
int32_t attend_warpgroups(const char* call, const fkv_cache& cache, const fkv_prefill_params& params, int parts,
                          fkv_stream* stream);

// Returns what body(T{}, width) returns: T of two bytes, and the least number of channels that kernels are compiled for and that
// holds d.
template <class Body>
int32_t with_shape(const fkv_cache& cache, const Body& body) {
  const auto with_width = [&](auto zero) {
    using std::integral_constant;
    if (cache.head_dim <= 64) return body(zero, integral_constant<int, 64>{});
    if (cache.head_dim <= 96) return body(zero, integral_constant<int, 96>{});
    if (cache.head_dim <= 128) return body(zero, integral_constant<int, 128>{});
    return body(zero, integral_constant<int, 256>{});
  };
  return cache.dtype == FKV_BF16 ? with_width(__nv_bfloat16{}) : with_width(__half{});
}

}  // namespace fkv
