// arena.h: the device's memory, pinned memory, and which of them an address belongs to.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>

#include "../growth.h"

namespace fkv {

enum class Place { kDevice, kPinned, kPageable };

// Errors are set by fail(); every function may be called from any thread.
class Memory {
 public:
  Memory();
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  int32_t device_alloc(void** memory, uint64_t bytes);
  int32_t device_free(void* memory);
  int32_t host_alloc(void** memory, uint64_t bytes);
  int32_t host_free(void* memory);
  int32_t host_reserve(void** memory, uint64_t bytes, uint64_t piece_bytes);
  const Growths& growths() const { return growths_; }
  int32_t host_register(void* memory, uint64_t bytes);
  int32_t host_unregister(void* memory);

  // Where `bytes` at `memory` lie. BAD_ARGUMENT if they run past the end of an allocation, or lie where the device has
  // none. `what` names the argument in the error.
  int32_t locate(Place* place, const void* memory, uint64_t bytes, const char* what) const;

  struct Usage {
    uint64_t total, allocated, pinned;
  };
  Usage usage() const;

 private:
  enum class Kind { kDevice, kAllocated, kRegistered, kGrown };
  struct Range {
    uint64_t bytes;
    Kind kind;
  };
  using Ranges = std::map<uintptr_t, Range>;
  int32_t take_out(void* memory, Kind kind, const char* what, Range* range);
  int32_t add_piece(char* piece, uint64_t bytes);
  void drop_piece(char* piece);
  void give_back_pages(uintptr_t start, uint64_t bytes);

  mutable std::mutex mutex_;
  Ranges ranges_;
  // Device memory is cut from one reserved stretch of address space, so that an address in it is never mistaken for the
  // host's, also after it was freed.
  uintptr_t arena_ = 0;
  uint64_t arena_bytes_ = 0;
  std::map<uintptr_t, uint64_t> free_;  // start → bytes, in pages, never adjacent
  uint64_t total_ = 0, allocated_ = 0, pinned_ = 0;
  Growths growths_;
};

}  // namespace fkv
