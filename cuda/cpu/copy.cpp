// copy.cpp: copies, fills and small writes. Which memory each side is, and whether it is long enough, is checked at the
// call, and again when the operation runs: a graph may outlive the memory it names, and a device fails then, too.
// A copy engine is one thread, as on a device.
#include <algorithm>
#include <stdexcept>

#include "../checks_copy.h"
#include "rows.h"
#include "runtime.h"

using namespace fkv;

namespace {

struct Copy {
  char* dst;
  const char* src;
  uint64_t dst_pitch, src_pitch, width, height;

  uint64_t dst_bytes() const { return (height - 1) * dst_pitch + width; }
  uint64_t src_bytes() const { return (height - 1) * src_pitch + width; }
  void run() const {
    if (dst_pitch == width && src_pitch == width) {
      std::memcpy(dst, src, width * height);
      return;
    }
    for (uint64_t row = 0; row < height; ++row) std::memcpy(dst + row * dst_pitch, src + row * src_pitch, width);
  }
};

// Of a running operation: makes the device fail if the memory is gone.
void require_reachable(fkv_device* device, const void* memory, uint64_t bytes, const char* what) {
  Place place;
  if (device->memory.locate(&place, memory, bytes, what) != FKV_OK) throw std::runtime_error(fkv_last_error());
  if (place == Place::kPageable) throw std::runtime_error(std::string(what) + ": pinned memory that was given back");
}

// FKV_CAPTURE if the stream captures.
int32_t refuse_pageable(fkv_stream* stream, const char* side) {
  std::lock_guard<std::mutex> issue(stream->device->issue);
  if (!stream->capture) return FKV_OK;
  return break_capture(*stream->capture, std::string("a copy whose ") + side + " is pageable; use pinned memory");
}

int32_t launch_copy(const char* name, Copy copy, fkv_stream* stream) {
  fkv_device* device = stream->device;
  Place dst, src;
  if (const int32_t status = device->memory.locate(&dst, copy.dst, copy.dst_bytes(), "dst")) return status;
  if (const int32_t status = device->memory.locate(&src, copy.src, copy.src_bytes(), "src")) return status;
  if (dst == Place::kPageable) {
    if (const int32_t status = refuse_pageable(stream, "destination")) return status;
    return fail(FKV_BAD_ARGUMENT,
                "dst: a copy to pageable memory could not be asynchronous; copy to pinned memory (fkv_host_alloc, "
                "fkv_host_register) and read that once the stream is done");
  }
  std::shared_ptr<std::vector<char>> staged;
  if (src == Place::kPageable) {
    if (const int32_t status = refuse_pageable(stream, "source")) return status;
    staged = std::make_shared<std::vector<char>>(copy.width * copy.height);
    Copy{staged->data(), copy.src, copy.width, copy.src_pitch, copy.width, copy.height}.run();
    copy.src = staged->data();
    copy.src_pitch = copy.width;
  }
  const bool crosses = (dst == Place::kDevice) != (src == Place::kDevice);
  return launch(stream, name, [=](Context&) {
    require_reachable(device, copy.dst, copy.dst_bytes(), "dst");
    if (!staged) require_reachable(device, copy.src, copy.src_bytes(), "src");
    const uint64_t end = crosses ? device->link.begin(copy.width * copy.height, dst == Place::kDevice) : 0;
    copy.run();
    Link::finish(end);
  });
}

// The argument is memory that operations can reach, and `bytes` long.
int32_t check_reachable(fkv_stream* stream, const void* memory, uint64_t bytes, const char* what) {
  FKV_REQUIRE(memory != nullptr, FKV_BAD_ARGUMENT, "%s: null", what);
  Place place;
  if (const int32_t status = stream->device->memory.locate(&place, memory, bytes, what)) return status;
  FKV_REQUIRE(place != Place::kPageable, FKV_BAD_ARGUMENT, "%s: neither device nor pinned memory", what);
  return FKV_OK;
}

int32_t check_word(fkv_stream* stream, const uint64_t* word, const char* what) {
  if (const int32_t status = check_reachable(stream, word, sizeof *word, what)) return status;
  const uintptr_t address = reinterpret_cast<uintptr_t>(word);
  FKV_REQUIRE(address % alignof(uint64_t) == 0, FKV_BAD_ARGUMENT, "%s: not 8-byte aligned", what);
  return FKV_OK;
}

}  // namespace

int32_t fkv_memcpy_async(void* dst, const void* src, uint64_t bytes, fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(stream)) return status;
    if (const int32_t status = check_ends(dst, src)) return status;
    if (bytes == 0) return FKV_OK;
    if (const int32_t status = check_apart(dst, src, bytes)) return status;
    const Copy copy{static_cast<char*>(dst), static_cast<const char*>(src), bytes, bytes, bytes, 1};
    return launch_copy("fkv_memcpy_async", copy, stream);
  });
}

int32_t fkv_memcpy_2d_async(void* dst, uint64_t dst_pitch, const void* src, uint64_t src_pitch, uint64_t width,
                            uint64_t height, fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(stream)) return status;
    if (const int32_t status = check_ends(dst, src)) return status;
    if (width == 0 || height == 0) return FKV_OK;
    if (const int32_t status = check_pitches(dst_pitch, src_pitch, width, height)) return status;
    const Copy copy{static_cast<char*>(dst), static_cast<const char*>(src), dst_pitch, src_pitch, width, height};
    return launch_copy("fkv_memcpy_2d_async", copy, stream);
  });
}

int32_t fkv_memset_async(void* dst, int32_t value, uint64_t bytes, fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(stream)) return status;
    if (const int32_t status = check_reachable(stream, dst, bytes, "dst")) return status;
    if (bytes == 0) return FKV_OK;
    fkv_device* device = stream->device;
    return launch(stream, "fkv_memset_async", [=](Context&) {
      require_reachable(device, dst, bytes, "dst");
      std::memset(dst, value, bytes);
    });
  });
}

int32_t fkv_memset_2d_async(void* dst, uint64_t pitch, int32_t value, uint64_t width, uint64_t height,
                            fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(stream)) return status;
    if (const int32_t status = check_rows(pitch, width, height)) return status;
    const uint64_t bytes = width == 0 || height == 0 ? 0 : (height - 1) * pitch + width;
    if (const int32_t status = check_reachable(stream, dst, bytes, "dst")) return status;
    if (bytes == 0) return FKV_OK;
    fkv_device* device = stream->device;
    return launch(stream, "fkv_memset_2d_async", [=](Context&) {
      require_reachable(device, dst, bytes, "dst");
      for (uint64_t row = 0; row < height; ++row) std::memset(static_cast<char*>(dst) + row * pitch, value, width);
    });
  });
}

int32_t fkv_write_async(void* dst, const void* src, uint64_t bytes, fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(stream)) return status;
    if (const int32_t status = check_write(dst, src, bytes)) return status;
    Place to, from;
    if (const int32_t status = stream->device->memory.locate(&to, dst, bytes, "dst")) return status;
    if (const int32_t status = stream->device->memory.locate(&from, src, bytes, "src")) return status;
    FKV_REQUIRE(to == Place::kDevice, FKV_BAD_ARGUMENT, "dst: not device memory");
    FKV_REQUIRE(from != Place::kDevice, FKV_BAD_ARGUMENT, "src: device memory, which the host cannot read; use a copy");
    if (bytes == 0) return FKV_OK;
    const char* begin = static_cast<const char*>(src);
    const std::vector<char> data(begin, begin + bytes);
    fkv_device* device = stream->device;
    return launch(stream, "fkv_write_async", [=](Context&) {
      require_reachable(device, dst, data.size(), "dst");
      std::memcpy(dst, data.data(), data.size());
    });
  });
}

int32_t fkv_clock_start(uint64_t* mark, fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(stream)) return status;
    if (const int32_t status = check_word(stream, mark, "mark")) return status;
    fkv_device* device = stream->device;
    return launch(stream, "fkv_clock_start", [=](Context& context) {
      require_reachable(device, mark, sizeof *mark, "mark");
      *mark = context.clock_ns();
    });
  });
}

int32_t fkv_clock_stop(uint64_t* total, const uint64_t* mark, fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(stream)) return status;
    if (const int32_t status = check_word(stream, total, "total")) return status;
    if (const int32_t status = check_word(stream, mark, "mark")) return status;
    fkv_device* device = stream->device;
    return launch(stream, "fkv_clock_stop", [=](Context& context) {
      require_reachable(device, total, sizeof *total, "total");
      require_reachable(device, mark, sizeof *mark, "mark");
      *total += context.clock_ns() - *mark;
    });
  });
}
