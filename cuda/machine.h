// machine.h: how much memory this process may use.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>

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

}  // namespace fkv
