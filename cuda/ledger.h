// ledger.h: which memory a CUDA device has given out or pinned, and which of it an address belongs to.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>

#include "growth.h"

namespace fkv {

enum class Place { kDevice, kPinned, kPageable };

// Errors are set by fail(); every function may be called from any thread.
class Ledger {
 public:
  enum class Kind { kDevice, kAllocated, kRegistered, kGrown };

  void add(const void* memory, uint64_t bytes, Kind kind);
  // FKV_BAD_ARGUMENT where some of the range is in the ledger already.
  int32_t require_free(const void* memory, uint64_t bytes) const;
  // Takes the range that starts at `memory` out, and says how long it was. FKV_BAD_ARGUMENT unless it is of this kind.
  int32_t take_out(uint64_t* bytes, const void* memory, Kind kind);
  // Where `bytes` at `memory` lie. FKV_BAD_ARGUMENT if they run past the end of an allocation, or of what is pinned of a reservation.
  // `what` names the argument in the error.
  int32_t locate(Place* place, const void* memory, uint64_t bytes, const char* what) const;

  struct Usage {
    uint64_t device, pinned;
  };
  Usage usage() const;

  // Reservations, of whose pieces the ledger knows each from when it is pinned.
  Growths growths{};

  // Forgets everything, and calls each(memory, bytes, kind) for all of it.
  template <class Each>
  void clear(const Each& each) {
    growths.clear();
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [start, range] : ranges_) each(reinterpret_cast<void*>(start), range.bytes, range.kind);
    ranges_.clear();
    usage_ = {};
  }

 private:
  struct Range {
    uint64_t bytes;
    Kind kind;
  };
  mutable std::mutex mutex_;
  std::map<uintptr_t, Range> ranges_;  // never overlapping
  Usage usage_{};
};

}  // namespace fkv
