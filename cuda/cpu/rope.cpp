// rope.cpp: QK-norm and rotary positions, in place on the q and k heads of each row.
// Source: RMSNorm per head as in Qwen3; RoPE in the half-split form (pairs i, i + d/2) of the Llama checkpoints.
#include <algorithm>
#include <cmath>

#include "../checks_dense.h"
#include "math.h"
#include "stages.h"

namespace fkv {
namespace {

// Cosines and sines of one row, shared by its heads: angles in float64, because at position 10^5 an f32 angle is off by
// up to 4e-3.
struct Turn {
  float cos[kMaxRopeDim / 2], sin[kMaxRopeDim / 2];
};

void turn_of(Turn& turn, const fkv_rope_params& params, int32_t position) {
  for (int32_t i = 0; i < params.head_dim / 2; ++i) {
    const double angle = position * params.inv_freq[i];
    turn.cos[i] = static_cast<float>(std::cos(angle)) * params.scale;
    turn.sin[i] = static_cast<float>(std::sin(angle)) * params.scale;
  }
}

// `n` heads of d values that follow each other.
FKV_VECTOR void turn_heads(float* heads, int32_t n, int32_t d, const Turn& turn, const void* norm, int32_t dtype,
                           float eps) {
  const int32_t half = d / 2;
  for (int32_t h = 0; h < n; ++h) {
    float* x = heads + static_cast<int64_t>(h) * d;
    if (norm != nullptr) rms_norm(x, x, norm, dtype, d, eps);
    for (int32_t i = 0; i < half; ++i) {
      const float a = x[i], b = x[i + half];
      x[i] = a * turn.cos[i] - b * turn.sin[i];
      x[i + half] = b * turn.cos[i] + a * turn.sin[i];
    }
  }
}

}  // namespace

void rope_rows(Context& context, const fkv_rope_params& params) {
  const int64_t d = params.head_dim, width = (params.n_q_heads + 2ll * params.n_kv_heads) * d;
  context.parallel(params.n_rows, std::max<int64_t>(1, (1 << 13) / width), [&](int64_t begin, int64_t end) {
    Turn turn;
    for (int64_t row = begin; row < end; ++row) {
      const int32_t position = params.positions[row];
      if (position < 0) continue;  // an empty row
      float* qkv = params.qkv + row * width;
      turn_of(turn, params, position);
      turn_heads(qkv, params.n_q_heads, params.head_dim, turn, params.q_norm, params.dtype, params.eps);
      turn_heads(qkv + params.n_q_heads * d, params.n_kv_heads, params.head_dim, turn, params.k_norm, params.dtype,
                 params.eps);
    }
  });
}

}  // namespace fkv

extern "C" int32_t fkv_rope(const fkv_rope_params* params, fkv_stream* stream) {
  if (const int32_t status = fkv::check_rope("fkv_rope", params)) return status;
  FKV_REQUIRE(stream != nullptr, FKV_BAD_ARGUMENT, "fkv_rope: stream is null");
  return fkv::launch(stream, "fkv_rope",
                     [params = *params](fkv::Context& context) { fkv::rope_rows(context, params); });
}
