// waiting.h: how the twin's threads wait for each other: a short polite spin, since the next operation is mostly a few
// microseconds away, then a sleep that costs nothing.
#pragma once
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

#include "../threads.h"

namespace fkv {

constexpr uint64_t kForever = UINT64_MAX;
// How long a thread that expects work soon looks for it before it sleeps. Waking a sleeper costs about as much.
constexpr uint64_t kSpinNs = 50'000;

inline uint64_t now_ns() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
}

inline void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Looks for `ready` for about `ns`. Gives the core away between looks: there may be more threads than cores.
template <class Ready>
bool spin_until(const Ready& ready, uint64_t ns) {
  if (ready()) return true;
  if (ns == 0) return false;
  const uint64_t end = now_ns() + ns;
  do {
    for (int i = 0; i < 40; ++i) {
      if (ready()) return true;
      cpu_pause();
    }
    sched_yield();
  } while (now_ns() < end);
  return ready();
}

// A place to sleep until a condition on atomics holds. Who changes the condition calls notify() afterwards; that is one
// atomic operation while nobody sleeps.
class Signal {
 public:
  // False: `deadline_ns` (of now_ns) passed first.
  template <class Ready>
  bool wait(const Ready& ready, uint64_t spin_ns, uint64_t deadline_ns = kForever) {
    if (spin_until(ready, spin_ns)) return true;
    std::unique_lock<std::mutex> lock(mutex_);
    // Either notify() reads this increment, or it came before, and `ready` sees what was written before it.
    sleepers_.fetch_add(1);
    bool is_ready;
    while (!(is_ready = ready())) {
      if (deadline_ns == kForever) {
        wake_.wait(lock);
      } else {
        const uint64_t now = now_ns();
        if (now >= deadline_ns) break;
        wake_.wait_for(lock, std::chrono::nanoseconds(deadline_ns - now));
      }
    }
    sleepers_.fetch_sub(1);
    return is_ready;
  }

  void notify(int at_most = INT32_MAX) {
    const int sleepers = sleepers_.fetch_add(0);
    if (sleepers == 0) return;
    { std::lock_guard<std::mutex> lock(mutex_); }  // a thread between its increment and its sleep gets there first
    if (at_most >= sleepers) {
      wake_.notify_all();
    } else {
      for (int i = 0; i < at_most; ++i) wake_.notify_one();
    }
  }

 private:
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace fkv
