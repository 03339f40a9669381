// link.cpp: a transfer starts when the one before it on the same way ends.
#include "link.h"

#include <algorithm>

#include "waiting.h"

namespace fkv {

namespace {
// Timer slack makes a sleep overshoot by about this much: the rest is spent looking at the clock.
constexpr uint64_t kOvershootNs = 60'000;
}  // namespace

uint64_t Link::begin(uint64_t bytes, bool to_device) {
  if (rate_ <= 0 || bytes == 0) return 0;
  Way& way = to_device ? to_device_ : to_host_;
  std::lock_guard<std::mutex> lock(way.mutex);
  const double start = std::max(static_cast<double>(now_ns()), way.free_at_ns);
  way.free_at_ns = start + static_cast<double>(bytes) * 1e9 / rate_;
  return static_cast<uint64_t>(way.free_at_ns);
}

void Link::finish(uint64_t end_ns) {
  const uint64_t now = now_ns();
  if (end_ns <= now) return;
  if (end_ns - now > kOvershootNs) {
    std::this_thread::sleep_for(std::chrono::nanoseconds(end_ns - now - kOvershootNs));
  }
  spin_until([=] { return now_ns() >= end_ns; }, 2 * kOvershootNs);
}

}  // namespace fkv
