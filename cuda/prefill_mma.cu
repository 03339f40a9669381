// prefill_mma.cu: prefill attention by warps of tensor cores, on any chip: sixteen query rows a warp, scores, weights and sums in
// registers, a block of K and one of V in shared memory, each of which arrives while the other is used.
//
// floor: 4·d operations for each query head and key at or before it, at the bf16 rate; twice that with two parts. Measured on an
// H100, 2048 tokens from 28672 on, d 128: 5.7 ms and 8.2 ms, bound by reading fragments from shared memory; the same bits as
// prefill_warpgroups.cu there.
#include "mma.cuh"
#include "prefill.cuh"
#include "prefill_tile.cuh"

namespace fkv {
namespace {

// A tile's query rows: as many as leave room for K and V in the 99 KiB that a block has on the smallest chips.
template <int kD, int kParts>
constexpr int kRows = kD <= 64 ? 128 : (kD <= 128 ? 128 : 64) / kParts;

template <int kD, int kParts>
struct Layout {
  static constexpr int kThreads = 2 * kRows<kD, kParts>;
  static constexpr int kPartBytes = kPanels<kD> * kRows<kD, kParts> * kRowBytes;
  alignas(16) char q[kParts * kPartBytes];
  alignas(16) char keys[kTileBytes<kD>];
  alignas(16) char values[kTileBytes<kD>];
  int32_t spoilt[kPanels<kD> * kPanel];
};

// K (kv 0) or V of one block into a tile, by the whole block; zeros from `length` on, and past d: what follows a tile is never
// read.
template <class T, int kD>
__device__ __forceinline__ void copy_tile(char* tile, const fkv_cache& cache, const fkv_prefill_params& params, int32_t head,
                                          int32_t kv, int32_t first, int32_t length) {
  constexpr int kPieces = kPanels<kD> * kPanel / 8;
  const int32_t page_bits = 31 - __clz(cache.page_size);
  for (int i = threadIdx.x; i < kBlockKeys<kD> * kPieces; i += blockDim.x) {
    const int row = i / kPieces, piece = i % kPieces;
    const int32_t position = first + row;
    const bool some = position < length && piece * 8 < cache.head_dim;
    const char* from = reinterpret_cast<const char*>(params.qkv);  // any address that can be read
    if (some) {
      const int32_t page = position >> page_bits;
      from = frame_address(params.frames, page, params.layer, head, kv, position & (cache.page_size - 1)) + piece * 16;
    }
    copy_async<16>(tile + piece / 8 * (kBlockKeys<kD> * kRowBytes) + panel_offset(row, piece % 8), from, some);
  }
}

// scores = q · K of a block, for the warp's rows.
template <class T, int kD, int kParts, int n>
__device__ __forceinline__ void multiply_keys(float (&scores)[n], const char* q, const char* keys) {
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp * 16 + lane % 16;
#pragma unroll
  for (int i = 0; i < n; ++i) scores[i] = 0.0f;
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) {
    uint32_t a[kParts][4];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const char* panel = q + (part * kPanels<kD> + k / 4) * kRows<kD, kParts> * kRowBytes;
      load_matrices(a[part], shared_address(panel + panel_offset(row, k % 4 * 2 + lane / 16)));
    }
    const char* panel = keys + k / 4 * kBlockKeys<kD> * kRowBytes;
#pragma unroll
    for (int j = 0; j < n / 8; ++j) {
      uint32_t b[4];
      load_matrices(b, shared_address(panel + panel_offset(j * 16 + lane / 16 * 8 + lane % 8, k % 4 * 2 + lane / 8 % 2)));
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        multiply_16x8<T>(scores + 8 * j, a[part], b[0], b[1]);
        multiply_16x8<T>(scores + 8 * j + 4, a[part], b[2], b[3]);
      }
    }
  }
}

// sums += weights · V of a block.
template <class T, int kD, int kParts, int n>
__device__ __forceinline__ void multiply_values(float (&sums)[n], const uint32_t (&weights)[kParts][kBlockKeys<kD> / 16][4],
                                                const char* values) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kBlockKeys<kD> / 16; ++k) {
#pragma unroll
    for (int j = 0; j < n / 8; ++j) {
      uint32_t b[4];
      const char* panel = values + j / 4 * kBlockKeys<kD> * kRowBytes;
      load_transposed(b, shared_address(panel + panel_offset(k * 16 + lane % 16, j % 4 * 2 + lane / 16)));
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        multiply_16x8<T>(sums + 8 * j, weights[part][k], b[0], b[1]);
        multiply_16x8<T>(sums + 8 * j + 4, weights[part][k], b[2], b[3]);
      }
    }
  }
}

// A block a KV head and tile of queries.
template <class T, int kD, int kParts>
__global__ void __launch_bounds__(Layout<kD, kParts>::kThreads, 1)
    mma_kernel(const __grid_constant__ fkv_cache cache, const __grid_constant__ fkv_prefill_params params, int32_t tiles) {
  using Shared = Layout<kD, kParts>;
  constexpr int kKeys = kBlockKeys<kD>, kTileRows = kRows<kD, kParts>;
  extern __shared__ __align__(16) char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const QueryTile tile = query_tile(cache, params, tiles, kTileRows);
  const int row = threadIdx.x / kWarp * 16 + threadIdx.x % kWarp / 4;
  const int32_t least = tile.position(0), length = tile.position(kTileRows - 1) + 1;
  const auto fetch = [&](char* to, int32_t kv, int32_t first) {
    copy_tile<T, kD>(to, cache, params, tile.head, kv, first, length);
  };

  fetch(shared.keys, 0, 0);
  for (int i = threadIdx.x; i < kPanels<kD> * kPanel; i += Shared::kThreads) shared.spoilt[i] = INT32_MAX;
  load_queries<T, kD, kParts, kTileRows>(shared.q, cache, params, tile, 0, kTileRows, threadIdx.x, Shared::kThreads);
  Rows rows{{tile.position(row), tile.position(row + 8)}};
  float sums[kD / 2] = {};
  for (int32_t first = 0; first < length; first += kKeys) {
    await_copies();
    __syncthreads();
    fetch(shared.values, 1, first);
    float scores[kKeys / 2], fade[2];
    multiply_keys<T, kD, kParts>(scores, shared.q, shared.keys);
    const bool masked = first + kKeys > least + 1;
    if (masked) hide(scores, rows, first);
    weigh(scores, rows, fade);
    uint32_t weights[kParts][kKeys / 16][4];
    pack_weights<T, kParts>(weights, scores);
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) sums[i] *= fade[i / 2 % 2];
    await_copies();
    __syncthreads();
    if (first + kKeys < length) fetch(shared.keys, 0, first + kKeys);
    if (masked) {
      clear_spoilt<T, kD>(shared.values, shared.spoilt, first, threadIdx.x, Shared::kThreads);
      __syncthreads();
    }
    multiply_values<T, kD, kParts>(sums, weights, shared.values);
  }
  store_outputs(sums, rows, shared.spoilt, cache, params, tile, row);
}

template <class T, int kD, int kParts>
int32_t issue(const char* call, const fkv_cache& cache, const fkv_prefill_params& params, fkv_stream* stream) {
  using Shared = Layout<kD, kParts>;
  const auto tiles = static_cast<int32_t>(divide_up(int64_t{params.n} * group_of(cache), kRows<kD, kParts>));
  if (const int32_t status = allow_shared(stream, call, mma_kernel<T, kD, kParts>, sizeof(Shared))) return status;
  const unsigned blocks = static_cast<unsigned>(tiles) * static_cast<unsigned>(cache.n_kv_heads);
  mma_kernel<T, kD, kParts><<<blocks, Shared::kThreads, sizeof(Shared), stream->handle>>>(cache, params, tiles);
  return launched(stream, call);
}

}  // namespace

int32_t attend_mma(const char* call, const fkv_cache& cache, const fkv_prefill_params& params, int parts, fkv_stream* stream) {
  return with_shape(cache, [&](auto zero, auto width) {
    using T = decltype(zero);
    return parts == 1 ? issue<T, width(), 1>(call, cache, params, stream) : issue<T, width(), 2>(call, cache, params, stream);
  });
}

}  // namespace fkv
