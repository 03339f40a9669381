// mma.cuh: tensor cores as every chip since sm_80 has them: 16 × 8 sums over 16 values of two bytes, the copies and loads that
// feed them, pairs of values in one word.
#pragma once
#include "common.cuh"

namespace fkv {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- global to shared memory, beside what the thread does ----

// kBytes (8 or 16), or as many zeros. Sixteen pass L1 by.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool some) {
  const int bytes = some ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool some) {
  copy_async<kBytes>(shared_address(to), from, some);
}
// Ends a group of this thread's copies; until all but the kLater latest groups are there; until all copies are.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLater>
__device__ __forceinline__ void await_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- fragments ----

// Four 8 × 8 matrices, whose rows' addresses come from eight lanes each.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void load_transposed(uint32_t (&out)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row)
               : "memory");
}

// sums [16][8] += A [16][16] · B [16][8]. Of the sums, lane l has rows l / 4 (sums[0], sums[1]) and that + 8, columns
// 2·(l mod 4) and that + 1.
template <class T>
__device__ __forceinline__ void multiply_16x8(float* sums, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                              uint32_t b1) {
  if constexpr (Stored<T>::kDtype == FKV_BF16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <class T>
__device__ __forceinline__ void multiply_16x8(float* sums, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_16x8<T>(sums, a[0], a[1], a[2], a[3], b0, b1);
}

// ---- pairs ----

__device__ __forceinline__ uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Two values rounded to T in one word, the first in its lower half, and back. NaN stays NaN.
template <class T>
__device__ __forceinline__ uint32_t pack2(float first, float second) {
  uint32_t word;
  if constexpr (Stored<T>::kDtype == FKV_BF16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t word) {
  if constexpr (Stored<T>::kDtype == FKV_BF16)
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  const __half2 pair = *reinterpret_cast<const __half2*>(&word);
  return __half22float2(pair);
}

// Four values as sums of two of T each, up to 2^-17 (bf16) or 2^-23 (f16, within its range) of them. low: what rounding left, rounded; of
// what is not finite, nothing.
template <class T>
__device__ __forceinline__ void split4(const float (&v)[4], uint2& high, uint2& low) {
  const auto left = [](float x, float rounded) { return isfinite(rounded) ? x - rounded : 0.0f; };
  high = make_uint2(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]));
  const float2 a = unpack2<T>(high.x), b = unpack2<T>(high.y);
  low = make_uint2(pack2<T>(left(v[0], a.x), left(v[1], a.y)), pack2<T>(left(v[2], b.x), left(v[3], b.y)));
}

}  // namespace fkv
