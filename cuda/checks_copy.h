// checks_copy.h: what copies refuse whatever memory they are of, on the twin and on CUDA alike.
#pragma once
#include <algorithm>
#include <cstdint>

#include "checks.h"

namespace fkv {

// That one fkv_write_async can carry.
constexpr uint64_t kWriteBytes = 3072;

inline int32_t check_ends(const void* dst, const void* src) {
  FKV_REQUIRE(dst != nullptr && src != nullptr, FKV_BAD_ARGUMENT, "%s: null", dst ? "src" : "dst");
  return FKV_OK;
}

inline int32_t check_apart(const void* dst, const void* src, uint64_t bytes) {
  const uintptr_t to = reinterpret_cast<uintptr_t>(dst), from = reinterpret_cast<uintptr_t>(src);
  FKV_REQUIRE((to < from ? from - to : to - from) >= bytes, FKV_BAD_ARGUMENT, "dst and src overlap");
  return FKV_OK;
}

// `height` and `width` are not 0.
inline int32_t check_pitches(uint64_t dst_pitch, uint64_t src_pitch, uint64_t width, uint64_t height) {
  FKV_REQUIRE(dst_pitch >= width && src_pitch >= width, FKV_BAD_ARGUMENT, "%s: rows of %llu bytes do not fit in it",
              dst_pitch < width ? "dst_pitch" : "src_pitch", static_cast<unsigned long long>(width));
  FKV_REQUIRE(height <= (uint64_t{1} << 62) / std::max(dst_pitch, src_pitch), FKV_BAD_ARGUMENT, "height: too many rows");
  return FKV_OK;
}

inline int32_t check_write(const void* dst, const void* src, uint64_t bytes) {
  if (const int32_t status = check_ends(dst, src)) return status;
  FKV_REQUIRE(bytes <= kWriteBytes, FKV_BAD_ARGUMENT, "bytes: %llu, more than the 3072 that one call can carry",
              static_cast<unsigned long long>(bytes));
  return FKV_OK;
}

}  // namespace fkv
