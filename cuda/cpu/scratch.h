// scratch.h: work memory of one thread, kept between operations so that no step operation allocates once it has run at
// its size.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <new>

namespace fkv {

// Floats aligned to 64 bytes with undefined contents; grows, never shrinks. Declare it thread_local.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  float* floats(size_t n) {
    if (n > size_) {
      std::free(data_);
      size_ = 0;
      const size_t bytes = (n * sizeof(float) + 63) / 64 * 64;
      data_ = static_cast<float*>(std::aligned_alloc(64, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = n;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace fkv
