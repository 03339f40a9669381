// prefill_warpgroups.cu: prefill attention on Hopper. A block has a tile of 128 query rows: a warp that keeps the copy engine
// busy, three that look after V at the end of the causal triangle, and two warpgroups of 64 rows, each of which has the tensor
// cores while the other turns its scores into weights.
//
// floor: 4·d operations for each query head and key at or before it, at the bf16 rate (a chunk of 2048 tokens at 32K, d 128, 32
// heads: 1.07 T → 1.1 ms a layer at the 989 T/s of an H100's data sheet); twice that with two parts. Measured on an H100, the
// 2048 tokens from 28672 on: 1.50 ms = 664 T/s with one part, 2.53 ms with two.
#include "hopper.cuh"
#include "prefill.cuh"
#include "prefill_tile.cuh"

namespace fkv {
namespace {

constexpr int kGroupRows = 64, kGroups = 2, kRows = kGroups * kGroupRows;
constexpr int kThreads = (1 + kGroups) * kWarpgroup;

template <int kD, int kParts>
struct Layout {
  static constexpr int kStages = kD > 128 && kParts == 2 ? 1 : 2;  // tiles of K, and of V, in shared memory
  static constexpr int kPartBytes = kPanels<kD> * kRows * kRowBytes;
  alignas(kSwizzleBytes) char q[kParts * kPartBytes];
  alignas(kSwizzleBytes) char keys[kStages][kTileBytes<kD>];
  alignas(kSwizzleBytes) char values[kStages][kTileBytes<kD>];
  int32_t spoilt[kPanels<kD> * kPanel];
  // K or V can be used; V has landed and is to be looked through first; both warpgroups are done with K or V.
  uint64_t keys_full[kStages], values_full[kStages], values_landed[kStages], keys_empty[kStages], values_empty[kStages];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int kCleaners = kWarpgroup - kWarp;
constexpr int kCopyRegisters = 40, kRegisters = 232;  // of a thread: 128 and 256 of them share 64512

// Numbered barriers of the block: a warpgroup's turn at the tensor cores; its q is written; V is looked through.
constexpr int kTurn = 1, kWritten = kTurn + kGroups, kCleaned = kWritten + kGroups;

// Which stage a block of keys is in, and how often that was used before.
template <int kStages>
struct Place {
  int stage;
  uint32_t parity;
  __device__ explicit Place(int block) : stage(block % kStages), parity(block / kStages % 2) {}
};

// Blocks of keys of a tile; those from `whole` on have keys that some row does not see.
struct Extent {
  int blocks, whole;
};

template <int kD, class Shared>
__device__ __forceinline__ void copy_tiles(Shared& shared, const CUtensorMap* map, int32_t head, int32_t page_size,
                                           Extent extent) {
  constexpr int kStages = Shared::kStages;
  const auto fill = [&](char* tile, uint64_t* full, int32_t kv, int block) {
    barrier_expect(full, kTileBytes<kD>);
#pragma unroll
    for (int panel = 0; panel < kPanels<kD>; ++panel) {
      copy_box(tile + panel * kBlockKeys<kD> * kRowBytes, map, full,
               {panel * kPanel, 0, block * (kBlockKeys<kD> / page_size), head, kv});
    }
  };
  for (int block = 0; block < extent.blocks; ++block) {
    const Place<kStages> at(block);
    barrier_wait(&shared.keys_empty[at.stage], at.parity ^ 1);
    fill(shared.keys[at.stage], &shared.keys_full[at.stage], 0, block);
    barrier_wait(&shared.values_empty[at.stage], at.parity ^ 1);
    uint64_t* landed = block < extent.whole ? &shared.values_full[at.stage] : &shared.values_landed[at.stage];
    fill(shared.values[at.stage], landed, 1, block);
  }
}

template <class T, int kD, class Shared>
__device__ __forceinline__ void clean_tiles(Shared& shared, Extent extent) {
  constexpr int kStages = Shared::kStages;
  for (int block = extent.whole; block < extent.blocks; ++block) {
    const int stage = block % kStages;
    barrier_wait(&shared.values_landed[stage], (block - extent.whole) / kStages % 2);
    clear_spoilt<T, kD>(shared.values[stage], shared.spoilt, block * kBlockKeys<kD>, threadIdx.x - kWarp, kCleaners);
    fence_async();
    named_sync(kCleaned, kCleaners);
    if (threadIdx.x == kWarp) barrier_arrive(&shared.values_full[stage]);
  }
}

// scores = q · K of a block, for the warpgroup's rows.
template <class T, int kD, int kParts, int n>
__device__ __forceinline__ void multiply_keys(float (&scores)[n], const char* q, const char* keys) {
  products_begin();
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) {
    const int panel = k / 4, at = k % 4 * 32;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      Wgmma<T, n>::run(scores, panel_at(q + (part * kPanels<kD> + panel) * kRows * kRowBytes + at, kOnePanel),
                         panel_at(keys + panel * kBlockKeys<kD> * kRowBytes + at, kOnePanel), k + part > 0);
    }
  }
  products_end();
}

// sums += weights · V of a block.
template <class T, int kD, int kParts, int n>
__device__ __forceinline__ void multiply_values(float (&sums)[n], const uint32_t (&weights)[kParts][kBlockKeys<kD> / 16][4],
                                                const char* values) {
  products_begin();
#pragma unroll
  for (int k = 0; k < kBlockKeys<kD> / 16; ++k) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      Wgmma<T, n>::run(sums, weights[part][k], panel_at(values + k * 16 * kRowBytes, kBlockKeys<kD> * kRowBytes), 1);
    }
  }
  products_end();
}

// A warpgroup's rows from q to outputs. While the products of one block's weights and the next block's scores run, the other
// warpgroup has its softmax, and the other way round.
template <class T, int kD, int kParts, class Shared>
__device__ __forceinline__ void attend_rows(Shared& shared, const fkv_cache& cache, const fkv_prefill_params& params,
                                            const QueryTile& tile, Extent extent) {
  constexpr int kStages = Shared::kStages, kKeys = kBlockKeys<kD>;
  const int group = threadIdx.x / kWarpgroup - 1, thread = threadIdx.x % kWarpgroup;
  const int row = group * kGroupRows + thread / kWarp * 16 + thread % kWarp / 4;
  const char* q = shared.q + group * kGroupRows * kRowBytes;
  load_queries<T, kD, kParts, kRows>(shared.q, cache, params, tile, group * kGroupRows, kGroupRows, thread, kWarpgroup);
  fence_async();
  named_sync(kWritten + group, kWarpgroup);
  if (group == 1) named_arrive(kTurn, kGroups * kWarpgroup);  // the first turn is the first warpgroup's

  const auto release = [&](uint64_t* empty) {
    if (threadIdx.x % kWarp == 0) barrier_arrive(empty);
  };
  const auto await_values = [&](int block) {
    const Place<kStages> at(block);
    barrier_wait(&shared.values_full[at.stage], at.parity);
    return at.stage;
  };

  Rows rows{{tile.position(row), tile.position(row + 8)}};
  float scores[kKeys / 2], sums[kD / 2] = {}, fade[2];
  uint32_t weights[kParts][kKeys / 16][4];
  barrier_wait(&shared.keys_full[0], 0);
  multiply_keys<T, kD, kParts>(scores, q, shared.keys[0]);
  products_wait<0>();
  pin(scores);
  release(&shared.keys_empty[0]);
  if (extent.whole == 0) hide(scores, rows, 0);
  weigh(scores, rows, fade);
  pack_weights<T, kParts>(weights, scores);
  for (int block = 1; block < extent.blocks; ++block) {
    const Place<kStages> at(block);
    barrier_wait(&shared.keys_full[at.stage], at.parity);
    named_sync(kTurn + group, kGroups * kWarpgroup);
    multiply_keys<T, kD, kParts>(scores, q, shared.keys[at.stage]);
    const int before = await_values(block - 1);
    multiply_values<T, kD, kParts>(sums, weights, shared.values[before]);
    named_arrive(kTurn + (group ^ 1), kGroups * kWarpgroup);
    products_wait<1>();
    pin(scores);
    release(&shared.keys_empty[at.stage]);
    if (block >= extent.whole) hide(scores, rows, block * kKeys);
    weigh(scores, rows, fade);
    products_wait<0>();
    pin(sums);
    release(&shared.values_empty[before]);
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) sums[i] *= fade[i / 2 % 2];
    pack_weights<T, kParts>(weights, scores);
  }
  multiply_values<T, kD, kParts>(sums, weights, shared.values[await_values(extent.blocks - 1)]);
  products_wait<0>();
  pin(sums);
  store_outputs(sums, rows, shared.spoilt, cache, params, tile, row);
}
#endif

// A block a KV head and tile of queries.
template <class T, int kD, int kParts>
__global__ void __launch_bounds__(kThreads, 1)
    warpgroups_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ fkv_cache cache,
                      const __grid_constant__ fkv_prefill_params params, int32_t tiles) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shared = Layout<kD, kParts>;
  extern __shared__ char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory + (kSwizzleBytes - shared_address(memory) % kSwizzleBytes) % kSwizzleBytes);
  const QueryTile tile = query_tile(cache, params, tiles, kRows);
  const Extent extent{tile.position(kRows - 1) / kBlockKeys<kD> + 1, (tile.position(0) + 1) / kBlockKeys<kD>};
  for (int i = threadIdx.x; i < kPanels<kD> * kPanel; i += kThreads) shared.spoilt[i] = INT32_MAX;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::kStages; ++i) {
      barrier_init(&shared.keys_full[i], 1);
      barrier_init(&shared.values_full[i], 1);
      barrier_init(&shared.values_landed[i], 1);
      barrier_init(&shared.keys_empty[i], kGroups * kWarpgroup / kWarp);
      barrier_init(&shared.values_empty[i], kGroups * kWarpgroup / kWarp);
    }
    fence_barriers();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    give_registers<kCopyRegisters>();
    if (threadIdx.x == 0) copy_tiles<kD>(shared, &map, tile.head, cache.page_size, extent);
    if (threadIdx.x >= kWarp) clean_tiles<T, kD>(shared, extent);
  } else {
    take_registers<kRegisters>();
    attend_rows<T, kD, kParts>(shared, cache, params, tile, extent);
  }
#else
  __trap();  // never launched there
#endif
}

// A layer's pages as [kv][head][page][row][channel], in boxes of a block's keys and 64 channels.
int32_t map_pages(CUtensorMap* map, const char* call, const fkv_cache& cache, const fkv_prefill_params& params, int keys,
                  fkv_stream* stream) {
  EncodeTiled encode = nullptr;
  if (const int32_t status = find_encode(&encode, call, stream)) return status;
  const fkv_frames& frames = params.frames;
  const auto p = static_cast<uint32_t>(cache.page_size);
  const cuuint64_t sizes[] = {static_cast<uint32_t>(cache.head_dim), p,
                              static_cast<uint64_t>(divide_up(int64_t{params.start} + params.n, p)),
                              static_cast<uint32_t>(cache.n_kv_heads), 2};
  const cuuint64_t strides[] = {static_cast<uint64_t>(frames.row), static_cast<uint64_t>(frames.frame),
                                static_cast<uint64_t>(frames.head), static_cast<uint64_t>(frames.kv)};
  const cuuint32_t box[] = {kPanel, p, static_cast<uint32_t>(keys) / p, 1, 1};
  return encode_map(map, encode, call, cache.dtype, frame_address(frames, 0, params.layer, 0, 0, 0), sizes, strides, box);
}

template <class T, int kD, int kParts>
int32_t issue(const char* call, const fkv_cache& cache, const fkv_prefill_params& params, fkv_stream* stream) {
  CUtensorMap map;
  if (const int32_t status = map_pages(&map, call, cache, params, kBlockKeys<kD>, stream)) return status;
  const auto tiles = static_cast<int32_t>(divide_up(int64_t{params.n} * group_of(cache), kRows));
  constexpr size_t kShared = sizeof(Layout<kD, kParts>) + kSwizzleBytes;
  if (const int32_t status = allow_shared(stream, call, warpgroups_kernel<T, kD, kParts>, kShared)) return status;
  const unsigned blocks = static_cast<unsigned>(tiles) * static_cast<unsigned>(cache.n_kv_heads);
  warpgroups_kernel<T, kD, kParts><<<blocks, kThreads, kShared, stream->handle>>>(map, cache, params, tiles);
  return launched(stream, call);
}

}  // namespace

bool has_warpgroups(const fkv_stream* stream, const fkv_prefill_params& params) {
  const cudaDeviceProp& has = stream->device->properties;
  return !stream->device->plain && has.major == 9 && has.minor == 0 && params.frames.chunks == nullptr;
}

int32_t attend_warpgroups(const char* call, const fkv_cache& cache, const fkv_prefill_params& params, int parts,
                          fkv_stream* stream) {
  return with_shape(cache, [&](auto zero, auto width) {
    using T = decltype(zero);
    return parts == 1 ? issue<T, width(), 1>(call, cache, params, stream) : issue<T, width(), 2>(call, cache, params, stream);
  });
}

}  // namespace fkv
