// attend_combine.cuh: the strands of one row's KV head become its output, in their order, by the block of attend.cu that is done
// last. Nothing else runs there then, so what counts is trips to memory and how many instructions are cold.
#pragma once
#include "attend_tile.cuh"

namespace fkv {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;

struct Job {
  float* out;
  const float* qkv;
  unsigned* arrived;  // [row][KV head] blocks that are done; zeros between launches
  Sums* sums;         // [row][KV head][strand][group]
  float* values;      // [row][KV head][strand][group][d]: Σ 2^(score − maximum)·V
  int32_t layer, strands;
};

// Each strand's weight in the sum, 2^(its maximum − the largest), → weights [group][n]; what all weigh together → totals [group].
// Both are shared memory; ends with a barrier.
__device__ __forceinline__ void weigh_strands(const Job& job, int64_t first, int32_t n, int32_t group, float* weights,
                                              float* totals) {
  const int lane = threadIdx.x % kWarp;
  for (int head = threadIdx.x / kWarp; head < group; head += kWarps) {
    const auto sums_of = [&](int32_t strand) {
      return __ldcg(reinterpret_cast<const float2*>(job.sums + (first + strand) * group + head));
    };
    const float2 own = lane < n ? sums_of(lane) : make_float2(-INFINITY, 0.0f);
    float maximum = own.x, total = 0.0f;
    for (int32_t strand = lane + kWarp; strand < n; strand += kWarp) maximum = fmaxf(maximum, sums_of(strand).x);
    maximum = warp_max(maximum);
    for (int32_t strand = lane; strand < n; strand += kWarp) {
      const float2 sums = strand < kWarp ? own : sums_of(strand);
      const float weight = exp2f(sums.x - maximum);
      weights[head * n + strand] = weight;
      total = fmaf(weight, sums.y, total);
    }
    total = warp_sum(total);
    if (lane == 0) totals[head] = total;
  }
  __syncthreads();
}

// Few strands, and a thread for every two outputs: all strands are read at once, beside their weights. Measured on an H100 at
// 2080 tokens, batch 1 (17 strands): 0.44 us less than eight at a time; with more strands or outputs up to 1 us more.
constexpr int kFewStrands = 20;
__device__ __forceinline__ void combine_few_strands(float* out, const Job& job, int64_t first, int32_t n, int32_t group,
                                                    int32_t d, float* weights, float* totals) {
  const int32_t item = threadIdx.x, head = item / (d / 2);
  const bool inside = head < group;
  float2 values[kFewStrands];
#pragma unroll
  for (int i = 0; i < kFewStrands; ++i)
    if (inside && i < n) values[i] = __ldcg(reinterpret_cast<const float2*>(job.values + (first + i) * group * d) + item);
  weigh_strands(job, first, n, group, weights, totals);
  if (!inside) return;
  const float* weight = weights + head * n;
  float2 sum{};
#pragma unroll
  for (int i = 0; i < kFewStrands; ++i) {
    if (i >= n) break;
    sum = make_float2(fmaf(weight[i], values[i].x, sum.x), fmaf(weight[i], values[i].y, sum.y));
  }
  const float total = totals[head];
  reinterpret_cast<float2*>(out)[item] = make_float2(sum.x / total, sum.y / total);
}

// The strands 0 .. n − 1 of one row's KV head → out, by the whole block. `weights`: shared, [group][n]; `totals`: [group]. Of
// many strands or outputs a thread reads the next eight strands while it adds those before.
__device__ __forceinline__ void combine_strands(float* out, const Job& job, int64_t first, int32_t n, int32_t group, int32_t d,
                                                float* weights, float* totals) {
  if (n <= kFewStrands && group * d <= 2 * kThreads) {
    combine_few_strands(out, job, first, n, group, d, weights, totals);
    return;
  }
  constexpr int kBatch = 8;
  const int32_t quarters = d / 4, items = group * quarters;
  const auto load = [&](float4 (&to)[kBatch], int32_t item, int32_t begin) {
    const float* from = job.values + first * group * d + int64_t{item} * 4;
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      to[i] = __ldcg(reinterpret_cast<const float4*>(from + int64_t{min(begin + i, n - 1)} * group * d));
  };
  float4 now[kBatch], next[kBatch];
  load(now, min(static_cast<int32_t>(threadIdx.x), items - 1), 0);
  weigh_strands(job, first, n, group, weights, totals);

  for (int32_t item = threadIdx.x; item < items; item += kThreads) {
    const int32_t head = item / quarters;
    const float* weight = weights + head * n;
    float4 sum{};
    if (item >= kThreads) load(now, item, 0);
#pragma unroll 1
    for (int32_t begin = 0; begin < n; begin += kBatch) {
      load(next, item, begin + kBatch);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (begin + i >= n) break;
        const float each = weight[begin + i];
        sum = make_float4(fmaf(each, now[i].x, sum.x), fmaf(each, now[i].y, sum.y), fmaf(each, now[i].z, sum.z),
                          fmaf(each, now[i].w, sum.w));
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) now[i] = next[i];
    }
    const float total = totals[head];
    *reinterpret_cast<float4*>(out + int64_t{item} * 4) = make_float4(sum.x / total, sum.y / total, sum.z / total, sum.w / total);
  }
}

}  // namespace fkv
