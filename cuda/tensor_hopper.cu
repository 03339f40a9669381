// tensor_hopper.cu: products on Hopper's tensor cores (wgmma), which other instructions feed at 60% of their rate. One block a
// multiprocessor: a thread has the copy engine fill a ring of stages, two warpgroups multiply 128 rows by 256 outputs, 64
// rows each. Two blocks side by side along the rows share W: each fetches half of it for both, because a block alone would ask
// L2 for more than it gives (48 bytes a clock).
//
// floor: 2·n_rows·n_out·k operations a part of x: 4096 rows of 28672 × 4096 0.97 ms at the 9.9e14/s of the data sheet. Measured
// on an H100 (random data, epilogues in it): 1.33 ms, 7.2e14/s; 4096 × 14336 7.0e14 to 7.4e14/s; in two parts 7.2e14 to 7.7e14/s. The
// vendor's GEMM, bf16 outputs and no epilogue, in the same run: 7.8e14 and 8.0e14/s.
#include "hopper.cuh"
#include "tensor.cuh"

namespace fkv {
namespace {

constexpr const char* kCall = "fkv_dense_chain";
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kPair = 2;         // blocks that share W
constexpr int kRows = 128, kOuts = 256, kDepth = 64;  // of a tile, and of a stage along k: 128 bytes, what a swizzle spans
constexpr int kXBytes = kRows * kDepth * 2, kWBytes = kOuts * kDepth * 2;

template <int kParts>
struct Ring {
  static constexpr int kStageBytes = kParts * kXBytes + kWBytes;
  static constexpr int kStages = kParts == 1 ? 4 : 3;
  static constexpr size_t kBytes = size_t{kStages} * kStageBytes + kSwizzleBytes;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

constexpr int kSums = 128;  // of a thread: 64 × 256 values over 128 threads

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
  const int group = threadIdx.x / kWarpgroup, rank = blockIdx.x % kPair;
  const int32_t stages = job.k / kDepth + (job.k % kDepth != 0);
  const int64_t tiles = int64_t{row_pairs} * out_tiles;
  if (threadIdx.x == 0) {
    for (int s = 0; s < R::kStages; ++s) {
      barrier_init(full + s, 1);
      barrier_init(empty + s, 2 * kPair);  // both warpgroups of both blocks have read it
    }
    fence_barriers();
  }
  __syncthreads();
  meet_cluster();

  Place<R::kStages> place;
  if (group == 0) {
    give_registers<40>();
    if (threadIdx.x == 0) {
      for (int64_t t = blockIdx.x / kPair; t < tiles; t += gridDim.x / kPair) {
        const Tile tile = tile_at(t, row_pairs, out_tiles);
        const int row = (tile.row * kPair + rank) * kRows, out = tile.out * kOuts + rank * (kOuts / kPair);
        for (int32_t s = 0; s < stages; ++s, place.next()) {
          barrier_wait(empty + place.slot, place.parity ^ 1);
          const uint32_t to = shared_address(ring + place.slot * R::kStageBytes);
          barrier_expect(full + place.slot, R::kStageBytes);
          copy_box(to, &high, full + place.slot, {s * kDepth, row});
          if constexpr (kParts == 2) copy_box(to + kXBytes, &low, full + place.slot, {s * kDepth, row});
          copy_box_to_both(to + kParts * kXBytes + rank * (kWBytes / kPair), &weight, full + place.slot, {s * kDepth, out});
        }
      }
    }
  } else {
    take_registers<232>();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x % kWarpgroup / kWarp;
    const auto release = [&](int slot) {
      if (threadIdx.x % kWarpgroup < kPair) barrier_arrive_at(empty + slot, threadIdx.x % kWarpgroup);
    };
    for (int64_t t = blockIdx.x / kPair; t < tiles; t += gridDim.x / kPair) {
      const Tile tile = tile_at(t, row_pairs, out_tiles);
      const int64_t group_row = int64_t{tile.row * kPair + rank} * kRows + (group - 1) * 64;
      if (group_row >= job.to.n_rows) {  // nothing to do but to keep the ring going
        for (int32_t s = 0; s < stages; ++s, place.next()) {
          barrier_wait(full + place.slot, place.parity);
          release(place.slot);
        }
        continue;
      }
      float sums[kSums];
      int before = 0;
      for (int32_t s = 0; s < stages; ++s) {
        barrier_wait(full + place.slot, place.parity);
        const uint32_t stage = shared_address(ring + place.slot * R::kStageBytes);
        const uint64_t w = panel_at(stage + kParts * kXBytes, kOnePanel);
        const uint64_t x = panel_at(stage + (group - 1) * (kXBytes / 2), kOnePanel);
        products_begin();
#pragma unroll
        for (int step = 0; step < kDepth / 16; ++step) {
#pragma unroll
          for (int part = 0; part < kParts; ++part)
            Wgmma<T, kSums>::run(sums, x + (part * kXBytes >> 4) + 2 * step, w + 2 * step, s > 0 || step > 0 || part > 0);
        }
        products_end();
        products_wait<1>();
        if (s > 0) release(before);
        before = place.slot;
        place.next();
      }
      products_wait<0>();
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

// `n` rows of `width` values, one after another, in boxes of kDepth values of `rows` rows.
int32_t map_rows(CUtensorMap* map, EncodeTiled encode, int32_t dtype, const void* memory, int64_t width, int64_t n, int rows) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(n)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(width) * 2};
  const cuuint32_t box[] = {kDepth, static_cast<cuuint32_t>(rows)};
  return encode_map(map, encode, kCall, dtype, memory, sizes, strides, box);
}

template <class T, int kParts>
int32_t launch(const Product& job, fkv_stream* stream) {
  const auto kernel = product_hopper<T, kParts>;
  constexpr size_t kShared = Ring<kParts>::kBytes;
  if (const int32_t status = allow_shared(stream, kCall, kernel, kShared)) return status;
  EncodeTiled encode = nullptr;
  if (const int32_t status = find_encode(&encode, kCall, stream)) return status;
  CUtensorMap high, low, weight;
  const int64_t width = job.x.width, n_rows = job.to.n_rows;
  if (const int32_t status = map_rows(&high, encode, job.dtype, job.x.high, width, n_rows, kRows)) return status;
  const void* lows = kParts == 2 ? job.x.low : job.x.high;
  if (const int32_t status = map_rows(&low, encode, job.dtype, lows, width, n_rows, kRows)) return status;
  if (const int32_t status = map_rows(&weight, encode, job.dtype, job.weight, job.k, job.to.n_out, kOuts / kPair))
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
