// dense.cpp: the dense chain. Phases run one after another; each first lays x out in scratch (normalised where the
// phase has a norm, rows padded to whole vectors), so that y may overlap x, then runs the matmul over it.
#include "dense.h"

#include <algorithm>
#include <vector>

#include "../checks_dense.h"
#include "math.h"

namespace fkv {
namespace {

uint64_t scratch_bytes(int64_t n_rows, int64_t k) {
  return static_cast<uint64_t>(n_rows) * static_cast<uint64_t>(pad_lanes(k)) * 4;
}

// One row of x into scratch, normalised where there is a norm, and zeros up to whole vectors.
FKV_VECTOR void lay_out_row(float* out, const float* x, const void* norm, int32_t dtype, int64_t k, float eps) {
  if (norm != nullptr)
    rms_norm(out, x, norm, dtype, k, eps);
  else
    std::memcpy(out, x, static_cast<size_t>(k) * sizeof *x);
  for (int64_t i = k; i < pad_lanes(k); ++i) out[i] = 0.0f;
}

void run_phase(Context& context, const fkv_phase& phase, int64_t n_rows, float* scratch) {
  const int64_t k = phase.k, padded = pad_lanes(k);
  context.parallel(n_rows, std::max<int64_t>(1, (1 << 15) / padded), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      lay_out_row(scratch + row * padded, phase.x + row * phase.x_stride, phase.norm, phase.dtype, k, phase.eps);
  });
  Matmul job;
  job.weight = phase.weight;
  job.bias = phase.bias;
  job.x = scratch;
  job.y = phase.y;
  job.y_stride = phase.y_stride;
  job.n_rows = n_rows;
  job.n_out = phase.n_out;
  job.k = k;
  job.padded = padded;
  job.dtype = phase.dtype;
  job.epilogue = phase.epilogue;
  matmul(context, job);
}

}  // namespace
}  // namespace fkv

extern "C" int32_t fkv_chain_scratch_bytes(uint64_t* bytes, int32_t n_rows, int32_t max_k, int32_t max_out) {
  if (const int32_t status = fkv::check_chain_scratch(bytes, n_rows, max_k, max_out)) return status;
  *bytes = fkv::scratch_bytes(n_rows, max_k);
  return FKV_OK;
}

extern "C" int32_t fkv_dense_chain(const fkv_phase* phases, int32_t n_phases, int32_t n_rows, int32_t family,
                                   void* scratch, fkv_stream* stream) {
  if (const int32_t status = fkv::check_chain(phases, n_phases, n_rows, family, scratch, stream)) return status;
  return fkv::launch(
      stream, "fkv_dense_chain",
      [phases = std::vector<fkv_phase>(phases, phases + n_phases), n_rows, scratch](fkv::Context& context) {
        for (const fkv_phase& phase : phases) fkv::run_phase(context, phase, n_rows, static_cast<float*>(scratch));
      });
}
