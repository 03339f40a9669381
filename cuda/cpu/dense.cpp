// dense.cpp: the dense chain. Phases run one after another; each first lays x out in scratch (normalised where the
// phase has a norm, rows padded to whole vectors), so that y may overlap x, then runs the matmul over it.
#include "dense.h"

#include <algorithm>
#include <vector>

#include "math.h"

namespace fkv {
namespace {

constexpr uint64_t kAlignment = 64;

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

int32_t check_phase(const fkv_phase& phase, int32_t i) {
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

}  // namespace
}  // namespace fkv

extern "C" int32_t fkv_chain_scratch_bytes(uint64_t* bytes, int32_t n_rows, int32_t max_k, int32_t max_out) {
  FKV_REQUIRE(bytes != nullptr, FKV_BAD_ARGUMENT, "fkv_chain_scratch_bytes: bytes is null");
  FKV_REQUIRE(n_rows > 0 && max_k > 0 && max_out > 0, FKV_BAD_SHAPE,
              "fkv_chain_scratch_bytes: n_rows %d, max_k %d and max_out %d must be positive", n_rows, max_k, max_out);
  *bytes = fkv::scratch_bytes(n_rows, max_k);
  return FKV_OK;
}

extern "C" int32_t fkv_dense_chain(const fkv_phase* phases, int32_t n_phases, int32_t n_rows, void* scratch,
                                   fkv_stream* stream) {
  FKV_REQUIRE(phases && scratch && stream, FKV_BAD_ARGUMENT, "fkv_dense_chain: phases, scratch or stream is null");
  FKV_REQUIRE(n_phases > 0 && n_rows > 0, FKV_BAD_SHAPE, "fkv_dense_chain: n_phases %d and n_rows %d must be positive",
              n_phases, n_rows);
  FKV_REQUIRE(reinterpret_cast<uintptr_t>(scratch) % fkv::kAlignment == 0, FKV_BAD_ARGUMENT,
              "fkv_dense_chain: scratch is not aligned to %llu bytes",
              static_cast<unsigned long long>(fkv::kAlignment));
  for (int32_t i = 0; i < n_phases; ++i)
    if (const int32_t status = fkv::check_phase(phases[i], i)) return status;
  return fkv::launch(
      stream, "fkv_dense_chain",
      [phases = std::vector<fkv_phase>(phases, phases + n_phases), n_rows, scratch](fkv::Context& context) {
        for (const fkv_phase& phase : phases) fkv::run_phase(context, phase, n_rows, static_cast<float*>(scratch));
      });
}
