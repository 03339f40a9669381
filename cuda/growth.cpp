// growth.cpp: pieces come from the start on, one at a time.
#include "growth.h"

#include <sys/mman.h>

#include <utility>

#include "checks.h"
#include "threads.h"

namespace fkv {
namespace {

constexpr uint64_t kHugePage = uint64_t{2} << 20;

// `bytes` at a multiple of kHugePage that nothing can touch, or null.
char* address_space(uint64_t bytes) {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* found = mmap(nullptr, bytes + kHugePage, PROT_NONE, kFlags, -1, 0);
  if (found == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(found);
  char* const memory = begin + (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  if (memory > begin) munmap(begin, static_cast<size_t>(memory - begin));
  if (char* const end = memory + bytes; end < begin + bytes + kHugePage) {
    munmap(end, static_cast<size_t>(begin + bytes + kHugePage - end));
  }
  madvise(memory, bytes, MADV_HUGEPAGE);  // a wish; they are touched and pinned several times faster
  return memory;
}

}  // namespace

int32_t Growth::reserve(std::unique_ptr<Growth>* growth, uint64_t bytes, uint64_t piece_bytes, Pinning pinning) {
  constexpr uint64_t kPage = 4096;
  FKV_REQUIRE(piece_bytes > 0 && piece_bytes % kPage == 0, FKV_BAD_ARGUMENT, "piece_bytes: %llu is not a multiple of 4096",
              static_cast<unsigned long long>(piece_bytes));
  FKV_REQUIRE(bytes < uint64_t{1} << 47, FKV_OUT_OF_MEMORY, "%llu bytes: no process has so much address space",
              static_cast<unsigned long long>(bytes));
  bytes = (bytes + kPage - 1) / kPage * kPage;
  char* const memory = address_space(bytes);
  FKV_REQUIRE(memory != nullptr, FKV_OUT_OF_MEMORY, "the system has no %llu bytes of address space",
              static_cast<unsigned long long>(bytes));
  growth->reset(new Growth(memory, bytes, piece_bytes, std::move(pinning)));
  return FKV_OK;
}

Growth::Growth(char* memory, uint64_t bytes, uint64_t piece_bytes, Pinning pinning)
    : memory_(memory), bytes_(bytes), piece_bytes_(piece_bytes), pinning_(std::move(pinning)) {}

Growth::~Growth() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  asked_.notify_one();
  if (thread_.joinable()) thread_.join();
  for (uint64_t at = 0; at < ready_; at += piece_bytes_) pinning_.unpin(memory_ + at, piece_at(at));
  munmap(memory_, bytes_);
}

int32_t Growth::grow(uint64_t bytes) {
  FKV_REQUIRE(bytes <= bytes_, FKV_BAD_ARGUMENT, "bytes: %llu of a reservation of %llu", static_cast<unsigned long long>(bytes),
              static_cast<unsigned long long>(bytes_));
  const std::lock_guard<std::mutex> lock(mutex_);
  if (bytes <= wanted_) return FKV_OK;
  wanted_ = bytes;
  if (!thread_.joinable()) thread_ = start_thread([this] { run(); });
  asked_.notify_one();
  return FKV_OK;
}

int32_t Growth::ready(uint64_t* bytes) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  *bytes = ready_;
  return status_ == FKV_OK ? FKV_OK : fail(status_, "%s", text_.c_str());
}

void Growth::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (status_ == FKV_OK) {
    asked_.wait(lock, [this] { return stopping_ || ready_ < wanted_; });
    if (stopping_) return;
    const uint64_t at = ready_;
    lock.unlock();
    const int32_t status = add(at);
    lock.lock();
    if (status == FKV_OK) {
      ready_ = at + piece_at(at);
    } else {
      text_ = fkv_last_error();
      status_ = status;
    }
  }
}

int32_t Growth::add(uint64_t at) {
  char* const piece = memory_ + at;
  const uint64_t bytes = piece_at(at);
  FKV_REQUIRE(mprotect(piece, bytes, PROT_READ | PROT_WRITE) == 0, FKV_OUT_OF_MEMORY, "the system has no %llu bytes more",
              static_cast<unsigned long long>(bytes));
  return pinning_.pin(piece, bytes);
}

void Growths::add(std::unique_ptr<Growth> growth) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const void* const memory = growth->memory();
  growths_[memory] = std::move(growth);
}

std::shared_ptr<Growth> Growths::find(const void* memory) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = growths_.find(memory);
  return found == growths_.end() ? nullptr : found->second;
}

std::shared_ptr<Growth> Growths::take_out(const void* memory) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = growths_.find(memory);
  if (found == growths_.end()) return nullptr;
  std::shared_ptr<Growth> growth = std::move(found->second);
  growths_.erase(found);
  return growth;
}

int32_t Growths::require_none(const void* memory, uint64_t bytes, const char* what) const {
  const char* const start = static_cast<const char*>(memory);
  const std::lock_guard<std::mutex> lock(mutex_);
  auto after = growths_.lower_bound(start + bytes);
  if (after == growths_.begin()) return FKV_OK;
  const Growth& growth = *(--after)->second;
  FKV_REQUIRE(growth.memory() + growth.bytes() <= start, FKV_BAD_ARGUMENT,
              "%s: not all of it is pinned yet; fkv_host_ready tells how far it is", what);
  return FKV_OK;
}

int32_t Growths::grow(const void* memory, uint64_t bytes) const {
  const std::shared_ptr<Growth> growth = find(memory);
  FKV_REQUIRE(growth != nullptr, FKV_BAD_ARGUMENT, "memory: %p is not what fkv_host_reserve gave out", memory);
  return growth->grow(bytes);
}

int32_t Growths::ready(uint64_t* bytes, const void* memory) const {
  FKV_REQUIRE(bytes != nullptr, FKV_BAD_ARGUMENT, "bytes: null");
  const std::shared_ptr<Growth> growth = find(memory);
  FKV_REQUIRE(growth != nullptr, FKV_BAD_ARGUMENT, "memory: %p is not what fkv_host_reserve gave out", memory);
  return growth->ready(bytes);
}

void Growths::clear() {
  std::map<const void*, std::shared_ptr<Growth>> taken;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    taken.swap(growths_);
  }
}

}  // namespace fkv
