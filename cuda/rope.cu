// rope.cu: QK-norm and rotary positions, in place on the q and k heads of each row.
// Source: RMSNorm per head as in Qwen3; RoPE in the half-split form (pairs i, i + d/2) of the Llama checkpoints.
//
// floor: n_rows·(Hq + Hkv)·d·8 B of L2 traffic: the launch and one sine in float64 decide → 3 us on an H100.
#include <algorithm>

#include "checks_dense.h"
#include "common.cuh"

namespace fkv {
namespace {

constexpr int kRopeThreads = 256, kHeadsAtOnce = kRopeThreads / kWarp;
constexpr int kHeadBlocks = 4;  // blocks that share the heads of a row; each makes the row's sines anew

// Block (row, part): angles in float64, because at position 10^5 an f32 angle is off by up to 4e-3; then a warp a head.
// A lane reads and writes its own pairs only. Products are kept from fusing with sums, so that bits do not depend on
// what the compiler makes of this kernel.
__global__ void __launch_bounds__(kRopeThreads) rope(const __grid_constant__ fkv_rope_params params) {
  __shared__ float cosines[kMaxRopeDim / 2], sines[kMaxRopeDim / 2];
  const int32_t d = params.head_dim, half = d / 2, position = params.positions[blockIdx.x];
  if (position < 0) return;  // an empty row
  for (int32_t i = threadIdx.x; i < half; i += kRopeThreads) {
    double s, c;
    sincos(position * params.inv_freq[i], &s, &c);
    cosines[i] = static_cast<float>(c) * params.scale;
    sines[i] = static_cast<float>(s) * params.scale;
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int32_t turned = params.n_q_heads + params.n_kv_heads;
  float* row = params.qkv + blockIdx.x * (static_cast<int64_t>(turned) + params.n_kv_heads) * d;
  for (int32_t head = static_cast<int32_t>(blockIdx.y) * kHeadsAtOnce + warp; head < turned;
       head += static_cast<int32_t>(gridDim.y) * kHeadsAtOnce) {
    float* x = row + static_cast<int64_t>(head) * d;
    const void* norm = head < params.n_q_heads ? params.q_norm : params.k_norm;
    float factor = 1.0f;
    if (norm != nullptr) {
      float squares = 0.0f;
      for (int32_t i = lane; i < half; i += kWarp) {
        squares = fmaf(x[i], x[i], squares);
        squares = fmaf(x[i + half], x[i + half], squares);
      }
      factor = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(d) + params.eps);
    }
    for (int32_t i = lane; i < half; i += kWarp) {
      float a = x[i], b = x[i + half];
      if (norm != nullptr) {
        a = a * factor * load(norm, i, params.dtype);
        b = b * factor * load(norm, i + half, params.dtype);
      }
      x[i] = __fsub_rn(__fmul_rn(a, cosines[i]), __fmul_rn(b, sines[i]));
      x[i + half] = __fadd_rn(__fmul_rn(b, cosines[i]), __fmul_rn(a, sines[i]));
    }
  }
}

}  // namespace
}  // namespace fkv

extern "C" int32_t fkv_rope(const fkv_rope_params* params, fkv_stream* stream) {
  if (const int32_t status = fkv::check_rope("fkv_rope", params)) return status;
  FKV_REQUIRE(stream != nullptr, FKV_BAD_ARGUMENT, "fkv_rope: stream is null");
  if (const int32_t status = fkv::ready(stream, "fkv_rope")) return status;
  const int64_t heads = static_cast<int64_t>(params->n_q_heads) + params->n_kv_heads;
  const int64_t parts = std::min<int64_t>(fkv::divide_up(heads, fkv::kHeadsAtOnce), fkv::kHeadBlocks);
  const dim3 blocks(static_cast<unsigned>(params->n_rows), static_cast<unsigned>(parts));
  fkv::rope<<<blocks, fkv::kRopeThreads, 0, stream->handle>>>(*params);
  return fkv::launched(stream, "fkv_rope");
}
