// tensor_mma.cu: products on tensor cores as every chip since sm_80 has them, for any shape: mma.sync over tiles that a ring of
// asynchronous copies brings. What Hopper does not do itself (tensor_hopper.cu), and all of it elsewhere.
//
// floor: 2·n_rows·n_out·k operations a part of x at the rate of mma.sync, which on an H100 is some 60% of the tensor cores' own;
// measured there: 3.0e14 to 3.5e14/s in one part, 3.9e14/s in two (2048 rows of the 8B shapes).
#include "tensor.cuh"

namespace fkv {
namespace {

constexpr const char* kCall = "fkv_dense_chain";
constexpr int kRows = 128, kOuts = 128, kDepth = 32;  // of a tile, and of a stage along k
constexpr int kThreads = 256;                         // warps 2 × 4, each with 64 rows by 32 outputs
constexpr int kRing = 4;
constexpr int kTileBytes = kRows * kDepth * 2;

template <int kParts>
constexpr size_t kRingBytes = size_t{kRing} * (kParts + 1) * kTileBytes;

// Where 16 bytes `chunk` of row `row` of a tile lie: eight rows read at once touch all banks.
__device__ __forceinline__ uint32_t place(int row, int chunk) {
  return static_cast<uint32_t>(row * (kDepth * 2) + ((chunk ^ (row >> 1 & 3)) << 4));
}

// Brings stages of x's parts and of W into the ring. Rows past the last are that row again: their sums are dropped.
template <class T, int kParts, bool kAligned>
struct Loader {
  const Product& job;
  char* ring;
  int32_t row0, out0;

  __device__ __forceinline__ void load(int slot, int64_t at) const {
    char* stage = ring + slot * (kParts + 1) * kTileBytes;
#pragma unroll
    for (int i = 0; i < kRows * 4 / kThreads; ++i) {
      const int row = (static_cast<int>(threadIdx.x) + i * kThreads) / 4, chunk = threadIdx.x % 4;
      const uint32_t to = place(row, chunk);
      const int64_t x = min(row0 + row, job.to.n_rows - 1) * job.x.width + at + chunk * 8;
      const uint32_t base = shared_address(stage);
      const bool padded = at + chunk * 8 < job.x.width;
      copy_async<16>(base + to, static_cast<const T*>(job.x.high) + (padded ? x : 0), padded);
      if constexpr (kParts == 2)
        copy_async<16>(base + kTileBytes + to, static_cast<const T*>(job.x.low) + (padded ? x : 0), padded);
      const int64_t k0 = at + chunk * 8;
      const T* w = static_cast<const T*>(job.weight) + int64_t{min(out0 + row, job.to.n_out - 1)} * job.k;
      if constexpr (kAligned) {
        const bool some = k0 < job.k;
        copy_async<16>(base + kParts * kTileBytes + to, some ? w + k0 : w, some);
      } else {
        alignas(16) T values[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) values[j] = k0 + j < job.k ? w[k0 + j] : from_f32<T>(0.0f);
        *reinterpret_cast<uint4*>(stage + kParts * kTileBytes + to) = *reinterpret_cast<const uint4*>(values);
      }
    }
  }
};

// A warp's 64 rows by 32 outputs: [16 rows][8 outputs][as the instruction leaves them].
template <class T, int kParts, bool kIsPlain>
__device__ __forceinline__ void finish_tile(const float (&sums)[4][4][4], const Product& job, int64_t row, int32_t out) {
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    float2 before[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) read_before<kIsPlain>(before[half], job, row + 16 * m + 8 * half, out);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = sums[m][i / 2][2 * half + i % 2];
      finish<T, kParts, kIsPlain>(job, row + 16 * m + 8 * half, out, v, before[half]);
    }
  }
}

template <class T, int kParts, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2)
    product_mma(const __grid_constant__ Product job, int32_t row_tiles, int32_t out_tiles) {
  extern __shared__ __align__(128) char ring[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Tile tile = tile_at(blockIdx.x, row_tiles, out_tiles);
  const Loader<T, kParts, kAligned> loader{job, ring, tile.row * kRows, tile.out * kOuts};
  const int row_at = warp % 2 * 64, out_at = warp / 2 * 32;
  const int32_t stages = job.k / kDepth + (job.k % kDepth != 0);

  for (int s = 0; s < kRing - 1; ++s) {
    if (s < stages) loader.load(s, int64_t{s} * kDepth);
    commit_copies();
  }
  float sums[4][4][4] = {};
  for (int32_t s = 0; s < stages; ++s) {
    await_groups<kRing - 2>();
    __syncthreads();  // the stage is there for all, and the slot that comes next has been read by all
    if (s + kRing - 1 < stages) loader.load((s + kRing - 1) % kRing, int64_t{s + kRing - 1} * kDepth);
    commit_copies();
    const uint32_t stage = shared_address(ring) + static_cast<uint32_t>(s % kRing * (kParts + 1) * kTileBytes);
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
      uint32_t w[2][4];  // of 16 outputs: low and high half of k of the first 8, then of the others
#pragma unroll
      for (int i = 0; i < 2; ++i)
        load_matrices(w[i], stage + kParts * kTileBytes +
                                 place(out_at + 16 * i + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          uint32_t x[4];
          load_matrices(x, stage + part * kTileBytes + place(row_at + 16 * m + lane % 16, 2 * step + lane / 16));
#pragma unroll
          for (int n = 0; n < 4; ++n) multiply_16x8<T>(sums[m][n], x, w[n / 2][n % 2 * 2], w[n / 2][n % 2 * 2 + 1]);
        }
      }
    }
  }
  await_groups<0>();
  const int64_t row = int64_t{tile.row} * kRows + row_at + lane / 4;
  const int32_t out = tile.out * kOuts + out_at;
  if (is_plain(job, row - lane / 4, 64, out, 32))
    finish_tile<T, kParts, true>(sums, job, row, out);
  else
    finish_tile<T, kParts, false>(sums, job, row, out);
}

template <class T, int kParts, bool kAligned>
int32_t launch(const Product& job, fkv_stream* stream) {
  const auto kernel = product_mma<T, kParts, kAligned>;
  if (const int32_t status = allow_shared(stream, kCall, kernel, kRingBytes<kParts>)) return status;
  const int32_t row_tiles = static_cast<int32_t>(divide_up(job.to.n_rows, kRows));
  const int32_t out_tiles = static_cast<int32_t>(divide_up(job.to.n_out, kOuts));
  const int64_t tiles = int64_t{row_tiles} * out_tiles;
  FKV_REQUIRE(tiles < int64_t{1} << 31, FKV_BAD_SHAPE, "%s: %lld tiles are too many for one product", kCall,
              static_cast<long long>(tiles));
  kernel<<<static_cast<unsigned>(tiles), kThreads, kRingBytes<kParts>, stream->handle>>>(job, row_tiles, out_tiles);
  return launched(stream, kCall);
}

template <class T>
int32_t launch(const Product& job, fkv_stream* stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(job.weight) % 16 == 0 && job.k % 8 == 0;
  if (job.x.low == nullptr) return aligned ? launch<T, 1, true>(job, stream) : launch<T, 1, false>(job, stream);
  return aligned ? launch<T, 2, true>(job, stream) : launch<T, 2, false>(job, stream);
}

}  // namespace

int32_t launch_mma(const Product& job, fkv_stream* stream) {
  return job.dtype == FKV_BF16 ? launch<__nv_bfloat16>(job, stream) : launch<__half>(job, stream);
}

}  // namespace fkv
