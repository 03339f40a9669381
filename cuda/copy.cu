// copy.cu: copies, fills, small writes and the device's clock. Which memory each side is, and whether it is long enough, is checked at
// the call. CUDA copies between two pinned places on the calling thread, and fills device memory only; those are kernels here, so that
// they too wait their turn in the stream and can be captured.
//
// floor: a copy between device and pinned memory is the copy engine's: 54 GB/s each way on an H100. The kernels here move single words
// and small buffers; none is on a step's critical path.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "checks_copy.h"
#include "common.cuh"

namespace fkv {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1024;

struct Copy {
  char* dst;
  const char* src;
  uint64_t dst_pitch, src_pitch, width, height;

  uint64_t dst_bytes() const { return (height - 1) * dst_pitch + width; }
  uint64_t src_bytes() const { return (height - 1) * src_pitch + width; }
};

// The bytes of one fkv_write_async, inside the launch itself.
struct alignas(16) Carried {
  unsigned char bytes[kWriteBytes];
};

__global__ void __launch_bounds__(kThreads) copy_kernel(Copy copy) {
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * kThreads;
  for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x; i < copy.width * copy.height; i += stride) {
    const uint64_t row = i / copy.width, at = i % copy.width;
    copy.dst[row * copy.dst_pitch + at] = copy.src[row * copy.src_pitch + at];
  }
}

__global__ void __launch_bounds__(kThreads) fill_kernel(unsigned char* dst, unsigned char value, uint64_t bytes) {
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * kThreads;
  for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x; i < bytes; i += stride) dst[i] = value;
}

// 16 bytes a thread where dst is aligned to them, then single bytes.
__global__ void __launch_bounds__(kThreads) write_kernel(unsigned char* dst, const __grid_constant__ Carried carried, int bytes) {
  const int words = reinterpret_cast<uintptr_t>(dst) % 16 == 0 ? bytes / 16 : 0;
  for (int i = threadIdx.x; i < words; i += kThreads) {
    reinterpret_cast<uint4*>(dst)[i] = reinterpret_cast<const uint4*>(carried.bytes)[i];
  }
  for (int i = words * 16 + threadIdx.x; i < bytes; i += kThreads) dst[i] = carried.bytes[i];
}

__global__ void clock_start_kernel(uint64_t* mark) { *mark = clock_ns(); }
__global__ void clock_stop_kernel(uint64_t* total, const uint64_t* mark) { *total += clock_ns() - *mark; }

int blocks_for(uint64_t bytes) {
  return static_cast<int>(std::min<int64_t>(kMostBlocks, divide_up(static_cast<int64_t>(bytes), kThreads)));
}

// Whether this process can read the byte there: a freed device address is not the host's to read, and reading it would be a crash.
// A pipe asks the system, which answers with an error instead.
bool readable(const void* memory) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return true;
  const bool taken = write(ends[1], memory, 1) == 1;
  close(ends[0]);
  close(ends[1]);
  return taken;
}

int32_t require_readable(const char* memory, uint64_t bytes) {
  FKV_REQUIRE(readable(memory) && readable(memory + bytes - 1), FKV_BAD_ARGUMENT,
              "src: no device allocation at %p; it was freed, or the address is wrong", static_cast<const void*>(memory));
  return FKV_OK;
}

// FKV_CAPTURE if the stream captures.
int32_t refuse_pageable(fkv_stream* stream, const char* side) {
  const std::lock_guard<std::mutex> issue(stream->device->issue);
  if (!stream->capture) return FKV_OK;
  return break_capture(*stream->capture, std::string("a copy whose ") + side + " is pageable; use pinned memory");
}

int32_t launch_copy(const char* call, const Copy& copy, fkv_stream* stream) {
  const Ledger& ledger = stream->device->ledger;
  Place dst, src;
  if (const int32_t status = ledger.locate(&dst, copy.dst, copy.dst_bytes(), "dst")) return status;
  if (const int32_t status = ledger.locate(&src, copy.src, copy.src_bytes(), "src")) return status;
  if (dst == Place::kPageable) {
    if (const int32_t status = refuse_pageable(stream, "destination")) return status;
    return fail(FKV_BAD_ARGUMENT,
                "dst: a copy to pageable memory could not be asynchronous; copy to pinned memory (fkv_host_alloc, "
                "fkv_host_register) and read that once the stream is done");
  }
  if (src == Place::kPageable) {
    if (const int32_t status = refuse_pageable(stream, "source")) return status;
    if (const int32_t status = require_readable(copy.src, copy.src_bytes())) return status;
  }
  if (dst == Place::kPinned && src != Place::kDevice) {
    if (src == Place::kPageable) {
      // Kernels cannot read it: by way of a copy of it that they can, which is the stream's to wait for.
      if (const int32_t status = status_of(stream->device, cudaStreamSynchronize(stream->handle), call)) return status;
      for (uint64_t row = 0; row < copy.height; ++row) {
        std::memcpy(copy.dst + row * copy.dst_pitch, copy.src + row * copy.src_pitch, copy.width);
      }
      return FKV_OK;
    }
    copy_kernel<<<blocks_for(copy.width * copy.height), kThreads, 0, stream->handle>>>(copy);
    return launched(stream, call);
  }
  const cudaMemcpyKind kind = dst == Place::kPinned   ? cudaMemcpyDeviceToHost
                              : src == Place::kDevice ? cudaMemcpyDeviceToDevice
                                                      : cudaMemcpyHostToDevice;
  const bool flat = copy.height == 1 || (copy.dst_pitch == copy.width && copy.src_pitch == copy.width);
  const cudaError_t error = flat ? cudaMemcpyAsync(copy.dst, copy.src, copy.width * copy.height, kind, stream->handle)
                                 : cudaMemcpy2DAsync(copy.dst, copy.dst_pitch, copy.src, copy.src_pitch, copy.width, copy.height,
                                                     kind, stream->handle);
  return status_of(stream->device, error, call);
}

// The argument is memory that operations can reach, and `bytes` long.
int32_t check_reachable(fkv_stream* stream, const void* memory, uint64_t bytes, const char* what, Place* place) {
  FKV_REQUIRE(memory != nullptr, FKV_BAD_ARGUMENT, "%s: null", what);
  if (const int32_t status = stream->device->ledger.locate(place, memory, bytes, what)) return status;
  FKV_REQUIRE(*place != Place::kPageable, FKV_BAD_ARGUMENT, "%s: neither device nor pinned memory", what);
  return FKV_OK;
}

int32_t check_word(fkv_stream* stream, const uint64_t* word, const char* what) {
  Place place;
  if (const int32_t status = check_reachable(stream, word, sizeof *word, what, &place)) return status;
  FKV_REQUIRE(reinterpret_cast<uintptr_t>(word) % alignof(uint64_t) == 0, FKV_BAD_ARGUMENT, "%s: not 8-byte aligned", what);
  return FKV_OK;
}

}  // namespace
}  // namespace fkv

using namespace fkv;

int32_t fkv_memcpy_async(void* dst, const void* src, uint64_t bytes, fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = ready(stream, "fkv_memcpy_async")) return status;
    if (const int32_t status = check_ends(dst, src)) return status;
    if (bytes == 0) return FKV_OK;
    if (const int32_t status = check_apart(dst, src, bytes)) return status;
    const Copy copy{static_cast<char*>(dst), static_cast<const char*>(src), bytes, bytes, bytes, 1};
    return launch_copy("fkv_memcpy_async", copy, stream);
  });
}

int32_t fkv_memcpy_2d_async(void* dst, uint64_t dst_pitch, const void* src, uint64_t src_pitch, uint64_t width, uint64_t height,
                            fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = ready(stream, "fkv_memcpy_2d_async")) return status;
    if (const int32_t status = check_ends(dst, src)) return status;
    if (width == 0 || height == 0) return FKV_OK;
    if (const int32_t status = check_pitches(dst_pitch, src_pitch, width, height)) return status;
    const Copy copy{static_cast<char*>(dst), static_cast<const char*>(src), dst_pitch, src_pitch, width, height};
    return launch_copy("fkv_memcpy_2d_async", copy, stream);
  });
}

int32_t fkv_memset_async(void* dst, int32_t value, uint64_t bytes, fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = ready(stream, "fkv_memset_async")) return status;
    Place place;
    if (const int32_t status = check_reachable(stream, dst, bytes, "dst", &place)) return status;
    if (bytes == 0) return FKV_OK;
    if (place == Place::kDevice) {
      return status_of(stream->device, cudaMemsetAsync(dst, value, bytes, stream->handle), "fkv_memset_async");
    }
    fill_kernel<<<blocks_for(bytes), kThreads, 0, stream->handle>>>(static_cast<unsigned char*>(dst),
                                                                   static_cast<unsigned char>(value), bytes);
    return launched(stream, "fkv_memset_async");
  });
}

int32_t fkv_write_async(void* dst, const void* src, uint64_t bytes, fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = ready(stream, "fkv_write_async")) return status;
    if (const int32_t status = check_write(dst, src, bytes)) return status;
    Place to, from;
    if (const int32_t status = stream->device->ledger.locate(&to, dst, bytes, "dst")) return status;
    if (const int32_t status = stream->device->ledger.locate(&from, src, bytes, "src")) return status;
    FKV_REQUIRE(to == Place::kDevice, FKV_BAD_ARGUMENT, "dst: not device memory");
    FKV_REQUIRE(from != Place::kDevice, FKV_BAD_ARGUMENT, "src: device memory, which the host cannot read; use a copy");
    if (bytes == 0) return FKV_OK;
    Carried carried;
    std::memcpy(carried.bytes, src, bytes);
    write_kernel<<<1, kThreads, 0, stream->handle>>>(static_cast<unsigned char*>(dst), carried, static_cast<int>(bytes));
    return launched(stream, "fkv_write_async");
  });
}

int32_t fkv_clock_start(uint64_t* mark, fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = ready(stream, "fkv_clock_start")) return status;
    if (const int32_t status = check_word(stream, mark, "mark")) return status;
    clock_start_kernel<<<1, 1, 0, stream->handle>>>(mark);
    return launched(stream, "fkv_clock_start");
  });
}

int32_t fkv_clock_stop(uint64_t* total, const uint64_t* mark, fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = ready(stream, "fkv_clock_stop")) return status;
    if (const int32_t status = check_word(stream, total, "total")) return status;
    if (const int32_t status = check_word(stream, mark, "mark")) return status;
    clock_stop_kernel<<<1, 1, 0, stream->handle>>>(total, mark);
    return launched(stream, "fkv_clock_stop");
  });
}
