// tensor_hopper.cu: products on Hopper's tensor cores (wgmma), which other instructions feed at 60% of their rate. One block a
// multiprocessor: a thread has the copy engine fill a ring of stages, two warpgroups multiply 128 rows by 256 outputs, 64
// rows each. Two blocks side by side along the rows share W: each fetches half of it for both, because a block alone would ask
// L2 for more than it gives (48 bytes a clock).
//
// floor: 2·n_rows·n_out·k operations a part of x: 4096 rows of 28672 × 4096 0.97 ms at the 9.9e14/s of the data sheet. Measured
// on an H100 (random data, epilogues in it): 1.33 ms, 7.2e14/s; 4096 × 14336 7.0e14 to 7.4e14/s; in two parts 7.2e14 to 7.7e14/s. The
// vendor's GEMM, bf16 outputs and no epilogue, in the same run: 7.8e14 and 8.0e14/s.
#include <cuda.h>

#include "tensor.cuh"

namespace fkv {
namespace {

constexpr const char* kCall = "fkv_dense_chain";
constexpr int kGroup = 128;      // threads of a warpgroup
constexpr int kThreads = 3 * kGroup;
constexpr int kPair = 2;         // blocks that share W
constexpr int kRows = 128, kOuts = 256, kDepth = 64;  // of a tile, and of a stage along k: 128 bytes, what a swizzle spans
constexpr int kXBytes = kRows * kDepth * 2, kWBytes = kOuts * kDepth * 2;
constexpr int kSwizzleBytes = 1024;  // of eight rows, and what they are aligned to

template <int kParts>
struct Ring {
  static constexpr int kStageBytes = kParts * kXBytes + kWBytes;
  static constexpr int kStages = kParts == 1 ? 4 : 3;
  static constexpr size_t kBytes = size_t{kStages} * kStageBytes + kSwizzleBytes;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// ---- barriers and copies ----

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void begin_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// On the same barrier of block `rank` of the cluster. Nothing but reads by the tensor cores, which are over, is to come
// before it: no release or acquire of the cluster's, which cost a third of the speed (measured: 4.1e14 to 6.6e14/s).
__device__ __forceinline__ void arrive_at(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
__device__ __forceinline__ void wait_phase(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void fetch(uint32_t to, const CUtensorMap* map, int at, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(at), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
// To the same place of both blocks.
__device__ __forceinline__ void fetch_for_both(uint32_t to, const CUtensorMap* map, int at, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(at), "r"(row), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(3))
      : "memory");
}

// ---- the instruction ----

// Rows of 128 bytes, swizzled, eight rows after eight rows.
__device__ __forceinline__ uint64_t matrix_at(uint32_t address) {
  return uint64_t{address >> 4 & 0x3fff} | uint64_t{1} << 16 | uint64_t{kSwizzleBytes >> 4} << 32 | uint64_t{1} << 62;
}

constexpr int kSums = 128;  // of a thread: 64 × 256 values over 128 threads

#define FKV_SUMS4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FKV_SUMS16(i) FKV_SUMS4(i), FKV_SUMS4(i + 4), FKV_SUMS4(i + 8), FKV_SUMS4(i + 12)
#define FKV_SUMS64(i) FKV_SUMS16(i), FKV_SUMS16(i + 16), FKV_SUMS16(i + 32), FKV_SUMS16(i + 48)
#define FKV_WGMMA(type)                                                                                                       \
  asm volatile(                                                                                                               \
      "{\n.reg .pred more;\nsetp.ne.b32 more, %130, 0;\n"                                                                     \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                                            \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
      "%25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "   \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, "   \
      "%71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, "   \
      "%94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, "    \
      "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, %128, %129, more, 1, 1, 0, 0;\n}" \
      : FKV_SUMS64(0), FKV_SUMS64(64)                                                                                         \
      : "l"(x), "l"(w), "r"(more))

// d = x · wᵀ, or d += with `more`: 64 rows of x, 256 of W, 16 values of k.
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[kSums], uint64_t x, uint64_t w, int more) {
  if constexpr (Stored<T>::kDtype == FKV_BF16)
    FKV_WGMMA("bf16");
  else
    FKV_WGMMA("f16");
}
__device__ __forceinline__ void begin_multiply() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_multiply() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all but the latest N groups are done.
template <int N>
__device__ __forceinline__ void wait_multiply() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// ---- the kernel ----

// Where in the ring a role stands.
template <int kStages>
struct Place {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++slot < kStages) return;
    slot = 0;
    parity ^= 1;
  }
};

// The sums of a warpgroup's 64 rows: two rows of each thread, eight times 32 outputs.
template <class T, int kParts, bool kIsPlain>
__device__ __forceinline__ void finish_tile(const float (&sums)[kSums], const Product& job, int64_t row, int32_t out) {
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    const int half = part / 2, first = part % 2 * 4;
    float2 before[4][4];  // as many as there are registers for
#pragma unroll
    for (int i = 0; i < 4; ++i) read_before<kIsPlain>(before[i], job, row + 8 * half, out + 32 * (first + i));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float v[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = sums[16 * (first + i) + j / 2 * 4 + 2 * half + j % 2];
      finish<T, kParts, kIsPlain>(job, row + 8 * half, out + 32 * (first + i), v, before[i]);
    }
  }
}
#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <class T, int kParts>
__global__ void __launch_bounds__(kThreads, 1)
    product_hopper(const __grid_constant__ Product job, const __grid_constant__ CUtensorMap high,
                   const __grid_constant__ CUtensorMap low, const __grid_constant__ CUtensorMap weight, int32_t row_pairs,
                   int32_t out_tiles) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  typedef Ring<kParts> R;
  extern __shared__ char memory[];
  __shared__ uint64_t full[R::kStages], empty[R::kStages];
  char* ring = memory + (kSwizzleBytes - shared_address(memory) % kSwizzleBytes) % kSwizzleBytes;
  const int group = threadIdx.x / kGroup, rank = blockIdx.x % kPair;
  const int32_t stages = job.k / kDepth + (job.k % kDepth != 0);
  const int64_t tiles = int64_t{row_pairs} * out_tiles;
  if (threadIdx.x == 0) {
    for (int s = 0; s < R::kStages; ++s) {
      begin_barrier(full + s, 1);
      begin_barrier(empty + s, 2 * kPair);  // both warpgroups of both blocks have read it
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  meet_cluster();

  Place<R::kStages> place;
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      for (int64_t t = blockIdx.x / kPair; t < tiles; t += gridDim.x / kPair) {
        const Tile tile = tile_at(t, row_pairs, out_tiles);
        const int row = (tile.row * kPair + rank) * kRows, out = tile.out * kOuts + rank * (kOuts / kPair);
        for (int32_t s = 0; s < stages; ++s, place.next()) {
          wait_phase(empty + place.slot, place.parity ^ 1);
          const uint32_t to = shared_address(ring + place.slot * R::kStageBytes);
          expect_bytes(full + place.slot, R::kStageBytes);
          fetch(to, &high, s * kDepth, row, full + place.slot);
          if constexpr (kParts == 2) fetch(to + kXBytes, &low, s * kDepth, row, full + place.slot);
          fetch_for_both(to + kParts * kXBytes + rank * (kWBytes / kPair), &weight, s * kDepth, out, full + place.slot);
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x % kGroup / kWarp;
    const auto release = [&](int slot) {
      if (threadIdx.x % kGroup < kPair) arrive_at(empty + slot, threadIdx.x % kGroup);
    };
    for (int64_t t = blockIdx.x / kPair; t < tiles; t += gridDim.x / kPair) {
      const Tile tile = tile_at(t, row_pairs, out_tiles);
      const int64_t group_row = int64_t{tile.row * kPair + rank} * kRows + (group - 1) * 64;
      if (group_row >= job.to.n_rows) {  // nothing to do but to keep the ring going
        for (int32_t s = 0; s < stages; ++s, place.next()) {
          wait_phase(full + place.slot, place.parity);
          release(place.slot);
        }
        continue;
      }
      float sums[kSums];
      int before = 0;
      for (int32_t s = 0; s < stages; ++s) {
        wait_phase(full + place.slot, place.parity);
        const uint32_t stage = shared_address(ring + place.slot * R::kStageBytes);
        const uint64_t w = matrix_at(stage + kParts * kXBytes), x = matrix_at(stage + (group - 1) * (kXBytes / 2));
        begin_multiply();
#pragma unroll
        for (int step = 0; step < kDepth / 16; ++step) {
#pragma unroll
          for (int part = 0; part < kParts; ++part)
            multiply_add<T>(sums, x + (part * kXBytes >> 4) + 2 * step, w + 2 * step, s > 0 || step > 0 || part > 0);
        }
        commit_multiply();
        wait_multiply<1>();
        if (s > 0) release(before);
        before = place.slot;
        place.next();
      }
      wait_multiply<0>();
      release(before);
      const int64_t row0 = group_row + warp * 16;
      if (is_plain(job, row0, 16, tile.out * kOuts, kOuts))
        finish_tile<T, kParts, true>(sums, job, row0 + lane / 4, tile.out * kOuts);
      else
        finish_tile<T, kParts, false>(sums, job, row0 + lane / 4, tile.out * kOuts);
    }
  }
  meet_cluster();  // the other block still arrives at barriers of this one
#endif
}

// ---------------------------------------------------------------------------------------------------------------------

typedef CUresult (*EncodeTiled)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's, which is not linked.
int32_t find_encode(EncodeTiled* encode, fkv_stream* stream) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
  if (const int32_t status = status_of(stream->device, error, kCall)) return status;
  FKV_REQUIRE(found == cudaDriverEntryPointSuccess, FKV_UNSUPPORTED, "%s: the driver has no cuTensorMapEncodeTiled", kCall);
  *encode = reinterpret_cast<EncodeTiled>(entry);
  return FKV_OK;
}

// `n` rows of `width` values, `stride` values apart, in boxes of kDepth values of `rows` rows. Outside it there are zeros.
int32_t encode_map(CUtensorMap* map, EncodeTiled encode, int32_t dtype, const void* memory, int64_t width, int64_t stride,
                   int64_t n, int rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(n)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {kDepth, static_cast<cuuint32_t>(rows)}, steps[2] = {1, 1};
  const CUtensorMapDataType type = dtype == FKV_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result = encode(map, type, 2, const_cast<void*>(memory), sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FKV_REQUIRE(result == CUDA_SUCCESS, FKV_BAD_ARGUMENT, "%s: no tensor map of %lld rows of %lld values (%d)", kCall,
              static_cast<long long>(n), static_cast<long long>(width), static_cast<int>(result));
  return FKV_OK;
}

template <class T, int kParts>
int32_t launch(const Product& job, fkv_stream* stream) {
  const auto kernel = product_hopper<T, kParts>;
  constexpr size_t kShared = Ring<kParts>::kBytes;
  if (const int32_t status = allow_shared(stream, kCall, kernel, kShared)) return status;
  EncodeTiled encode = nullptr;
  if (const int32_t status = find_encode(&encode, stream)) return status;
  CUtensorMap high, low, weight;
  const int64_t width = job.x.width, n_rows = job.to.n_rows;
  if (const int32_t status = encode_map(&high, encode, job.dtype, job.x.high, width, width, n_rows, kRows)) return status;
  const void* lows = kParts == 2 ? job.x.low : job.x.high;
  if (const int32_t status = encode_map(&low, encode, job.dtype, lows, width, width, n_rows, kRows)) return status;
  if (const int32_t status = encode_map(&weight, encode, job.dtype, job.weight, job.k, job.k, job.to.n_out, kOuts / kPair))
    return status;

  const int32_t row_pairs = static_cast<int32_t>(divide_up(n_rows, kPair * kRows));
  const int32_t out_tiles = static_cast<int32_t>(divide_up(job.to.n_out, kOuts));
  const int64_t most = stream->device->properties.multiProcessorCount / kPair;
  const int64_t clusters = std::min(int64_t{row_pairs} * out_tiles, most);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kPair;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(clusters * kPair));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = stream->handle;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return status_of(stream->device, cudaLaunchKernelEx(&config, kernel, job, high, low, weight, row_pairs, out_tiles), kCall);
}

}  // namespace

bool takes_hopper(const Product& job, const fkv_stream* stream) {
  const fkv_device& device = *stream->device;
  return device.properties.major == 9 && !device.plain && device.properties.sharedMemPerBlockOptin >= Ring<2>::kBytes + 1024 &&
         reinterpret_cast<uintptr_t>(job.weight) % 16 == 0 && job.k % 8 == 0;
}

int32_t launch_hopper(const Product& job, fkv_stream* stream) {
  const bool two = job.x.low != nullptr;
  if (job.dtype == FKV_BF16) return two ? launch<__nv_bfloat16, 2>(job, stream) : launch<__nv_bfloat16, 1>(job, stream);
  return two ? launch<__half, 2>(job, stream) : launch<__half, 1>(job, stream);
}

}  // namespace fkv
