// common.cuh: what kernel files share: launching and its errors, stored types, reductions in one fixed tree.
//
// An entry reads: checks of its arguments (checks.h), `ready(stream, call)`, launches on `stream->handle`, `launched(stream, call)`.
// More than one launch: FKV_LAUNCH_CHECK after each. Nothing here allocates or waits, so that every launch can be captured.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "checks.h"
#include "frames.h"
#include "freekv.h"
#include "runtime.cuh"
#include "serves.h"

// After a launch that others follow: returns from the entry with a status and text if CUDA did not take it.
#define FKV_LAUNCH_CHECK(stream, call)                                       \
  do {                                                                       \
    if (const int32_t status_ = fkv::launched(stream, call)) return status_; \
  } while (0)

namespace fkv {

// ---- launching ----

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

constexpr int64_t divide_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

constexpr size_t kPlainShared = 99 * 1024;  // what a block has on the smallest chips (sm_86, 89, 120)

// Lets a kernel use `bytes` of dynamic shared memory, where that is more than the 48 KiB it has without asking. To be said before the
// launch, every time: the permission belongs to the device that is current.
template <class Kernel>
int32_t allow_shared(fkv_stream* stream, const char* call, Kernel kernel, size_t bytes) {
  const size_t has = stream->device->properties.sharedMemPerBlockOptin, most = stream->device->plain ? std::min(has, kPlainShared) : has;
  FKV_REQUIRE(bytes <= most, FKV_UNSUPPORTED, "%s: needs %zu bytes of shared memory, the device has %zu", call, bytes, most);
  if (bytes <= 48 * 1024) return FKV_OK;
  const auto function = reinterpret_cast<const void*>(kernel);
  return status_of(stream->device,
                   cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), call);
}

// What a kernel that runs beside a dense chain may have of a multiprocessor at most (chain.cu checks that both fit).
constexpr int kSideThreads = 256, kSideRegisters = 112;
constexpr size_t kSideShared = 33 * 1024;

// The same as allow_shared for such a kernel: where the SM's shared memory is not already divided as the chain wants it, it
// waits until the SM is empty. To be said before the launch, every time; CUDA is told once.
template <class Kernel>
int32_t side_kernel(fkv_stream* stream, const char* call, Kernel kernel, size_t bytes) {
  if (const int32_t status = allow_shared(stream, call, kernel, bytes)) return status;
  const auto function = reinterpret_cast<const void*>(kernel);
  {
    const std::lock_guard<std::mutex> issue(stream->device->issue);
    if (!stream->device->side_kernels.insert(function).second) return FKV_OK;
  }
  return status_of(stream->device, cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, 100), call);
}

// Returns what body(T{}) returns, with T the type that `dtype` stores: float, __nv_bfloat16 or __half.
template <class Body>
int32_t with_dtype(int32_t dtype, const Body& body) {
  if (dtype == FKV_F32) return body(float{});
  if (dtype == FKV_BF16) return body(__nv_bfloat16{});
  return body(__half{});
}

// ---- stored types ----

template <class T>
struct Stored;
template <>
struct Stored<float> {
  static constexpr int32_t kDtype = FKV_F32;
};
template <>
struct Stored<__nv_bfloat16> {
  static constexpr int32_t kDtype = FKV_BF16;
};
template <>
struct Stored<__half> {
  static constexpr int32_t kDtype = FKV_F16;
};

__device__ __forceinline__ float to_f32(float value) { return value; }
__device__ __forceinline__ float to_f32(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_f32(__half value) { return __half2float(value); }

// Rounds to nearest even; NaN keeps its sign and is stored as the twin stores it (CUDA's own conversions give 0x7fff for all of them).
template <class T>
__device__ __forceinline__ T from_f32(float value);
template <>
__device__ __forceinline__ float from_f32<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_f32<__nv_bfloat16>(float value) {
  const auto nan = static_cast<unsigned short>(__float_as_uint(value) >> 16 | 0x40u);
  return value != value ? __ushort_as_bfloat16(nan) : __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half from_f32<__half>(float value) {
  const auto nan = static_cast<unsigned short>((__float_as_uint(value) >> 16 & 0x8000u) | 0x7e00u);
  return value != value ? __ushort_as_half(nan) : __float2half_rn(value);
}

// Element i where the type is only known at run time.
__device__ __forceinline__ float load(const void* p, int64_t i, int32_t dtype) {
  if (dtype == FKV_F32) return static_cast<const float*>(p)[i];
  if (dtype == FKV_BF16) return to_f32(static_cast<const __nv_bfloat16*>(p)[i]);
  return to_f32(static_cast<const __half*>(p)[i]);
}
__device__ __forceinline__ void store(void* p, int64_t i, int32_t dtype, float value) {
  if (dtype == FKV_F32) {
    static_cast<float*>(p)[i] = value;
  } else if (dtype == FKV_BF16) {
    static_cast<__nv_bfloat16*>(p)[i] = from_f32<__nv_bfloat16>(value);
  } else {
    static_cast<__half*>(p)[i] = from_f32<__half>(value);
  }
}

// Eight values, as 16-byte accesses; p is aligned to 16 bytes.
struct alignas(16) Eight {
  float v[8];
};
__device__ __forceinline__ Eight load8(const float* p) {
  Eight out;
  *reinterpret_cast<float4*>(out.v) = *reinterpret_cast<const float4*>(p);
  *reinterpret_cast<float4*>(out.v + 4) = *reinterpret_cast<const float4*>(p + 4);
  return out;
}
template <class Half>
__device__ __forceinline__ Eight load8(const Half* p) {
  static_assert(sizeof(Half) == 2);
  const uint4 bits = *reinterpret_cast<const uint4*>(p);
  const Half* half = reinterpret_cast<const Half*>(&bits);
  Eight out;
#pragma unroll
  for (int i = 0; i < 8; ++i) out.v[i] = to_f32(half[i]);
  return out;
}
__device__ __forceinline__ void store8(float* p, const Eight& in) {
  *reinterpret_cast<float4*>(p) = *reinterpret_cast<const float4*>(in.v);
  *reinterpret_cast<float4*>(p + 4) = *reinterpret_cast<const float4*>(in.v + 4);
}
template <class Half>
__device__ __forceinline__ void store8(Half* p, const Eight& in) {
  static_assert(sizeof(Half) == 2);
  uint4 bits;
  Half* half = reinterpret_cast<Half*>(&bits);
#pragma unroll
  for (int i = 0; i < 8; ++i) half[i] = from_f32<Half>(in.v[i]);
  *reinterpret_cast<uint4*>(p) = bits;
}

// ---- reductions: one tree, whatever the grid, so that a value's bits depend on its inputs alone ----

// Sum over the warp, or over each kLanes of its lanes, the same bits in all of them: halves first (lane i with i ^ 16, then 8, 4, 2, 1).
template <int kLanes = kWarp, class Number>
__device__ __forceinline__ Number warp_sum(Number value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}
// NaN where some lane's is not a number only if all are: fmaxf passes numbers on.
template <int kLanes = kWarp>
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}
// Sum over the block, in every thread: each warp's tree, then the warps' sums in the same tree. blockDim.x is a multiple of 32 and all
// threads take part; `shared` is 32 floats that nothing else uses until the next barrier.
__device__ __forceinline__ float block_sum(float value, float* shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  value = warp_sum(value);
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  value = warp_sum(lane < warps ? shared[lane] : 0.0f);
  __syncthreads();
  return value;
}
__device__ __forceinline__ float block_max(float value, float* shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  value = warp_max(value);
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  value = warp_max(lane < warps ? shared[lane] : -INFINITY);
  __syncthreads();
  return value;
}

// ---- clock ----

__device__ __forceinline__ uint64_t clock_ns() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

}  // namespace fkv
