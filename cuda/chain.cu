// chain.cu: the dense chain: phases of few rows with aligned half-precision weights, k a multiple of 64, as ONE launch of one
// block per multiprocessor. Everything else runs as plain launches (gemm.cu), with the same bits.
//
// The launch: warp 8 fills a ring of stages (16 rows of W by 512 of k) and runs ahead across the ends of phases, because W
// never changes. Warps 0 to 7 are the eight parts of every sum: each multiplies its own chunks of k and keeps its own
// chunks of x in shared memory, so that they meet only to add parts up. Where x of all rows does not fit, the phase is split
// into slices of k: see Phase. A phase ends with a counter that every block adds to and one thread of each block polls. A
// normal launch will do: there are no more blocks than fit at once, chains of a device run on one stream, and what runs
// beside them never waits for them.
//
// floor: the bytes of W at HBM read speed → a layer of Llama-3.1-8B (436 MB bf16) 97 us on an H200 that reads 4.51 TB/s. Eight
// layers and the logits, measured there (2026-11-29): 1 row 1.16 × the floor, 2 rows 1.20, 4 rows 1.27, 8 rows 1.43, 16 rows
// 2.07. What is lost: 3 us to begin a launch, 4 us at the end of each phase (1 row; what the ring holds covers 3.4), the tiles
// that do not divide evenly among the blocks, and with more rows the time to fetch x, which each multiprocessor needs whole.
#include <algorithm>
#include <vector>

#include "chain_meet.cuh"
#include "chain_x.cuh"
#include "early.cuh"

namespace fkv {
namespace {

constexpr const char* kCall = "fkv_dense_chain";
constexpr int kChainThreads = kPartsThreads + kWarp;
constexpr int kSharedBytes = 192 * 1024;
// A side kernel fits beside the chain on one multiprocessor. Of its 228 KiB, 1 KiB a block is the system's own; warps are dealt to
// its quarters, each of which has 16384 registers; the kernel's bounds (as if two of it were to fit) leave a thread at most 96.
constexpr int kChainRegisters = 96, kQuarters = 4, kQuarterRegisters = 16384;
constexpr int most_warps(int threads) { return static_cast<int>(divide_up(threads / kWarp, kQuarters)); }  // of a quarter
static_assert(kQuarterRegisters / (most_warps(2 * kChainThreads) * kWarp) / 8 * 8 <= kChainRegisters);
static_assert((most_warps(kChainThreads) * kChainRegisters + most_warps(kSideThreads) * kSideRegisters) * kWarp <=
              kQuarterRegisters);
static_assert(kSharedBytes + kSideShared + 2 * 1024 <= 228 * 1024);
// More of x than this is not kept: the ring is worth more (with 120 KiB, 2 rows of k 14336 take 37.8 us for 35.2 on an H200).
constexpr int64_t kWholeBytes = 72 * 1024;
constexpr int64_t kPartialBytes = 8 << 20;  // of a split phase; more rows of W become phases of their own

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// This warp's part of one slice of 16 rows of W, as its stages come. x: where the slice's first chunk lies.
template <class T, int N>
__device__ __forceinline__ void multiply_slice(Part<T, N>& part, const Ring& ring, RingPlace& place, const char* x, int32_t pitch,
                                               int32_t n_rows, int32_t length) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const char* const stages = ring.stages + stage_place();
#pragma unroll 1
  for (int32_t at = 0; at < length; at += kStageK) {
    Column<T> v[kStageChunks][N] = {};
    Piece<T> upper[kStageChunks], lower[kStageChunks];
#pragma unroll
    for (int c = 0; c < kStageChunks; ++c) {
      const int32_t chunk = at + (warp + c * kParts) * kChunk;
#pragma unroll
      for (int n = 0; n < N; ++n)
        if (const int row = n * kTileRows<T> + column_row<T>(); row < n_rows && chunk < length)
          v[c][n].load(x + row * pitch + chunk / kChunk * kChunkBytes);
    }
    barrier_wait(ring.full + place.stage, place.parity);
    const char* from = stages + place.stage * kStageBytes;
#pragma unroll
    for (int c = 0; c < kStageChunks; ++c, from += kParts * kChunk / kPanelK * kPanelBytes) {
      upper[c].bits = *reinterpret_cast<const uint4*>(from);
      lower[c].bits = *reinterpret_cast<const uint4*>(from + kPanelBytes / 2);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(ring.empty + place.stage);
    place.advance(ring);
#pragma unroll
    for (int c = 0; c < kStageChunks; ++c) part.add(upper[c], lower[c], v[c]);
  }
}

// The block's units of one phase.
template <class T, int N>
__device__ __forceinline__ void multiply_phase(const Chain& chain, const Phase& phase, const Run& run, const Ring& ring,
                                               RingPlace& place, int& buffer, char* memory) {
  const int warp = threadIdx.x / kWarp;
  const int32_t n_rows = chain.n_rows, part_floats = n_rows * kPartPitch;
  const int32_t row = threadIdx.x / kTileOuts, place_out = threadIdx.x % kTileOuts;
  const bool adds = warp * kWarp < n_rows * kTileOuts;  // some lane of this warp has an output
  float* const first_squares = reinterpret_cast<float*>(memory + chain.shared.squares_at);
  float* squares = first_squares;
  float* parts = reinterpret_cast<float*>(memory + chain.shared.parts_at);
  const int32_t pitch = x_pitch(phase.split ? kSlice : phase.k);
  T* norm = reinterpret_cast<T*>(memory + chain.shared.norm_at);
  int32_t loaded = -1;  // start of what of x is here
  float factor = 1.0f;
#pragma unroll 1
  for (int32_t u = run.begin; u < run.end; u += run.step) {
    const Unit unit = phase.unit(u);
    const bool fresh = unit.first != loaded;
    if (fresh) {
      // The other of two places: a slower warp may still read what the unit before left.
      if (phase.split) squares = first_squares + unit.first / kSlice % 2 * kParts * n_rows;
      load_x<T>(memory, pitch, norm, squares, phase, n_rows, unit.first, unit.end);
      loaded = unit.first;
    }
    const Ending<T> ending(phase.to, phase.split ? n_rows : row, unit.tile * kTileOuts + place_out);
    float total = 0.0f;
#pragma unroll 1
    for (int32_t slice = unit.first; slice < unit.end; slice += kSlice) {
      Part<T, N> part;
      multiply_slice<T, N>(part, ring, place, memory + (slice - unit.first) / kChunk * kChunkBytes, pitch, n_rows,
                           min(kSlice, unit.end - slice));
      float* mine = parts + buffer * (kParts * part_floats);
      part.write(mine + warp * part_floats, n_rows, stage_row());
      sync_parts();
      if (adds) {
        const float sum = sum_parts(mine + min(row, n_rows - 1) * kPartPitch + place_out, part_floats);  // past the last row: dropped
        if (!phase.split) {
          total += sum;
        } else if (row < n_rows) {
          const int64_t tile = static_cast<int64_t>(slice / kSlice) * phase.tiles() + unit.tile;
          __stcg(chain.partials + tile * (n_rows * kTileOuts) + threadIdx.x, sum);
        }
      }
      buffer ^= 1;
    }
    if (phase.norm != nullptr && fresh && adds && row < n_rows) {
      float all = 0.0f;
      for (int32_t s = 0; s < slices_of(unit.end - unit.first); ++s)
        all += sum_parts(squares + s * kParts * n_rows + row, n_rows);
      if (!phase.split)
        factor = norm_factor(all, phase.k, phase.eps);
      else if (place_out == 0)
        __stcg(chain.squares + unit.first / kSlice * n_rows + row, all);  // of whichever block: the same
    }
    if (!phase.split && adds) ending.end(phase.to, total, factor);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kChainThreads, 2) dense_chain(const __grid_constant__ Chain chain) {
  extern __shared__ __align__(kSwizzleBytes) char memory[];
  Ring ring;
  ring.full = reinterpret_cast<uint64_t*>(memory + chain.shared.barriers_at);
  ring.empty = ring.full + kMaxStages;
  ring.stages = memory + chain.shared.ring_at;
  ring.n_stages = chain.shared.n_stages;
  if (threadIdx.x == kPartsThreads) ring.begin();
  __syncthreads();
  if (threadIdx.x >= kPartsThreads) {
    if (chain.multiplies) fill_ring(ring, chain);
    return;
  }
  RingPlace place;
  int32_t dealt = 0;
  int buffer = 0, meetings = 0;
#pragma unroll 1
  for (int32_t p = 0; p < chain.n_phases; ++p) {
    const Phase& phase = chain.phases[p];
    prefetch_norm<T>(phase);
    if (p == 0) await_ahead();
    else meet(chain.done + meetings++);
    if (p == chain.n_phases - 1) let_next_begin();
    if (chain.multiplies) {
      const Run run = deal(phase.units(), !phase.split, dealt);
      multiply_phase<T, N>(chain, phase, run, ring, place, buffer, memory);
    }
    if (!phase.split) continue;
    if (chain.multiplies && chain.finishes) meet(chain.done + meetings++);
    if (chain.finishes) finish_phase<T>(chain, phase, memory);
  }
  if (meetings > 0 && threadIdx.x == 0) leave(chain.done, meetings);
}

#else

template <class T, int N>
__global__ void dense_chain(const __grid_constant__ Chain) {
  __trap();  // never launched there: see chains()
}

#endif

// ---------------------------------------------------------------------------------------------------------------------

constexpr int64_t align(int64_t bytes, int64_t to = 128) { return divide_up(bytes, to) * to; }

// Divides shared memory: the ring gets what is left.
constexpr SharedLayout lay_out_shared(int64_t x, int64_t norm, int64_t squares, int64_t n_rows) {
  const int64_t norm_at = align(x), squares_at = norm_at + align(norm), parts_at = squares_at + align(squares),
                barriers_at = parts_at + align(4 * kPartPitch * 2 * kParts * n_rows),
                ring_at = align(barriers_at + 2 * kMaxStages * static_cast<int64_t>(sizeof(uint64_t)), kSwizzleBytes),
                n_stages = std::min<int64_t>(kMaxStages, (kSharedBytes - ring_at) / kStageBytes);
  return {static_cast<int32_t>(norm_at),     static_cast<int32_t>(squares_at), static_cast<int32_t>(parts_at),
          static_cast<int32_t>(barriers_at), static_cast<int32_t>(ring_at),    static_cast<int32_t>(n_stages)};
}
constexpr int64_t squares_bytes(int64_t n_rows, int64_t slices) { return 4 * n_rows * kParts * slices; }
// The most that a phase keeps: a slice of every row.
static_assert(lay_out_shared(int64_t{kMaxChainRows} * x_pitch(kSlice), 2 * kSlice, squares_bytes(kMaxChainRows, 2), kMaxChainRows).n_stages >= 2);

SharedLayout lay_out_shared(const Chain& chain) {
  int64_t x = 0, norm = 0, squares = 0;
  for (int32_t p = 0; p < chain.n_phases; ++p) {
    const Phase& phase = chain.phases[p];
    const int64_t width = phase.split ? kSlice : phase.k;
    x = std::max(x, int64_t{chain.n_rows} * x_pitch(static_cast<int32_t>(width)));
    if (phase.norm != nullptr) norm = std::max(norm, 2 * width);
    squares = std::max(squares, squares_bytes(chain.n_rows, phase.split ? 2 : slices_of(phase.k)));
  }
  return lay_out_shared(x, norm, squares, chain.n_rows);
}

template <class T, int N>
int32_t launch(const Chain& chain, fkv_stream* stream) {
  int64_t most = 1;
  for (int32_t p = 0; p < chain.n_phases; ++p) {
    const Phase& phase = chain.phases[p];
    most = std::max(most, int64_t{tiles_of(phase.to.n_out)} * (phase.split ? slices_of(phase.k) : 1));
  }
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(most, stream->device->properties.multiProcessorCount));
  return launch_early(stream, kCall, Kind::chain, bit(Kind::attend) | bit(Kind::retrieve) | bit(Kind::chain), dense_chain<T, N>,
                      {dim3(blocks), kChainThreads, kSharedBytes}, chain);
}

int32_t launch(Chain& chain, int32_t dtype, fkv_stream* stream) {
  chain.shared = lay_out_shared(chain);
  // Tiles of x side by side.
  const auto by_tiles = [&](auto zero) {
    using T = decltype(zero);
    const int64_t tiles = divide_up(chain.n_rows, kTileRows<T>);
    if (tiles <= 1) return launch<T, 1>(chain, stream);
    if constexpr (kMaxChainRows > 2 * kTileRows<T>)
      if (tiles > 2) return launch<T, 4>(chain, stream);
    return launch<T, 2>(chain, stream);
  };
  return dtype == FKV_BF16 ? by_tiles(__nv_bfloat16{}) : by_tiles(__half{});
}

// Whether memory of rows [n_rows][width], `stride` floats apart, and of others overlaps.
bool overlap(const float* a, int64_t a_stride, int64_t a_width, const float* b, int64_t b_stride, int64_t b_width,
             int32_t n_rows) {
  const uintptr_t x = reinterpret_cast<uintptr_t>(a), y = reinterpret_cast<uintptr_t>(b);
  const uintptr_t x_end = x + 4 * static_cast<uintptr_t>((n_rows - 1) * a_stride + a_width);
  const uintptr_t y_end = y + 4 * static_cast<uintptr_t>((n_rows - 1) * b_stride + b_width);
  return x < y_end && y < x_end;
}

// W as panels [k / 64][n_out][64], of which a stage is [8][16][64]: eight rows of a panel lie in each 1 KiB, swizzled. The stride from
// panel to panel is less than that from row to row, which drivers take.
int32_t map_weight(CUtensorMap* map, EncodeTiled encode, const Phase& phase, int32_t dtype) {
  const auto k = static_cast<cuuint64_t>(phase.k);
  return encode_map(map, encode, kCall, dtype, phase.weight, {kPanelK, static_cast<cuuint64_t>(phase.to.n_out), k / kPanelK},
                    {k * 2, kPanelK * 2}, {kPanelK, kTileOuts, kStageK / kPanelK});
}

// Splits a phase's partial sums to what scratch holds.
int64_t most_tiles(int32_t k, int32_t n_rows) {
  return std::max<int64_t>(1, kPartialBytes / (4LL * slices_of(k) * n_rows * kTileOuts));
}

}  // namespace

uint64_t decode_scratch_bytes(int32_t n_rows, int32_t max_k, int32_t max_out) {
  const int32_t rows = std::min(n_rows, kMaxChainRows);
  const int64_t slices = slices_of(max_k);
  const int64_t chain = align(4 * slices * rows) + std::min(kPartialBytes, 4 * slices * tiles_of(max_out) * rows * kTileOuts);
  return std::max<uint64_t>(chain, laid_out_bytes(n_rows, max_k));
}

bool chains(const fkv_phase* phases, int32_t n_phases, int32_t n_rows, const fkv_stream* stream) {
  const cudaDeviceProp& device = stream->device->properties;
  if (stream->device->plain || device.major < 9 || device.sharedMemPerBlockOptin < kSharedBytes) return false;
  if (n_rows > kMaxChainRows) return false;
  for (int32_t i = 0; i < n_phases; ++i) {
    const fkv_phase& phase = phases[i];
    if (phase.dtype == FKV_F32 || phase.dtype != phases[0].dtype || phase.k % kPanelK != 0) return false;
    if (reinterpret_cast<uintptr_t>(phase.weight) % 16 != 0) return false;
    if (reinterpret_cast<uintptr_t>(phase.norm) % 8 != 0) return false;
    if (reinterpret_cast<uintptr_t>(phase.x) % 16 != 0 || phase.x_stride % 4 != 0) return false;
    // Some blocks would still read what others write.
    const int64_t width = phase.epilogue == FKV_SWIGLU ? phase.n_out / 2 : phase.n_out;
    if (overlap(phase.x, phase.x_stride, phase.k, phase.y, phase.y_stride, width, n_rows)) return false;
  }
  return true;
}

int32_t run_chain(const fkv_phase* phases, int32_t n_phases, int32_t n_rows, void* scratch, fkv_stream* stream) {
  EncodeTiled encode = nullptr;
  if (const int32_t status = find_encode(&encode, kCall, stream)) return status;
  std::vector<Phase> list;
  int64_t slices = 1;
  for (int32_t i = 0; i < n_phases; ++i) {
    const fkv_phase& from = phases[i];
    const bool split = int64_t{n_rows} * x_pitch(from.k) > kWholeBytes && slices_of(from.k) > 1;
    const auto step = static_cast<int32_t>(
        split ? std::min<int64_t>(from.n_out, most_tiles(from.k, n_rows) * kTileOuts) : from.n_out);
    const int64_t size = 2;
    for (int32_t out = 0; out < from.n_out; out += step) {
      Phase phase = {};
      phase.weight = static_cast<const char*>(from.weight) + size * from.k * out;
      phase.norm = from.norm;
      phase.x = from.x;
      phase.x_stride = from.x_stride;
      phase.to = {from.bias == nullptr ? nullptr : static_cast<const char*>(from.bias) + size * out,
                  from.y + (from.epilogue == FKV_SWIGLU ? out / 2 : out),
                  from.y_stride,
                  n_rows,
                  std::min(step, from.n_out - out),
                  from.epilogue};
      phase.k = from.k;
      phase.eps = from.eps;
      phase.split = split;
      list.push_back(phase);
    }
    slices = std::max<int64_t>(slices, slices_of(from.k));
  }
  Chain chain = {};
  chain.done = static_cast<unsigned*>(scratch);
  chain.squares = reinterpret_cast<float*>(static_cast<char*>(scratch) + kHeadBytes);
  chain.partials = chain.squares + align(4 * slices * n_rows) / 4;
  chain.n_rows = n_rows;
  // A phase that comes alone is never waited in: its caller may share the device with launches that we do not know.
  const bool apart = n_phases == 1 && list[0].split;
  const size_t most = apart ? 1 : kMaxPhases;
  for (size_t first = 0; first < list.size(); first += most) {
    chain.n_phases = static_cast<int32_t>(std::min(list.size() - first, most));
    std::copy_n(list.begin() + static_cast<int64_t>(first), chain.n_phases, chain.phases);
    for (int32_t i = 0; i < chain.n_phases; ++i)
      if (const int32_t status = map_weight(&chain.maps[i], encode, chain.phases[i], phases[0].dtype)) return status;
    chain.multiplies = true;
    chain.finishes = !apart;
    if (const int32_t status = launch(chain, phases[0].dtype, stream)) return status;
    if (!apart) continue;
    chain.multiplies = false;
    chain.finishes = true;
    if (const int32_t status = launch(chain, phases[0].dtype, stream)) return status;
  }
  return FKV_OK;
}

}  // namespace fkv
