// dense.cu: the dense part's entry: which kernels run a list of phases.
#include "checks_dense.h"
#include "dense.cuh"

extern "C" int32_t fkv_chain_scratch_bytes(uint64_t* bytes, int32_t n_rows, int32_t max_k, int32_t max_out) {
  if (const int32_t status = fkv::check_chain_scratch(bytes, n_rows, max_k, max_out)) return status;
  *bytes = fkv::chain_scratch_bytes() + fkv::laid_out_bytes(n_rows, max_k);
  return FKV_OK;
}

extern "C" int32_t fkv_dense_chain(const fkv_phase* phases, int32_t n_phases, int32_t n_rows, int32_t family, void* scratch,
                                   fkv_stream* stream) {
  if (const int32_t status = fkv::check_chain(phases, n_phases, n_rows, family, scratch, stream)) return status;
  if (const int32_t status = fkv::ready(stream, "fkv_dense_chain")) return status;
  if (fkv::chains(phases, n_phases, n_rows, stream)) return fkv::run_chain(phases, n_phases, n_rows, scratch, stream);
  float* x = reinterpret_cast<float*>(static_cast<char*>(scratch) + fkv::chain_scratch_bytes());
  for (int32_t i = 0; i < n_phases; ++i)
    if (const int32_t status = fkv::launch_phase(phases[i], n_rows, x, stream)) return status;
  return FKV_OK;
}
