// pool.h: the compute threads of a device.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "waiting.h"

namespace fkv {

// `threads` compute threads, of which the caller of parallel() is one: a stream that runs an operation computes too.
// Several streams may call at once; helpers go where chunks are left.
class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  int threads() const { return threads_; }
  // See Context::parallel. Rethrows the first exception of `body`.
  void parallel(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

 private:
  struct Job;
  void help();
  void stop();

  const int threads_;
  std::mutex mutex_;                     // guards jobs_ and a helper's entry into one
  std::vector<Job*> jobs_;
  std::atomic<uint64_t> generation_{0};  // counts jobs: what idle helpers look at
  std::atomic<bool> stopping_{false};
  Signal arrived_, left_;
  std::vector<std::thread> helpers_;
};

}  // namespace fkv
