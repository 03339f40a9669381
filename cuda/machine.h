// machine.h: how much memory this process may use.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>

#include "checks.h"

namespace fkv {

constexpr uint64_t kMostBytes = uint64_t{1} << 42;  // more than any machine has; twice it fits any address space

// The machine's memory, or less in a control group.
inline uint64_t machine_bytes() {
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  uint64_t bytes = pages > 0 && page > 0 ? static_cast<uint64_t>(pages) * static_cast<uint64_t>(page) : UINT64_MAX;
  if (std::FILE* file = std::fopen("/sys/fs/cgroup/memory.max", "re")) {
    unsigned long long limit;
    if (std::fscanf(file, "%llu", &limit) == 1 && limit > 0) bytes = std::min<uint64_t>(bytes, limit);
    std::fclose(file);
  }
  return std::min(bytes, kMostBytes);
}

// Whether `bytes` more are within a limit of `total`, and the FKV_OUT_OF_MEMORY that says they are not. kind: "pinned" or "device".
inline bool fits(uint64_t bytes, uint64_t used, uint64_t total) { return bytes <= total - std::min(used, total); }
inline int32_t over_limit(const char* kind, uint64_t bytes, uint64_t used, uint64_t total) {
  return fail(FKV_OUT_OF_MEMORY, "%llu bytes of %s memory: %llu of %llu are in use", static_cast<unsigned long long>(bytes), kind,
              static_cast<unsigned long long>(used), static_cast<unsigned long long>(total));
}

}  // namespace fkv
