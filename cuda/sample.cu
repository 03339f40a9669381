// sample.cu: the next token of each row, and what a step tells the host about it. Two launches and a count: slices of
// the vocabulary are surveyed side by side, then one block a row chooses.
//
// NaN logits rank and weigh as −inf. A draw is u in [0, 1), 24 bits of splitmix64's output number position + 1 from the
// state `seed`; the token is the first, by ascending id among those kept, at which the running weight exceeds u times
// their total. Weights are whole numbers (choice.cuh), so that the token depends on logits, seed and position alone.
//
// floor: 4·vocab B of logits read and as many written per row: launches decide → 5 us on an H100; a draw with top-p
// reads them 5 times more with one multiprocessor a row, from L2 → 513 kB at 100 GB/s, 5 us each.
#include "checks_dense.h"
#include "choice.cuh"

namespace fkv {
namespace {

constexpr const char* kCall = "fkv_sample";
constexpr int kThreads = kChoiceThreads, kWarps = kChoiceWarps;
constexpr int kSlice = 4096, kSurveyThreads = 256, kSliceValues = kSlice / kSurveyThreads;

// What a slice's survey leaves in scratch.
struct Survey {
  double sum;  // Σ e^(logit − top)
  float top;
  int32_t argmax;  // lowest id of it
};
static_assert(sizeof(Survey) == 16);

struct Job {
  fkv_sample_params params;
  const fkv_row* rows;
  const fkv_lane* lanes;
  const fkv_counters* counters;
  int32_t* sampled;
  int32_t max_rows, n_slices;
};

__device__ __forceinline__ const float* logits_of(const Job& job, int32_t index, const fkv_row& row) {
  if (job.params.logits == nullptr) return job.lanes[row.sequence].logits;
  return job.params.logits + static_cast<int64_t>(index) * job.params.vocab;
}

// A row's surveys. 8 bytes a logit hold them, except those of a single logit, which is its own survey.
__device__ __forceinline__ Survey* surveys_of(const Job& job, int32_t index) {
  return reinterpret_cast<Survey*>(static_cast<char*>(job.params.scratch) +
                                   static_cast<int64_t>(index) * job.params.vocab * 8);
}

__device__ __forceinline__ bool better(float a, int32_t a_id, float b, int32_t b_id) {
  return a > b || (a == b && a_id < b_id);
}

// The best value of the block and its id, in every thread; `values` and `ids` hold a value a warp.
template <int Warps>
__device__ __forceinline__ void block_best(float& value, int32_t& id, float* values, int32_t* ids) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int round = 0; round < 2; ++round) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(kAllLanes, value, step);
      const int32_t other_id = __shfl_xor_sync(kAllLanes, id, step);
      if (better(other, other_id, value, id)) value = other, id = other_id;
    }
    if (round == 1) break;
    if (lane == 0) values[warp] = value, ids[warp] = id;
    __syncthreads();
    value = lane < Warps ? values[lane] : -INFINITY;
    id = lane < Warps ? ids[lane] : INT32_MAX;
  }
  __syncthreads();
}

// Sum over the block, in every thread, in one tree; `shared` holds a value a warp.
template <class N, int Warps>
__device__ __forceinline__ N block_total(N value, N* shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  value = lane < Warps ? shared[lane] : N{0};
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  __syncthreads();
  return value;
}

// Block (slice, row): the slice's largest logit, its lowest id, Σ e^(logit − largest), and the lane's copy of it.
__global__ void __launch_bounds__(kSurveyThreads) survey(const __grid_constant__ Job job) {
  constexpr int kSurveyWarps = kSurveyThreads / kWarp;
  __shared__ float tops[kSurveyWarps];
  __shared__ int32_t ids[kSurveyWarps];
  __shared__ double sums[kSurveyWarps];
  const int32_t index = static_cast<int32_t>(blockIdx.y), vocab = job.params.vocab;
  const fkv_row& row = job.rows[index];
  if (row.sequence < 0) return;
  const float* logits = logits_of(job, index, row);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSlice + threadIdx.x;
  float values[kSliceValues];
#pragma unroll
  for (int i = 0; i < kSliceValues; ++i) {
    const int64_t id = first + i * kSurveyThreads;
    values[i] = id < vocab ? logits[id] : -INFINITY;
  }
  if (job.params.logits != nullptr) {
    float* copy = job.lanes[row.sequence].logits;
#pragma unroll
    for (int i = 0; i < kSliceValues; ++i) {
      const int64_t id = first + i * kSurveyThreads;
      if (id < vocab) copy[id] = values[i];
    }
  }
  float top = -INFINITY;
  int32_t argmax = INT32_MAX;
#pragma unroll
  for (int i = 0; i < kSliceValues; ++i) {
    const int64_t id = first + i * kSurveyThreads;
    const float v = without_nan(values[i]);
    if (id < vocab && better(v, static_cast<int32_t>(id), top, argmax)) top = v, argmax = static_cast<int32_t>(id);
  }
  block_best<kSurveyWarps>(top, argmax, tops, ids);
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < kSliceValues; ++i)
    if (first + i * kSurveyThreads < vocab) sum += static_cast<double>(weight_of(values[i], top, 1.0f));
  sum = block_total<double, kSurveyWarps>(sum, sums);
  if (threadIdx.x == 0 && vocab > 1) surveys_of(job, index)[blockIdx.x] = {sum, top, argmax};
}

// ---------------------------------------------------------------------------------------------------------------------

// 24 bits: u·2^24.
__device__ __forceinline__ unsigned long long uniform(uint64_t seed, int64_t position) {
  uint64_t z = seed + (static_cast<uint64_t>(position) + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  return z >> 40;
}

__device__ __forceinline__ int32_t draw(Choice& choice, const fkv_row& row, int32_t vocab) {
  choice.weigh(row.temperature);
  Cut cut{0, vocab};  // every token
  if (row.top_k > 0 && row.top_k < vocab) cut = choice.narrow(cut, false, static_cast<unsigned long long>(row.top_k));
  unsigned long long total = choice.total(cut, true);
  if (row.top_p < 1.0f) {
    const double reached = ceil(static_cast<double>(row.top_p) * static_cast<double>(total));
    cut = choice.narrow(cut, true, reached > 1.0 ? static_cast<unsigned long long>(reached) : 1);
    total = choice.total(cut, true);
  }
  const unsigned long long u = uniform(row.seed, int64_t{row.position} + 1);
  const unsigned long long target = __umul64hi(u, total) << 40 | (u * total) >> 24;  // u·total, rounded down
  return choice.locate(cut, true, target);
}

// One block a row.
__global__ void __launch_bounds__(kThreads) choose(const __grid_constant__ Job job) {
  __shared__ ChoiceMemory shared;
  const int32_t index = static_cast<int32_t>(blockIdx.x), vocab = job.params.vocab;
  const fkv_row row = job.rows[index];
  if (row.sequence < 0) return;
  const float* logits = logits_of(job, index, row);
  const Survey* surveys = surveys_of(job, index);
  const auto survey_of = [&](int32_t slice) {
    return vocab > 1 ? surveys[slice] : Survey{1.0, without_nan(logits[0]), 0};
  };

  float top = -INFINITY;
  int32_t argmax = INT32_MAX;
  for (int32_t slice = threadIdx.x; slice < job.n_slices; slice += kThreads) {
    const Survey found = survey_of(slice);
    if (better(found.top, found.argmax, top, argmax)) top = found.top, argmax = found.argmax;
  }
  block_best<kWarps>(top, argmax, shared.values, shared.ids);
  double sum = 0.0;
  for (int32_t slice = threadIdx.x; slice < job.n_slices; slice += kThreads) {
    const Survey found = survey_of(slice);
    sum += found.top == top ? found.sum : found.sum * exp(static_cast<double>(found.top) - static_cast<double>(top));
  }
  const double log_sum = log(block_total<double, kWarps>(sum, shared.sums));

  for (int i = threadIdx.x; i < static_cast<int>(sizeof(fkv_result) / 4); i += kThreads)
    reinterpret_cast<uint32_t*>(&shared.result)[i] = 0;
  __syncthreads();
  Choice choice(logits, vocab, top, shared);
  const auto log_probability = [&](int32_t id) {
    if (id >= vocab) return -INFINITY;
    const float v = choice.logit(id);
    return static_cast<float>((v == top ? 0.0 : static_cast<double>(v) - static_cast<double>(top)) - log_sum);
  };

  const int32_t most = vocab < FKV_MAX_TOP ? vocab : FKV_MAX_TOP;
  const int32_t n_top = row.n_top < 0 ? 0 : row.n_top < most ? row.n_top : most;
  if (n_top > 0) {
    choice.list(choice.narrow(Cut{0, vocab}, false, static_cast<unsigned long long>(n_top)));
    if (static_cast<int32_t>(threadIdx.x) < n_top) {
      const int32_t id = shared.listed[threadIdx.x];
      const float v = choice.logit(id);
      int rank = 0;
      for (int i = 0; i < n_top; ++i) rank += better(choice.logit(shared.listed[i]), shared.listed[i], v, id);
      shared.result.top_id[rank] = id;
      shared.result.top_logprob[rank] = log_probability(id);
    }
  }
  const int32_t token = row.temperature > 0.0f ? draw(choice, row, vocab) : argmax;
  if (threadIdx.x == 0) {
    fkv_result& result = shared.result;
    result.token = token;
    result.argmax = argmax;
    // NaN: no distribution.
    result.logprob = top == -INFINITY ? NAN : log_probability(row.target >= 0 ? row.target : token);
    result.n_top = n_top;
    result.stall_ns = job.params.stall != nullptr ? *job.params.stall : 0;
    result.counters = job.counters[index];
    job.sampled[row.sequence] = token;
  }
  __syncthreads();
  const int64_t entry = *job.params.step % static_cast<uint32_t>(job.params.ring_entries);
  uint32_t* out = reinterpret_cast<uint32_t*>(job.params.results + entry * job.max_rows + index);
  static_assert(sizeof(fkv_result) % 4 == 0 && sizeof(fkv_result) / 4 <= kThreads);
  if (threadIdx.x < sizeof(fkv_result) / 4)
    out[threadIdx.x] = reinterpret_cast<const uint32_t*>(&shared.result)[threadIdx.x];
}

__global__ void count_step(uint32_t* step) { ++*step; }

}  // namespace
}  // namespace fkv

extern "C" int32_t fkv_sample(const fkv_cache* cache, const fkv_sample_params* params, fkv_stream* stream) {
  if (const int32_t status = fkv::check_sample(cache, params, stream)) return status;
  if (const int32_t status = fkv::ready(stream, fkv::kCall)) return status;
  fkv::Job job;
  job.params = *params;
  job.rows = cache->rows;
  job.lanes = cache->lanes;
  job.counters = cache->counters;
  job.sampled = cache->sampled;
  job.max_rows = cache->max_rows;
  job.n_slices = static_cast<int32_t>(fkv::divide_up(params->vocab, fkv::kSlice));
  if (params->n_rows > 0) {
    const dim3 slices(static_cast<unsigned>(job.n_slices), static_cast<unsigned>(params->n_rows));
    fkv::survey<<<slices, fkv::kSurveyThreads, 0, stream->handle>>>(job);
    FKV_LAUNCH_CHECK(stream, fkv::kCall);
    fkv::choose<<<static_cast<unsigned>(params->n_rows), fkv::kThreads, 0, stream->handle>>>(job);
    FKV_LAUNCH_CHECK(stream, fkv::kCall);
  }
  fkv::count_step<<<1, 1, 0, stream->handle>>>(params->step);
  return fkv::launched(stream, fkv::kCall);
}
