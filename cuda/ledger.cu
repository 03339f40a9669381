// ledger.cu: the intervals of memory that a device has given out or pinned. CUDA could be asked where an address lies, but not
// whether a copy runs past the end of what was allocated there.
#include "ledger.h"

#include <iterator>

#include "checks.h"

namespace fkv {

void Ledger::add(const void* memory, uint64_t bytes, Kind kind) {
  const std::lock_guard<std::mutex> lock(mutex_);
  ranges_[reinterpret_cast<uintptr_t>(memory)] = {bytes, kind};
  (kind == Kind::kDevice ? usage_.device : usage_.pinned) += bytes;
}

int32_t Ledger::require_free(const void* memory, uint64_t bytes) const {
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory);
  FKV_REQUIRE(start + bytes > start, FKV_BAD_ARGUMENT, "memory: the range wraps around the address space");
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto after = ranges_.lower_bound(start + bytes);
  const bool overlaps = after != ranges_.begin() && std::prev(after)->first + std::prev(after)->second.bytes > start;
  FKV_REQUIRE(!overlaps, FKV_BAD_ARGUMENT, "memory: part of it is device memory or pinned already");
  return growths.require_none(memory, bytes, "memory");
}

int32_t Ledger::take_out(uint64_t* bytes, const void* memory, Kind kind) {
  constexpr const char* kGivers[] = {"fkv_device_alloc", "fkv_host_alloc", "fkv_host_register", "fkv_host_reserve"};
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = ranges_.find(reinterpret_cast<uintptr_t>(memory));
  FKV_REQUIRE(found != ranges_.end() && found->second.kind == kind, FKV_BAD_ARGUMENT,
              "memory: %p is not what %s gave out or took, or was given back already", memory,
              kGivers[static_cast<int>(kind)]);
  *bytes = found->second.bytes;
  (kind == Kind::kDevice ? usage_.device : usage_.pinned) -= *bytes;
  ranges_.erase(found);
  return FKV_OK;
}

int32_t Ledger::locate(Place* place, const void* memory, uint64_t bytes, const char* what) const {
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory);
  FKV_REQUIRE(start + bytes >= start, FKV_BAD_ARGUMENT, "%s: the range wraps around the address space", what);
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto after = ranges_.upper_bound(start);
  if (after != ranges_.begin()) {
    const auto& [base, range] = *std::prev(after);
    const uintptr_t end = base + range.bytes;
    if (start < end) {
      FKV_REQUIRE(start + bytes <= end, FKV_BAD_ARGUMENT, "%s: %llu bytes run %llu past the end of a %s allocation of %llu",
                  what, static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(start + bytes - end),
                  range.kind == Kind::kDevice ? "device" : "pinned", static_cast<unsigned long long>(range.bytes));
      *place = range.kind == Kind::kDevice ? Place::kDevice : Place::kPinned;
      return FKV_OK;
    }
  }
  FKV_REQUIRE(after == ranges_.end() || after->first >= start + bytes, FKV_BAD_ARGUMENT,
              "%s: begins before a device or pinned allocation and runs into it", what);
  if (const int32_t status = growths.require_none(memory, bytes, what)) return status;
  *place = Place::kPageable;
  return FKV_OK;
}

Ledger::Usage Ledger::usage() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return usage_;
}

}  // namespace fkv
