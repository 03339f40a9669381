// dense.cu: the dense part's entry: which kernels run a list of phases.
#include "checks_dense.h"
#include "dense.cuh"
#include "tensor.cuh"

namespace fkv {
namespace {

// Rows up to which FAST is DECODE: a phase is bound by the bytes of W, which DECODE's kernels read best (a layer of
// the 8B shape, 32 rows on an H100: 309 us; big tiles, shared along k by all blocks: 332 us; at 64 rows 567 and 269 us).
constexpr int32_t kMostDecoded = 32;

}  // namespace
}  // namespace fkv

extern "C" int32_t fkv_chain_scratch_bytes(uint64_t* bytes, int32_t n_rows, int32_t max_k, int32_t max_out) {
  if (const int32_t status = fkv::check_chain_scratch(bytes, n_rows, max_k, max_out)) return status;
  const uint64_t decode = fkv::decode_scratch_bytes(n_rows, max_k, max_out), tensor = fkv::tensor_scratch_bytes(n_rows, max_k);
  *bytes = fkv::kHeadBytes + std::max(decode, tensor);
  return FKV_OK;
}

extern "C" int32_t fkv_dense_chain(const fkv_phase* phases, int32_t n_phases, int32_t n_rows, int32_t family, void* scratch,
                                   fkv_stream* stream) {
  if (const int32_t status = fkv::check_chain(phases, n_phases, n_rows, family, scratch, stream)) return status;
  if (const int32_t status = fkv::ready(stream, "fkv_dense_chain")) return status;
  char* memory = static_cast<char*>(scratch) + fkv::kHeadBytes;
  const bool many = family == FKV_PREFILL || (family == FKV_FAST && n_rows > fkv::kMostDecoded);
  if (many && fkv::takes_tensor(phases, n_phases)) return fkv::run_tensor(phases, n_phases, n_rows, family, memory, stream);
  if (fkv::chains(phases, n_phases, n_rows, stream)) return fkv::run_chain(phases, n_phases, n_rows, scratch, stream);
  for (int32_t i = 0; i < n_phases; ++i)
    if (const int32_t status = fkv::launch_phase(phases[i], n_rows, reinterpret_cast<float*>(memory), stream)) return status;
  return FKV_OK;
}
