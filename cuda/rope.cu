// rope.cu: QK-norm and rotary positions, in place on the q and k heads of each row.
// Source: RMSNorm per head as in Qwen3; RoPE in the half-split form (pairs i, i + d/2) of the Llama checkpoints.
//
// floor: n_rows·(Hq + Hkv)·d·8 B of L2 traffic: the launch and a sine in float64 decide → 3 us on an H100.
#include <algorithm>

#include "checks_dense.h"
#include "rope.cuh"

namespace fkv {
namespace {

constexpr int kRopeThreads = 256, kHeadsAtOnce = kRopeThreads / kWarp;
// Blocks that share the heads of a row, each of which makes the row's sines anew: where rows alone do not fill the device.
constexpr int kHeadBlocks = 4, kManyRows = 512;

// Block (row, part): angles in float64, because at position 10^5 an f32 angle is off by up to 4e-3; then a warp a head.
__global__ void __launch_bounds__(kRopeThreads) rope(const __grid_constant__ fkv_rope_params params) {
  __shared__ Turn turns[kMaxRopeDim / 2];
  const int32_t d = params.head_dim, position = params.positions[blockIdx.x];
  if (position < 0) return;  // an empty row
  make_turns(turns, params, position, threadIdx.x, kRopeThreads);
  __syncthreads();
  const int32_t turned = params.n_q_heads + params.n_kv_heads;
  float* row = params.qkv + blockIdx.x * (static_cast<int64_t>(turned) + params.n_kv_heads) * d;
  for (int32_t head = static_cast<int32_t>(blockIdx.y * kHeadsAtOnce + threadIdx.x / kWarp); head < turned;
       head += static_cast<int32_t>(gridDim.y) * kHeadsAtOnce) {
    float* x = row + static_cast<int64_t>(head) * d;
    turn_head(x, x, params, head < params.n_q_heads ? params.q_norm : params.k_norm, turns);
  }
}

}  // namespace
}  // namespace fkv

extern "C" int32_t fkv_rope(const fkv_rope_params* params, fkv_stream* stream) {
  if (const int32_t status = fkv::check_rope("fkv_rope", params)) return status;
  FKV_REQUIRE(stream != nullptr, FKV_BAD_ARGUMENT, "fkv_rope: stream is null");
  if (const int32_t status = fkv::ready(stream, "fkv_rope")) return status;
  const int64_t heads = static_cast<int64_t>(params->n_q_heads) + params->n_kv_heads;
  const int64_t most = params->n_rows < fkv::kManyRows ? fkv::kHeadBlocks : 1;
  const int64_t parts = std::min(fkv::divide_up(heads, fkv::kHeadsAtOnce), most);
  const dim3 blocks(static_cast<unsigned>(params->n_rows), static_cast<unsigned>(parts));
  fkv::rope<<<blocks, fkv::kRopeThreads, 0, stream->handle>>>(*params);
  return fkv::launched(stream, "fkv_rope");
}
