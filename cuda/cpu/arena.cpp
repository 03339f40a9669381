// arena.cpp: allocation and look-up. Device memory ends at a page that cannot be touched, so that a kernel that runs
// far past the end of a buffer stops there.
#include "arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <iterator>
#include <new>

#include "../machine.h"
#include "twin.h"

namespace fkv {

namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kAlign = 256;
constexpr uint64_t kHugeBytes = uint64_t{4} << 20;  // from here on huge pages are worth asking for

uint64_t round_up(uint64_t bytes, uint64_t unit) { return (bytes + unit - 1) / unit * unit; }

void* reserve(uint64_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return memory == MAP_FAILED ? nullptr : memory;
}

}  // namespace

Memory::Memory() : total_(machine_bytes()) {
  // Twice what there is leaves room for holes; less where address space is limited.
  const uint64_t most = std::max(total_, uint64_t{1} << 30) / kPage * kPage * 2;
  void* arena = nullptr;
  for (arena_bytes_ = most; arena == nullptr && arena_bytes_ >= (uint64_t{1} << 28);) {
    arena = reserve(arena_bytes_);
    if (arena == nullptr) arena_bytes_ = arena_bytes_ / 2 / kPage * kPage;
  }
  if (arena == nullptr) throw std::bad_alloc();
  arena_ = reinterpret_cast<uintptr_t>(arena);
  free_[arena_] = arena_bytes_;
}

Memory::~Memory() {
  growths_.clear();
  for (const auto& [start, range] : ranges_) {
    if (range.kind == Kind::kAllocated) munmap(reinterpret_cast<void*>(start), round_up(range.bytes, kPage));
  }
  munmap(reinterpret_cast<void*>(arena_), arena_bytes_);
}

int32_t Memory::device_alloc(void** memory, uint64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const uint64_t used = allocated_ + pinned_;
  if (!fits(bytes, used, total_)) return over_limit("device", bytes, used, total_);
  const uint64_t mapped = round_up(bytes, kPage), taken = mapped + kPage;
  const auto hole = std::find_if(free_.begin(), free_.end(), [&](const auto& entry) { return entry.second >= taken; });
  if (hole == free_.end()) {
    return fail(FKV_OUT_OF_MEMORY, "no stretch of %llu bytes is left in the device's address space",
                static_cast<unsigned long long>(taken));
  }
  const uintptr_t start = hole->first;
  void* pages = reinterpret_cast<void*>(start);
  if (mprotect(pages, mapped, PROT_READ | PROT_WRITE) != 0) {
    return fail(FKV_OUT_OF_MEMORY, "the system has no %llu bytes", static_cast<unsigned long long>(mapped));
  }
  if (mapped >= kHugeBytes) madvise(pages, mapped, MADV_HUGEPAGE);  // a wish: where it is refused nothing changes
  std::memset(pages, 0xFF, mapped);
  const uint64_t left = hole->second - taken;
  free_.erase(hole);
  if (left > 0) free_[start + taken] = left;
  // At the end of its pages: what is read or written past it meets the page that cannot be touched.
  const uintptr_t address = start + mapped - round_up(bytes, kAlign);
  ranges_[address] = {bytes, Kind::kDevice};
  allocated_ += bytes;
  *memory = reinterpret_cast<void*>(address);
  return FKV_OK;
}

int32_t Memory::device_free(void* memory) {
  Range range{};
  std::lock_guard<std::mutex> lock(mutex_);
  if (const int32_t status = take_out(memory, Kind::kDevice, "fkv_device_alloc", &range)) return status;
  allocated_ -= range.bytes;
  give_back_pages(reinterpret_cast<uintptr_t>(memory) / kPage * kPage, round_up(range.bytes, kPage) + kPage);
  return FKV_OK;
}

void Memory::give_back_pages(uintptr_t start, uint64_t bytes) {
  // Mapped anew, the pages themselves go back to the system.
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  mmap(reinterpret_cast<void*>(start), bytes, PROT_NONE, kFlags, -1, 0);
  auto next = free_.lower_bound(start);
  if (next != free_.end() && next->first == start + bytes) {
    bytes += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == start) {
      before->second += bytes;
      return;
    }
  }
  free_[start] = bytes;
}

int32_t Memory::host_alloc(void** memory, uint64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const uint64_t used = allocated_ + pinned_;
  void* pages = MAP_FAILED;
  if (fits(bytes, used, total_)) {
    pages = mmap(nullptr, round_up(bytes, kPage), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }
  if (pages == MAP_FAILED) return over_limit("pinned", bytes, used, total_);
  if (bytes >= kHugeBytes) madvise(pages, round_up(bytes, kPage), MADV_HUGEPAGE);
  ranges_[reinterpret_cast<uintptr_t>(pages)] = {bytes, Kind::kAllocated};
  pinned_ += bytes;
  *memory = pages;
  return FKV_OK;
}

int32_t Memory::host_reserve(void** memory, uint64_t bytes, uint64_t piece_bytes) {
  std::unique_ptr<Growth> growth;
  const Growth::Pinning pinning{[this](char* piece, uint64_t n) { return add_piece(piece, n); },
                                [this](char* piece, uint64_t) { drop_piece(piece); }};
  if (const int32_t status = Growth::reserve(&growth, bytes, piece_bytes, pinning)) return status;
  *memory = growth->memory();
  growths_.add(std::move(growth));
  return FKV_OK;
}

int32_t Memory::add_piece(char* piece, uint64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const uint64_t used = allocated_ + pinned_;
  if (!fits(bytes, used, total_)) return over_limit("pinned", bytes, used, total_);
  ranges_[reinterpret_cast<uintptr_t>(piece)] = {bytes, Kind::kGrown};
  pinned_ += bytes;
  return FKV_OK;
}

void Memory::drop_piece(char* piece) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = ranges_.find(reinterpret_cast<uintptr_t>(piece));
  pinned_ -= found->second.bytes;
  ranges_.erase(found);
}

int32_t Memory::host_free(void* memory) {
  if (growths_.take_out(memory) != nullptr) return FKV_OK;
  Range range{};
  std::lock_guard<std::mutex> lock(mutex_);
  if (const int32_t status = take_out(memory, Kind::kAllocated, "fkv_host_alloc", &range)) return status;
  pinned_ -= range.bytes;
  munmap(memory, round_up(range.bytes, kPage));
  return FKV_OK;
}

int32_t Memory::host_register(void* memory, uint64_t bytes) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory);
  FKV_REQUIRE(start + bytes > start, FKV_BAD_ARGUMENT, "memory: the range wraps around the address space");
  std::lock_guard<std::mutex> lock(mutex_);
  const auto after = ranges_.lower_bound(start + bytes);
  const bool overlaps = after != ranges_.begin() && std::prev(after)->first + std::prev(after)->second.bytes > start;
  FKV_REQUIRE(!overlaps && (start + bytes <= arena_ || start >= arena_ + arena_bytes_), FKV_BAD_ARGUMENT,
              "memory: part of it is device memory or pinned already");
  if (const int32_t status = growths_.require_none(memory, bytes, "memory")) return status;
  ranges_[start] = {bytes, Kind::kRegistered};
  pinned_ += bytes;
  return FKV_OK;
}

int32_t Memory::host_unregister(void* memory) {
  Range range{};
  std::lock_guard<std::mutex> lock(mutex_);
  if (const int32_t status = take_out(memory, Kind::kRegistered, "fkv_host_register", &range)) return status;
  pinned_ -= range.bytes;
  return FKV_OK;
}

int32_t Memory::take_out(void* memory, Kind kind, const char* what, Range* range) {
  const auto found = ranges_.find(reinterpret_cast<uintptr_t>(memory));
  FKV_REQUIRE(found != ranges_.end() && found->second.kind == kind, FKV_BAD_ARGUMENT,
              "memory: %p is not what %s gave out or took, or was given back already", memory, what);
  *range = found->second;
  ranges_.erase(found);
  return FKV_OK;
}

int32_t Memory::locate(Place* place, const void* memory, uint64_t bytes, const char* what) const {
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory);
  FKV_REQUIRE(start + bytes >= start, FKV_BAD_ARGUMENT, "%s: the range wraps around the address space", what);
  std::lock_guard<std::mutex> lock(mutex_);
  const auto after = ranges_.upper_bound(start);
  if (after != ranges_.begin()) {
    const auto& [base, range] = *std::prev(after);
    const uintptr_t end = base + range.bytes;
    if (start < end) {
      FKV_REQUIRE(start + bytes <= end, FKV_BAD_ARGUMENT,
                  "%s: %llu bytes run %llu past the end of a %s allocation of %llu", what,
                  static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(start + bytes - end),
                  range.kind == Kind::kDevice ? "device" : "pinned", static_cast<unsigned long long>(range.bytes));
      *place = range.kind == Kind::kDevice ? Place::kDevice : Place::kPinned;
      return FKV_OK;
    }
  }
  FKV_REQUIRE(after == ranges_.end() || after->first >= start + bytes, FKV_BAD_ARGUMENT,
              "%s: begins before a device or pinned allocation and runs into it", what);
  FKV_REQUIRE(start + bytes <= arena_ || start >= arena_ + arena_bytes_, FKV_BAD_ARGUMENT,
              "%s: no device allocation at %p; it was freed, or the address is wrong", what, memory);
  if (const int32_t status = growths_.require_none(memory, bytes, what)) return status;
  *place = Place::kPageable;
  return FKV_OK;
}

Memory::Usage Memory::usage() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return {total_, allocated_, pinned_};
}

}  // namespace fkv
