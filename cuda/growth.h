// growth.h: host memory that grows where it lies: address space for all of it at once, and a thread that has pieces of it pinned,
// so that whoever needs more does not wait for the pinning of it. Shared by both libraries; what pinning is, each of them says.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

namespace fkv {

class Growth {
 public:
  // Both get a piece that the process may read and write; `pin` answers with a status, and a text by fail().
  struct Pinning {
    std::function<int32_t(char* piece, uint64_t bytes)> pin;
    std::function<void(char* piece, uint64_t bytes)> unpin;
  };
  // Address space for `bytes`. piece_bytes: a multiple of 4096. FKV_OUT_OF_MEMORY where there is none.
  static int32_t reserve(std::unique_ptr<Growth>* growth, uint64_t bytes, uint64_t piece_bytes, Pinning pinning);
  // Waits for the piece that is being pinned, and gives everything back.
  ~Growth();
  Growth(const Growth&) = delete;
  Growth& operator=(const Growth&) = delete;

  char* memory() const { return memory_; }
  uint64_t bytes() const { return bytes_; }
  // Asks for the first `bytes`; returns at once.
  int32_t grow(uint64_t bytes);
  // How much is pinned; fails where pinning has failed, which ends the growth for good.
  int32_t ready(uint64_t* bytes) const;

 private:
  Growth(char* memory, uint64_t bytes, uint64_t piece_bytes, Pinning pinning);
  void run();
  int32_t add(uint64_t at);
  uint64_t piece_at(uint64_t at) const { return bytes_ - at < piece_bytes_ ? bytes_ - at : piece_bytes_; }

  char* const memory_;
  const uint64_t bytes_, piece_bytes_;
  const Pinning pinning_;
  mutable std::mutex mutex_{};  // guards what follows
  std::condition_variable asked_{};
  uint64_t wanted_ = 0, ready_ = 0;
  bool stopping_ = false;
  int32_t status_ = 0;  // of the piece that could not be pinned
  std::string text_{};
  std::thread thread_{};  // started by the first grow()
};

// Those of one device, by their first byte.
class Growths {
 public:
  void add(std::unique_ptr<Growth> growth);
  // Null: there is none.
  std::shared_ptr<Growth> find(const void* memory) const;
  std::shared_ptr<Growth> take_out(const void* memory);
  // FKV_BAD_ARGUMENT where `bytes` at `memory` touch what is reserved. For ranges that are known not to be pinned.
  int32_t require_none(const void* memory, uint64_t bytes, const char* what) const;
  int32_t grow(const void* memory, uint64_t bytes) const;
  int32_t ready(uint64_t* bytes, const void* memory) const;
  void clear();

 private:
  mutable std::mutex mutex_{};
  std::map<const void*, std::shared_ptr<Growth>> growths_{};
};

}  // namespace fkv
