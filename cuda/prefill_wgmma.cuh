// prefill_wgmma.cuh: Hopper's warpgroup matrix products, copies by tensor maps, and the barriers that count what they bring. For
// sm_90a alone.
//
// Tiles lie in shared memory as panels (prefill_tile.cuh), which is what the copy engine and the tensor cores call their
// 128-byte swizzle. A panel starts at a multiple of 1 KiB.
#pragma once
#include <cuda.h>

#include "common.cuh"

namespace fkv {

constexpr int kWarpgroup = 128;  // threads

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- barriers that count arrivals and bytes ----

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Until the phase of this parity is over; one that is before the first passes at once with parity 1.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\nbra again;\nover:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// After barrier_init, before others use the barrier.
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Between ordinary stores to shared memory and the tensor cores or copy engine that read it.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A numbered barrier of the block, for `threads` of it; 0 is __syncthreads.
__device__ __forceinline__ void named_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// The box at these coordinates of a five-dimensional map; its bytes count towards the barrier.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap* map, uint64_t* barrier, const int32_t (&at)[5]) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
      : "memory");
}

// ---- registers of a warpgroup ----

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- products ----

// How the tensor cores read a panel: with k along its rows (Q and K; `step` is not used), or with k down its rows (V; `step`
// is the bytes to the panel with the next 64 columns).
__device__ __forceinline__ uint64_t panel_at(const void* p, uint32_t step) {
  constexpr uint64_t kSwizzled = uint64_t{1} << 62, kEightRows = uint64_t{1024 / 16} << 32;
  return kSwizzled | kEightRows | (uint64_t{step / 16} << 16) | ((shared_address(p) & 0x3ffff) >> 4);
}
constexpr uint32_t kOnePanel = 16;  // a step that is not used

// Before products that read registers which were written since the last.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all but the `kLater` latest groups are done.
template <int kLater>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLater) : "memory");
}
// The compiler must not move accesses of these across this point.
template <int n>
__device__ __forceinline__ void pin(float (&values)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(values[i]));
}

// Wgmma<T, SIZE>::run(s, a, b, add): s (+)= A [64 rows][16] · B [16][2·SIZE columns], by the whole warpgroup, sixteen rows a
// warp; s as mma.m16n8k16 lays it out. A is a panel, and B has k along its rows; or A is four registers as for mma.m16n8k16, and
// B has k down its rows.

#define FKV_SUMS4(s, i) "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3])
#define FKV_SUMS8(s, i) FKV_SUMS4(s, i), FKV_SUMS4(s, i + 4)
#define FKV_SUMS16(s, i) FKV_SUMS8(s, i), FKV_SUMS8(s, i + 8)
#define FKV_SUMS32(s) FKV_SUMS16(s, 0), FKV_SUMS16(s, 16)
#define FKV_SUMS48(s) FKV_SUMS32(s), FKV_SUMS16(s, 32)
#define FKV_SUMS64(s) FKV_SUMS48(s), FKV_SUMS16(s, 48)
#define FKV_SUMS128(s) FKV_SUMS64(s), FKV_SUMS16(s, 64), FKV_SUMS16(s, 80), FKV_SUMS16(s, 96), FKV_SUMS16(s, 112)
#define FKV_NAMES32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FKV_NAMES48 \
  FKV_NAMES32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FKV_NAMES64 \
  FKV_NAMES48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FKV_NAMES128 \
  FKV_NAMES64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

template <class T, int n>
struct Wgmma;
#define FKV_WGMMA(T, TYPE, SIZE, N, A0, A1, A2, A3, A4, A5)                                                   \
  template <>                                                                                                  \
  struct Wgmma<T, SIZE> {                                                                                    \
    static __device__ __forceinline__ void run(float (&s)[SIZE], uint64_t a, uint64_t b, int add) {            \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #A2 ", 0;\n"                                           \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FKV_NAMES##SIZE "}, "  \
                   "%" #A0 ", %" #A1 ", p, 1, 1, 0, 0;\n}"                                                     \
                   : FKV_SUMS##SIZE(s)                                                                         \
                   : "l"(a), "l"(b), "r"(add));                                                                \
    }                                                                                                          \
    static __device__ __forceinline__ void run(float (&s)[SIZE], const uint32_t (&a)[4], uint64_t b, int add) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #A5 ", 0;\n"                                           \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FKV_NAMES##SIZE "}, "  \
                   "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #A4 ", p, 1, 1, 1;\n}"                        \
                   : FKV_SUMS##SIZE(s)                                                                         \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                            \
    }                                                                                                          \
  };
FKV_WGMMA(__nv_bfloat16, "bf16", 32, 64, 32, 33, 34, 35, 36, 37)
FKV_WGMMA(__nv_bfloat16, "bf16", 48, 96, 48, 49, 50, 51, 52, 53)
FKV_WGMMA(__nv_bfloat16, "bf16", 64, 128, 64, 65, 66, 67, 68, 69)
FKV_WGMMA(__nv_bfloat16, "bf16", 128, 256, 128, 129, 130, 131, 132, 133)
FKV_WGMMA(__half, "f16", 32, 64, 32, 33, 34, 35, 36, 37)
FKV_WGMMA(__half, "f16", 48, 96, 48, 49, 50, 51, 52, 53)
FKV_WGMMA(__half, "f16", 64, 128, 64, 65, 66, 67, 68, 69)
FKV_WGMMA(__half, "f16", 128, 256, 128, 129, 130, 131, 132, 133)
#undef FKV_WGMMA
#undef FKV_SUMS4
#undef FKV_SUMS8
#undef FKV_SUMS16
#undef FKV_SUMS32
#undef FKV_SUMS48
#undef FKV_SUMS64
#undef FKV_SUMS128
#undef FKV_NAMES32
#undef FKV_NAMES48
#undef FKV_NAMES64
#undef FKV_NAMES128

}  // namespace fkv
