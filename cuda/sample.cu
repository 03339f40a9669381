// sample.cu: the next token of each row, and what a step tells the host about it. Two launches: slices of the vocabulary are
// surveyed side by side, then a cluster of blocks a row chooses (choice.cuh); for a greedy row that is one block, and the
// surveys are enough. The row that is done last counts the step.
//
// NaN logits rank and weigh as −inf. A draw is u in [0, 1), 24 bits of splitmix64's output number position + 1 from the state
// `seed`; the token is the first, by ascending id among those kept, at which the running weight exceeds u times their total.
// Weights are whole numbers, so that the token depends on logits, seed and position alone.
//
// floor: 4·vocab B of logits read and as many written per row: launches decide → 5 us on an H100; a draw has a barrier of the
// cluster for each of its sums and three digits of each cut, and weighs every token twice. Measured on an H100, vocab 128,256,
// one row: greedy 8.6 us, temperature 18, top-k 41, top-p 49; 32 rows: 20, 58, 116, 142.
#include <algorithm>

#include "checks_dense.h"
#include "choice.cuh"

namespace fkv {
namespace {

constexpr const char* kCall = "fkv_sample";

constexpr int kSlice = 2048, kSurveyThreads = 256, kSliceValues = kSlice / kSurveyThreads;
constexpr int64_t kHeadBytes = 64;  // of scratch: how many rows are done

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
  int32_t max_rows, n_slices, held;  // held: logits that a thread of a cluster keeps in shared memory
};

__device__ __forceinline__ const float* logits_of(const Job& job, int32_t index, const fkv_row& row) {
  if (job.params.logits == nullptr) return job.lanes[row.sequence].logits;
  return job.params.logits + static_cast<int64_t>(index) * job.params.vocab;
}

// A row's surveys. 8 bytes a logit hold them, except those of a single logit, which is its own survey.
__device__ __forceinline__ Survey* surveys_of(const Job& job, int32_t index) {
  char* first = static_cast<char*>(job.params.scratch) + kHeadBytes;
  return reinterpret_cast<Survey*>(first + static_cast<int64_t>(index) * job.params.vocab * 8);
}

__device__ __forceinline__ bool better(float a, int32_t a_id, float b, int32_t b_id) { return a > b || (a == b && a_id < b_id); }

// A logit equal to the largest weighs 1 whatever it is, so that infinities make no NaN.
__device__ __forceinline__ float weight_of(float v, float top) {
  v = without_nan(v);
  return v == top ? 1.0f : expf(v - top);
}

// The best value of the block and its id, in every thread.
template <int Warps>
__device__ __forceinline__ void block_best(float& value, int32_t& id) {
  __shared__ float values[Warps];
  __shared__ int32_t ids[Warps];
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
}

// Sum over the block, in every thread, in one tree.
template <int Warps>
__device__ __forceinline__ double block_total(double value) {
  __shared__ double sums[Warps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  if (lane == 0) sums[warp] = value;
  __syncthreads();
  value = lane < Warps ? sums[lane] : 0.0;
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Block (slice, row): the slice's largest logit, its lowest id, Σ e^(logit − largest), and the lane's copy of it.
__global__ void __launch_bounds__(kSurveyThreads) survey_kernel(const __grid_constant__ Job job) {
  constexpr int kSurveyWarps = kSurveyThreads / kWarp;
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
  block_best<kSurveyWarps>(top, argmax);
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < kSliceValues; ++i)
    if (first + i * kSurveyThreads < vocab) sum += static_cast<double>(weight_of(values[i], top));
  sum = block_total<kSurveyWarps>(sum);
  if (threadIdx.x == 0 && vocab > 1) surveys_of(job, index)[blockIdx.x] = {sum, top, argmax};
}

// 24 bits: u·2^24.
__device__ __forceinline__ Whole uniform(uint64_t seed, int64_t position) {
  uint64_t z = seed + (static_cast<uint64_t>(position) + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  return z >> 40;
}

template <int kBlocks>
__device__ __forceinline__ int32_t draw(Choice<kBlocks>& choice, const fkv_row& row, float top, int32_t vocab) {
  const Measure weight = Measure::weight(top, row.temperature, vocab);
  Cut cut = choice.everything();
  if (row.top_k > 0 && row.top_k < vocab)
    cut = choice.narrow(cut, Measure::count(), [&](Whole) { return static_cast<Whole>(row.top_k); });
  if (row.top_p < 1.0f) {
    cut = choice.narrow(cut, weight, [&](Whole total) {
      const double reached = ceil(static_cast<double>(row.top_p) * static_cast<double>(total));
      return reached > 1.0 ? static_cast<Whole>(reached) : Whole{1};
    });
  }
  const Whole total = choice.total(cut, weight), u = uniform(row.seed, int64_t{row.position} + 1);
  return choice.locate(cut, weight, __umul64hi(u, total) << 40 | (u * total) >> 24);  // u·total, rounded down
}

// Whether this row is the last of all to get here.
__device__ __forceinline__ bool last_row(const Job& job) {
  unsigned* arrived = static_cast<unsigned*>(job.params.scratch);
  __threadfence();
  if (atomicAdd(arrived, 1) != static_cast<unsigned>(job.params.n_rows) - 1) return false;
  *arrived = 0;
  return true;
}

// Cluster (row).
template <int kBlocks>
__global__ void __launch_bounds__(kChoiceThreads, 1) choose_kernel(const __grid_constant__ Job job) {
  extern __shared__ __align__(16) char memory[];
  typedef typename Choice<kBlocks>::Memory Memory;
  Memory& shared = *reinterpret_cast<Memory*>(memory);
  __shared__ fkv_result result;
  const int32_t index = static_cast<int32_t>(blockIdx.y), vocab = job.params.vocab;
  const bool first = Cluster<kBlocks>::rank() == 0;
  const fkv_row row = job.rows[index];
  if (row.sequence < 0) {
    if (first && threadIdx.x == 0 && last_row(job)) ++*job.params.step;
    return;
  }
  const int32_t most = vocab < FKV_MAX_TOP ? vocab : FKV_MAX_TOP;
  const int32_t n_top = row.n_top < 0 ? 0 : row.n_top < most ? row.n_top : most;
  const bool draws = row.temperature > 0.0f, chooses = draws || n_top > 0;
  if (!chooses && !first) return;  // nobody waits for this block
  const float* logits = logits_of(job, index, row);
  const Survey* surveys = surveys_of(job, index);
  const auto survey_of = [&](int32_t slice) { return vocab > 1 ? surveys[slice] : Survey{1.0, without_nan(logits[0]), 0}; };
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(fkv_result) / 4); i += kChoiceThreads)
    reinterpret_cast<uint32_t*>(&result)[i] = 0;
  Choice<kBlocks> choice(logits, vocab, shared, reinterpret_cast<float*>(memory + sizeof(Memory)), chooses ? job.held : 0);

  float top = -INFINITY;
  int32_t argmax = INT32_MAX;
  for (int32_t slice = threadIdx.x; slice < job.n_slices; slice += kChoiceThreads) {
    const Survey found = survey_of(slice);
    if (better(found.top, found.argmax, top, argmax)) top = found.top, argmax = found.argmax;
  }
  block_best<kChoiceWarps>(top, argmax);
  double sum = 0.0;
  for (int32_t slice = threadIdx.x; slice < job.n_slices; slice += kChoiceThreads) {
    const Survey found = survey_of(slice);
    sum += found.top == top ? found.sum : found.sum * exp(static_cast<double>(found.top) - static_cast<double>(top));
  }
  const double log_sum = log(block_total<kChoiceWarps>(sum));
  const auto log_probability = [&](int32_t id) {
    if (id >= vocab) return -INFINITY;
    const float v = choice.logit(id);
    return static_cast<float>((v == top ? 0.0 : static_cast<double>(v) - static_cast<double>(top)) - log_sum);
  };

  if (n_top > 0) {
    choice.list(choice.narrow(choice.everything(), Measure::count(), [&](Whole) { return static_cast<Whole>(n_top); }));
    if (first && threadIdx.x == 0) choice.gather_list();
    __syncthreads();
    if (first && static_cast<int32_t>(threadIdx.x) < n_top) {
      const int32_t id = shared.gathered[threadIdx.x];
      const float v = choice.logit(id);
      int rank = 0;
      for (int i = 0; i < n_top; ++i) rank += better(choice.logit(shared.gathered[i]), shared.gathered[i], v, id);
      result.top_id[rank] = id;
      result.top_logprob[rank] = log_probability(id);
    }
  }
  const int32_t token = draws ? draw(choice, row, top, vocab) : argmax;
  if (first) {
    if (threadIdx.x == 0) {
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
    static_assert(sizeof(fkv_result) % 4 == 0 && sizeof(fkv_result) / 4 <= kChoiceThreads);
    if (threadIdx.x < sizeof(fkv_result) / 4) out[threadIdx.x] = reinterpret_cast<const uint32_t*>(&result)[threadIdx.x];
    __syncthreads();  // all have read the step
    if (threadIdx.x == 0 && last_row(job)) ++*job.params.step;
  }
  if (chooses) Cluster<kBlocks>::sync();  // no block ends while another reads what it showed
}

__global__ void count_step(uint32_t* step) { ++*step; }

}  // namespace
}  // namespace fkv

extern "C" int32_t fkv_sample(const fkv_cache* cache, const fkv_sample_params* params, fkv_stream* stream) {
  if (const int32_t status = fkv::check_sample(cache, params, stream)) return status;
  if (const int32_t status = fkv::ready(stream, fkv::kCall)) return status;
  const auto rows = static_cast<unsigned>(params->n_rows);
  if (rows == 0) {
    fkv::count_step<<<1, 1, 0, stream->handle>>>(params->step);
    return fkv::launched(stream, fkv::kCall);
  }
  const size_t has = stream->device->properties.sharedMemPerBlockOptin;
  const size_t most = stream->device->plain ? std::min(has, fkv::kPlainShared) : has;
  const auto issue = [&](auto blocks) {
    constexpr int kBlocks = decltype(blocks)::value;
    typedef fkv::Choice<kBlocks> Choice;
    constexpr size_t kTurn = fkv::kChoiceThreads * sizeof(float), kFixed = sizeof(typename Choice::Memory);
    constexpr size_t kStatic = 2048;  // of the kernel
    fkv::Job job{*params, cache->rows, cache->lanes, cache->counters, cache->sampled, cache->max_rows};
    job.n_slices = static_cast<int32_t>(fkv::divide_up(params->vocab, fkv::kSlice));
    const size_t room = (most - kFixed - kStatic) / kTurn;
    job.held = static_cast<int32_t>(std::min<size_t>(room, fkv::choice_turns(params->vocab, kBlocks)));
    fkv::survey_kernel<<<dim3(job.n_slices, rows), fkv::kSurveyThreads, 0, stream->handle>>>(job);
    FKV_LAUNCH_CHECK(stream, fkv::kCall);
    const fkv::Launch launch{dim3(kBlocks, rows), fkv::kChoiceThreads, kFixed + job.held * kTurn, kBlocks};
    return fkv::launch_clusters(stream, fkv::kCall, fkv::choose_kernel<kBlocks>, launch, job);
  };
  if (fkv::has_clusters(stream)) return issue(std::integral_constant<int, fkv::kClusterBlocks>{});
  return issue(std::integral_constant<int, 1>{});
}
