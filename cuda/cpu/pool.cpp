// pool.cpp: hands out chunks of a parallel loop by an atomic counter.
#include "pool.h"

#include <algorithm>
#include <exception>

namespace fkv {

// A loop in progress; lives on its caller's stack.
struct Pool::Job {
  const std::function<void(int64_t, int64_t)>& body;
  const int64_t n, chunk;
  std::atomic<int64_t> next{0};
  std::atomic<int> inside{0};  // helpers that may still touch this
  std::mutex mutex{};
  std::exception_ptr error{};

  bool has_chunks() const { return next.load(std::memory_order_relaxed) < n; }

  void run() {
    try {
      for (;;) {
        const int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
        if (begin >= n) return;
        body(begin, std::min(n, begin + chunk));
      }
    } catch (...) {
      next.store(n, std::memory_order_relaxed);
      std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  }
};

Pool::Pool(int threads) : threads_(threads) {
  try {
    for (int i = 1; i < threads; ++i) helpers_.push_back(start_thread([this] { help(); }));
  } catch (...) {
    stop();
    throw;
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  stopping_.store(true);
  arrived_.notify();
  for (std::thread& helper : helpers_) helper.join();
  helpers_.clear();
}

void Pool::parallel(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  if (threads_ == 1 || n <= grain) {
    body(0, n);
    return;
  }
  // Four chunks a thread even out threads that start late or lose their core.
  const int64_t chunk = std::max(grain, (n + 4 * threads_ - 1) / (4 * threads_));
  Job job{body, n, chunk};
  {
    std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push_back(&job);
    generation_.fetch_add(1);
  }
  arrived_.notify(static_cast<int>(std::min<int64_t>((n + chunk - 1) / chunk - 1, threads_ - 1)));
  job.run();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
  }
  left_.wait([&] { return job.inside.load() == 0; }, 2 * kSpinNs);
  if (job.error) std::rethrow_exception(job.error);
}

void Pool::help() {
  for (;;) {
    Job* job = nullptr;
    uint64_t seen;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      seen = generation_.load();
      for (Job* candidate : jobs_) {
        if (!candidate->has_chunks()) continue;
        job = candidate;
        job->inside.fetch_add(1);
        break;
      }
    }
    if (job != nullptr) {
      job->run();
      job->inside.fetch_sub(1);  // the job may be gone from here on
      left_.notify();
      continue;
    }
    arrived_.wait([&] { return stopping_.load() || generation_.load() != seen; }, kSpinNs);
    if (stopping_.load()) return;
  }
}

}  // namespace fkv
