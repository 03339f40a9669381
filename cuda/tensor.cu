// tensor.cu: phases of many rows on tensor cores: x becomes an operand once a phase, then one product, whose epilogue may
// leave the next phase's operand behind.
//
// floor of an operand: n_rows·k·(4 + 2 a part) B at HBM speed: 4096 rows of 4096, one part, 100 MB → 30 us on an H100.
#include "tensor.cuh"

namespace fkv {
namespace {

constexpr const char* kCall = "fkv_dense_chain";

constexpr int kRowThreads = 256, kAhead = 4;  // of a block that makes a row; 16-byte reads of it in flight a thread

struct Lay {
  const float* x;
  const void* norm;  // or null
  Operand to;
  int64_t x_stride;
  int32_t k;
  float eps;
  bool vectors;  // rows of x and the norm's weights are aligned to four values, and k is a multiple of 4
  bool keeps;    // the row fits the block's shared memory, where a second look finds it
};

constexpr int kRowValues = 4 * kRowThreads;  // of a row that a block takes at a time
constexpr size_t kMostKept = 48 * 1024;

// Values at .. at + 3 of a row of x, zeros past k.
__device__ __forceinline__ float4 load_x4(const float* x, int64_t at, int32_t k, bool vectors) {
  if (vectors) return at < k ? __ldg(reinterpret_cast<const float4*>(x + at)) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = at + i < k ? __ldg(x + at + i) : 0.0f;
  return make_float4(v[0], v[1], v[2], v[3]);
}

// Calls body(at, values at .. at + 3) for all of the row that this thread has, a few reads ahead. `end`: past the
// last value wanted.
template <class Read, class Body>
__device__ __forceinline__ void each(int64_t end, const Read& read, const Body& body) {
  for (int64_t first = 4 * threadIdx.x; first < end; first += kAhead * kRowValues) {
    float4 v[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) v[j] = read(first + j * kRowValues);
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (first + j * kRowValues < end) body(first + j * kRowValues, v[j]);
  }
}

// v·factor·norm of values at .. at + 3.
template <class T>
__device__ __forceinline__ float4 normalised(const Lay& job, float4 v, float factor, int64_t at) {
  if (job.norm == nullptr || at >= job.k) return v;
  const T* norm = static_cast<const T*>(job.norm) + at;
  alignas(8) T n[4] = {};
  if (job.vectors) {
    *reinterpret_cast<uint2*>(n) = *reinterpret_cast<const uint2*>(norm);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (at + i < job.k) n[i] = norm[i];
  }
  return make_float4(v.x * factor * to_f32(n[0]), v.y * factor * to_f32(n[1]), v.z * factor * to_f32(n[2]),
                     v.w * factor * to_f32(n[3]));
}

// A power of two that brings the largest value near F16's own largest; 1 where there is nothing to bring anywhere.
__device__ __forceinline__ float scale_of(float largest) {
  if (!(largest > 0.0f) || !isfinite(largest)) return 1.0f;
  return scalbnf(1.0f, max(ilogbf(largest), -100) - 14);
}

// One block a row.
template <class T, int kParts>
__global__ void __launch_bounds__(kRowThreads) make_operand(const __grid_constant__ Lay job) {
  extern __shared__ float4 kept[];
  __shared__ float shared[kWarp];
  const int64_t row = blockIdx.x;
  const float* x = job.x + row * job.x_stride;
  const auto from_memory = [&](int64_t at) { return load_x4(x, at, job.k, job.vectors); };
  const auto again = [&](int64_t at) {
    if (!job.keeps) return from_memory(at);
    return at < job.k ? kept[at / 4] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  };
  float factor = 1.0f, inverse = 1.0f;
  if (job.norm != nullptr) {
    float squares = 0.0f;
    each(job.k, from_memory, [&](int64_t at, float4 v) {
      squares = fmaf(v.x, v.x, squares);
      squares = fmaf(v.y, v.y, squares);
      squares = fmaf(v.z, v.z, squares);
      squares = fmaf(v.w, v.w, squares);
      if (job.keeps) kept[at / 4] = v;  // this thread reads it again
    });
    factor = 1.0f / sqrtf(block_sum(squares, shared) / static_cast<float>(job.k) + job.eps);
  }
  if (job.to.scales != nullptr) {
    float largest = 0.0f;
    each(job.k, from_memory, [&](int64_t at, float4 read) {
      const float4 v = normalised<T>(job, read, factor, at);
      largest = fmaxf(largest, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
      if (job.keeps) kept[at / 4] = read;
    });
    const float scale = scale_of(block_max(largest, shared));
    inverse = 1.0f / scale;
    if (threadIdx.x == 0) job.to.scales[row] = scale;
  }
  const auto store = [&](int64_t at, float4 read) {
    const float4 v = normalised<T>(job, read, factor, at);
    store_parts<T, kParts>(job.to, row * job.to.width + at, {v.x * inverse, v.y * inverse, v.z * inverse, v.w * inverse});
  };
  if (job.norm != nullptr || job.to.scales != nullptr)
    each(job.to.width, again, store);
  else
    each(job.to.width, from_memory, store);
}

// ---------------------------------------------------------------------------------------------------------------------

bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

int32_t launch_operand(const Operand& to, const fkv_phase& phase, int32_t n_rows, fkv_stream* stream) {
  Lay job;
  job.x = phase.x;
  job.norm = phase.norm;
  job.to = to;
  job.x_stride = phase.x_stride;
  job.k = phase.k;
  job.eps = phase.eps;
  const size_t row_bytes = size_t{4} * static_cast<size_t>(operand_width(phase.k));
  job.keeps = row_bytes <= kMostKept && (phase.norm != nullptr || to.scales != nullptr);
  job.vectors = aligned(phase.x, 16) && phase.x_stride % 4 == 0 && phase.k % 4 == 0 && aligned(phase.norm, 8);
  const bool two = to.low != nullptr;
  const auto kernel = phase.dtype == FKV_BF16 ? (two ? make_operand<__nv_bfloat16, 2> : make_operand<__nv_bfloat16, 1>)
                                              : (two ? make_operand<__half, 2> : make_operand<__half, 1>);
  kernel<<<static_cast<unsigned>(n_rows), kRowThreads, job.keeps ? row_bytes : 0, stream->handle>>>(job);
  return launched(stream, kCall);
}

// Two operands of n_rows rows that take turns, and scales.
struct Scratch {
  char* memory;
  uint64_t part, scales;  // bytes

  Scratch(void* scratch, int64_t n_rows, int64_t max_k)
      : memory(static_cast<char*>(scratch)),
        part(static_cast<uint64_t>(divide_up(n_rows * operand_width(max_k) * 2, 256) * 256)),
        scales(static_cast<uint64_t>(divide_up(n_rows * 4, 256) * 256)) {}
  uint64_t bytes() const { return 4 * part + scales; }
  Operand operand(int turn, const fkv_phase& phase, int32_t family) const {
    return {memory + turn * part, family == FKV_PREFILL ? memory + (2 + turn) * part : nullptr,
            phase.dtype == FKV_F16 ? reinterpret_cast<float*>(memory + 4 * part) : nullptr, operand_width(phase.k)};
  }
};

// Whether a product may leave the next phase's operand instead of y. F16's rows have scales, known only with the whole row.
bool hands_on(const fkv_phase& phase, const fkv_phase& next) {
  return phase.epilogue == FKV_SWIGLU && phase.dtype == FKV_BF16 && next.dtype == FKV_BF16 && next.norm == nullptr &&
         next.x == phase.y && next.x_stride == phase.y_stride && next.k == phase.n_out / 2 && next.k % kOperandStep == 0;
}

}  // namespace

uint64_t tensor_scratch_bytes(int64_t n_rows, int32_t max_k) { return Scratch(nullptr, n_rows, max_k).bytes(); }

bool takes_tensor(const fkv_phase* phases, int32_t n_phases) {
  return std::all_of(phases, phases + n_phases, [](const fkv_phase& phase) { return phase.dtype != FKV_F32; });
}

int32_t run_tensor(const fkv_phase* phases, int32_t n_phases, int32_t n_rows, int32_t family, void* scratch, fkv_stream* stream) {
  int32_t max_k = 0;
  for (int32_t i = 0; i < n_phases; ++i) max_k = std::max(max_k, phases[i].k);
  const Scratch memory(scratch, n_rows, max_k);
  bool there = false;  // the phase's operand, left by the one before
  for (int32_t i = 0; i < n_phases; ++i) {
    const fkv_phase& phase = phases[i];
    Product job = {};
    job.x = memory.operand(i % 2, phase, family);
    if (!there)
      if (const int32_t status = launch_operand(job.x, phase, n_rows, stream)) return status;
    there = i + 1 < n_phases && hands_on(phase, phases[i + 1]);
    if (there) job.next = memory.operand((i + 1) % 2, phases[i + 1], family);
    job.weight = phase.weight;
    job.to = {phase.bias, phase.y, phase.y_stride, n_rows, phase.n_out, phase.epilogue};
    job.k = phase.k;
    job.dtype = phase.dtype;
    job.wide = aligned(phase.y, 16) && phase.y_stride % 4 == 0;
    if (const int32_t status = takes_hopper(job, stream) ? launch_hopper(job, stream) : launch_mma(job, stream)) return status;
  }
  return FKV_OK;
}

}  // namespace fkv
