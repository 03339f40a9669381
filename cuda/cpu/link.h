// link.h: the simulated host link. What it takes is simulation, to be labelled so wherever it is shown.
#pragma once
#include <cstdint>
#include <mutex>

namespace fkv {

// Two independent ways, each moving `bytes_per_second` shared by the transfers on it; 0 = no link, no cost.
class Link {
 public:
  explicit Link(double bytes_per_second) : rate_(bytes_per_second) {}
  // Queues a transfer and returns the time of now_ns() at which it ends; the bytes may be moved meanwhile.
  uint64_t begin(uint64_t bytes, bool to_device);
  // Sleeps until that time, to a few microseconds.
  static void finish(uint64_t end_ns);

 private:
  struct Way {
    std::mutex mutex;
    double free_at_ns = 0;  // when the transfers queued so far are through
  };
  const double rate_;
  Way to_device_, to_host_;
};

}  // namespace fkv
