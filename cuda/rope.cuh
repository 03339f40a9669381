// rope.cuh: QK-norm and rotary positions of one head by one warp: what fkv_rope and the fused retrieval share, so that their bits are the
// same. Products are kept from fusing with sums, so that bits do not depend on what the compiler makes of a kernel.
#pragma once
#include "common.cuh"

namespace fkv {

struct Turn {
  float cosine, sine;
};

// cos and sin of angle >= 0, to an error far below half of an f32's last bit: the angle less its quarter turns (both products exact to
// 2^-100 of a turn below 2^31 of them), then polynomials on ±π/4. Two dozen instructions in a row; the library's function branches to a
// slow path in local memory beyond an angle of 10^5.
__device__ __forceinline__ Turn turn_by(double angle, float scale) {
  const double quarters = rint(angle * 0.63661977236758134308);
  double x = fma(-quarters, 1.57079632679489655800, angle);
  x = fma(-quarters, 6.12323399573676603587e-17, x);
  const double y = x * x;
  double s = -7.6471637318198164759e-13, c = 4.7794773323873852974e-14;  // 1/15!, 1/16!
  s = fma(s, y, 1.6059043836821614599e-10);
  c = fma(c, y, -1.1470745597729724714e-11);
  s = fma(s, y, -2.5052108385441718775e-08);
  c = fma(c, y, 2.0876756987868098979e-09);
  s = fma(s, y, 2.7557319223985890653e-06);
  c = fma(c, y, -2.7557319223985890653e-07);
  s = fma(s, y, -1.9841269841269841253e-04);
  c = fma(c, y, 2.4801587301587301566e-05);
  s = fma(s, y, 8.3333333333333333333e-03);
  c = fma(c, y, -1.3888888888888888889e-03);
  s = fma(s, y, -1.6666666666666666667e-01);
  c = fma(c, y, 4.1666666666666666667e-02);
  s = fma(s * y, x, x);
  c = fma(c, y, -0.5);
  c = fma(c, y, 1.0);
  const auto quadrant = static_cast<uint32_t>(static_cast<int64_t>(quarters));
  const double even = quadrant & 1u ? s : c, odd = quadrant & 1u ? c : s;
  return {static_cast<float>((quadrant + 1) & 2u ? -even : even) * scale, static_cast<float>(quadrant & 2u ? -odd : odd) * scale};
}

// turns [half] of a position, by `threads` threads of which the caller is one; a barrier follows before they are read.
__device__ __forceinline__ void make_turns(Turn* turns, const fkv_rope_params& params, int32_t position, int32_t thread,
                                           int32_t threads) {
  for (int32_t i = thread; i < params.head_dim / 2; i += threads) turns[i] = turn_by(position * params.inv_freq[i], params.scale);
}

// One head of `from` [d], normed (norm: its weights, or null) and turned, to `to` (the same memory, or another), by one warp: a lane
// reads and writes its own pairs only.
__device__ __forceinline__ void turn_head(float* to, const float* from, const fkv_rope_params& params, const void* norm,
                                          const Turn* turns) {
  constexpr int kTogether = 2;  // pairs of a lane that are on their way at once
  const int32_t lane = threadIdx.x % kWarp, half = params.head_dim / 2;
  float factor = 1.0f;
  if (norm != nullptr) {
    float squares = 0.0f;
    for (int32_t i = lane; i < half; i += kWarp) {
      squares = fmaf(from[i], from[i], squares);
      squares = fmaf(from[i + half], from[i + half], squares);
    }
    factor = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(params.head_dim) + params.eps);
  }
  for (int32_t first = lane; first < half; first += kTogether * kWarp) {
    float a[kTogether], b[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int32_t i = first + j * kWarp;
      if (i < half) a[j] = from[i], b[j] = from[i + half];
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int32_t i = first + j * kWarp;
      if (i >= half) break;
      if (norm != nullptr) {
        a[j] = a[j] * factor * load(norm, i, params.dtype);
        b[j] = b[j] * factor * load(norm, i + half, params.dtype);
      }
      const Turn turn = turns[i];
      to[i] = __fsub_rn(__fmul_rn(a[j], turn.cosine), __fmul_rn(b[j], turn.sine));
      to[i + half] = __fadd_rn(__fmul_rn(b[j], turn.cosine), __fmul_rn(a[j], turn.sine));
    }
  }
}

}  // namespace fkv
