// schedule.h: the order in which operations run under a schedule seed.
#pragma once
#include <cstdint>
#include <mutex>

struct fkv_device;
struct fkv_stream;

namespace fkv {

struct Record;

// Runs queued operations one at a time on the thread that asks. Which of the streams' ready heads comes next (of a
// graph in progress: which lane's next node) is drawn from the seed: for a stretch of random length one ranking of
// streams and lanes holds, so that those at its end starve; now and then an operation is drawn evenly. The same seed
// and the same host calls give the same order.
class Schedule {
 public:
  Schedule(fkv_device* device, uint64_t seed) : device_(device), state_(seed) {}
  // False: nothing is ready.
  bool step();
  // False: nothing is ready and the record is still not done, which means a deadlock.
  bool run_until(const Record& record);
  // Runs 1 to 8 operations, as far as there are any: time passes while the host asks.
  void run_some();

 private:
  struct Choice {
    fkv_stream* stream;
    int lane;  // −1: the whole entry at the head of the queue
    int node;
  };
  Choice choose();
  uint64_t draw();

  fkv_device* device_;
  std::mutex mutex_;  // one operation at a time
  uint64_t state_;
  uint64_t ranking_ = 0;
  uint64_t stretch_ = 0;  // operations for which the ranking still holds
};

}  // namespace fkv
