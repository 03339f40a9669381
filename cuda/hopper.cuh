// hopper.cuh: what Hopper adds: barriers in shared memory that count what copies bring, copies by tensor maps, warpgroups and
// their matrix products. The barriers exist from sm_90 on, warpgroups on sm_90a alone.
#pragma once
#include <cuda.h>
#include <cudaTypedefs.h>

#include "mma.cuh"

namespace fkv {

// ---- barriers that count arrivals and bytes ----

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// On the same barrier of block `rank` of the cluster. Nothing but reads by the tensor cores, which are over, is to come
// before it: no release or acquire of the cluster's, which cost a third of the speed (measured: 4.1e14 to 6.6e14/s).
__device__ __forceinline__ void barrier_arrive_at(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(
          shared_address(barrier)),
      "r"(rank)
      : "memory");
}
// An arrival, and that many bytes to come.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Until the phase of this parity is over; one that is before the first passes at once with parity 1.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// After barrier_init, before others use the barrier.
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// True in one thread of a warp that is here as a whole.
__device__ __forceinline__ bool elect_one() {
  uint32_t one;
  asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.b32 %0, 1, 0, one;\n}" : "=r"(one));
  return one != 0;
}
// Between ordinary stores to shared memory and the tensor cores or copy engine that read it.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A numbered barrier of the block, for `threads` of it; 0 is __syncthreads.
__device__ __forceinline__ void named_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// ---- copies by tensor maps; their bytes count towards the barrier ----

__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, uint64_t* barrier, const int32_t (&at)[2]) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1])
      : "memory");
}
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap* map, uint64_t* barrier, const int32_t (&at)[5]) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
      : "memory");
}
// policy: of the L2.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap* map, uint64_t* barrier, const int32_t (&at)[3], uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// To the same place, with the same barrier, of both blocks of a pair.
__device__ __forceinline__ void copy_box_to_both(uint32_t to, const CUtensorMap* map, uint64_t* barrier, const int32_t (&at)[2]) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "h"(static_cast<uint16_t>(3))
      : "memory");
}

using EncodeTiled = PFN_cuTensorMapEncodeTiled_v12000;
// The driver's, which is not linked.
inline int32_t find_encode(EncodeTiled* encode, const char* call, fkv_stream* stream) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
  if (const int32_t status = status_of(stream->device, error, call)) return status;
  FKV_REQUIRE(found == cudaDriverEntryPointSuccess && entry != nullptr, FKV_UNSUPPORTED,
              "%s: the driver has no cuTensorMapEncodeTiled", call);
  *encode = reinterpret_cast<EncodeTiled>(entry);
  return FKV_OK;
}

// A map of values of two bytes, in boxes whose rows of 128 bytes are swizzled; what lies outside reads as zeros. strides:
// in bytes, of all dimensions but the first.
template <int n>
int32_t encode_map(CUtensorMap* map, EncodeTiled encode, const char* call, int32_t dtype, const void* memory,
                   const cuuint64_t (&sizes)[n], const cuuint64_t (&strides)[n - 1], const cuuint32_t (&box)[n]) {
  cuuint32_t steps[n];
  std::fill(steps, steps + n, 1u);
  const CUtensorMapDataType type = dtype == FKV_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result = encode(map, type, n, const_cast<void*>(memory), sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FKV_REQUIRE(result == CUDA_SUCCESS, FKV_BAD_ARGUMENT, "%s: no tensor map of %llu rows of %llu values (driver error %d)", call,
              static_cast<unsigned long long>(sizes[1]), static_cast<unsigned long long>(sizes[0]), static_cast<int>(result));
  return FKV_OK;
}

// ---- warpgroups ----

constexpr int kWarpgroup = 128;  // threads

// Registers of a thread, moved between the warpgroups of a block.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- products ----

// Tiles lie in shared memory as panels: rows of 64 values (128 bytes), eight of them in 1 KiB, swizzled, which is what the copy
// engine leaves. Tensor cores read a panel with k along its rows (`step` is not used), or with k down its rows (`step` is the
// bytes to the panel with the next 64 columns). A panel starts at a multiple of 1 KiB.
constexpr int kSwizzleBytes = 1024;
constexpr uint32_t kOnePanel = 16;  // a step that is not used
__device__ __forceinline__ uint64_t panel_at(uint32_t address, uint32_t step) {
  constexpr uint64_t kSwizzled = uint64_t{1} << 62, kEightRows = uint64_t{kSwizzleBytes / 16} << 32;
  return kSwizzled | kEightRows | (uint64_t{step / 16} << 16) | ((address & 0x3ffff) >> 4);
}
__device__ __forceinline__ uint64_t panel_at(const void* p, uint32_t step) { return panel_at(shared_address(p), step); }

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
