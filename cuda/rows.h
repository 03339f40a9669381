// rows.h: the shape of a fill in two dimensions.
#pragma once
#include <cstdint>

#include "checks.h"

namespace fkv {

// FKV_BAD_ARGUMENT unless `height` rows of `width` bytes, `pitch` apart, do not overlap and lie within an address space.
inline int32_t check_rows(uint64_t pitch, uint64_t width, uint64_t height) {
  FKV_REQUIRE(height <= 1 || pitch >= width, FKV_BAD_ARGUMENT, "pitch: rows of %llu bytes do not fit in it",
              static_cast<unsigned long long>(width));
  FKV_REQUIRE(width <= uint64_t{1} << 62 && (pitch == 0 || height <= (uint64_t{1} << 62) / pitch), FKV_BAD_ARGUMENT,
              "height: too many rows");
  return FKV_OK;
}

}  // namespace fkv
