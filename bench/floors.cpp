// floors.cpp: what this machine can do at best, measured: bytes read from memory a second, bytes copied, fused multiply-adds in f32.
// Prints one JSON line for each number of threads: {"threads": n, "read": [GB/s …], "copy": [GB/s …], "fma": [GFLOP/s …]}.
// Usage: floors MIB REPETITIONS THREADS… (MIB of memory in all, much more than the caches hold).
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
typedef float vec __attribute__((vector_size(kVectorBytes)));
typedef uint64_t words __attribute__((vector_size(kVectorBytes)));

std::atomic<uint64_t> sink{0};  // results end here, so that no loop is left out

// Reads every byte, `kStreams` places at a time: one place alone does not keep enough lines in flight.
uint64_t read_all(const char* memory, int64_t bytes) {
  constexpr int kStreams = 4, kUnroll = 4;
  const int64_t part = bytes / kStreams;
  words sums[kStreams][kUnroll] = {};
  for (int64_t at = 0; at + kUnroll * kVectorBytes <= part; at += kUnroll * kVectorBytes) {
    for (int s = 0; s < kStreams; ++s) {
      const char* p = memory + s * part + at;
      for (int u = 0; u < kUnroll; ++u) sums[s][u] += *reinterpret_cast<const words*>(p + u * kVectorBytes);
      __builtin_prefetch(p + 2048);
    }
  }
  words total = {};
  for (auto& stream : sums)
    for (words& each : stream) total += each;
  return total[0];
}

// Independent chains enough to hide the latency of any processor's multiply-add, few enough for 16 registers.
constexpr int kChains = 12;
constexpr int64_t kFmaSteps = 20'000'000;
uint64_t multiply_add() {
  vec sums[kChains];
  vec factor = vec{} + 0.999f, term = vec{} + 0.001f;
  asm volatile("" : "+x"(factor), "+x"(term));  // not known when compiling
  for (int c = 0; c < kChains; ++c) sums[c] = term * static_cast<float>(c);
  for (int64_t i = 0; i < kFmaSteps; ++i)
    for (vec& each : sums) each = each * factor + term;
  float total = 0;
  for (const vec& each : sums) total += each[0];
  return static_cast<uint64_t>(total);
}

// Seconds from the moment that all threads are ready until the last one is done.
double timed(int threads, const std::function<uint64_t(int)>& body) {
  std::atomic<int> ready{0}, done{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> pool;
  for (int i = 0; i < threads; ++i)
    pool.emplace_back([&, i] {
      ready.fetch_add(1);
      while (!go.load()) std::this_thread::yield();
      sink.fetch_add(body(i));
      done.fetch_add(1);
    });
  while (ready.load() < threads) std::this_thread::yield();
  const auto start = std::chrono::steady_clock::now();
  go.store(true);
  for (std::thread& each : pool) each.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void print(const char* name, const std::vector<double>& samples) {
  std::printf("\"%s\": [", name);
  for (size_t i = 0; i < samples.size(); ++i) std::printf("%s%.4g", i ? ", " : "", samples[i]);
  std::printf("]");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: floors MIB REPETITIONS THREADS…\n");
    return 2;
  }
  const int64_t bytes = std::atoll(argv[1]) << 20;
  const int repetitions = std::atoi(argv[2]);
  void* mapped = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) {
    std::perror("mmap");
    return 3;
  }
  madvise(mapped, static_cast<size_t>(bytes), MADV_HUGEPAGE);
  char* memory = static_cast<char*>(mapped);
  std::memset(memory, 1, static_cast<size_t>(bytes));

  for (int a = 3; a < argc; ++a) {
    const int threads = std::atoi(argv[a]);
    const int64_t share = bytes / threads / 4096 * 4096;
    std::vector<double> read, copy, fma;
    for (int r = 0; r < repetitions; ++r) {
      const double n = threads;
      read.push_back(n * share / 1e9 / timed(threads, [&](int i) { return read_all(memory + i * share, share); }));
      copy.push_back(n * (share / 2) / 1e9 / timed(threads, [&](int i) {
        char* mine = memory + i * share;
        std::memcpy(mine, mine + share / 2, static_cast<size_t>(share / 2));
        return uint64_t{1};
      }));
      const double flops = 2.0 * n * kFmaSteps * kChains * (kVectorBytes / 4);
      fma.push_back(flops / 1e9 / timed(threads, [](int) { return multiply_add(); }));
    }
    std::printf("{\"threads\": %d, ", threads);
    print("read", read);
    std::printf(", ");
    print("copy", copy);
    std::printf(", ");
    print("fma", fma);
    std::printf("}\n");
    std::fflush(stdout);
  }
  return sink.load() == 1 ? 1 : 0;
}
