// entry.h: what the runtimes of both libraries share: how an entry of the ABI runs, and what refuses during a capture.
#pragma once
#include <exception>
#include <new>
#include <string>
#include <thread>

#include "checks.h"

namespace fkv {

// Runs one entry of the ABI: nothing it allocates may throw through C.
template <class Body>
int32_t guarded(const Body& body) noexcept {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return fail(FKV_OUT_OF_MEMORY, "the host has no memory for this call");
  } catch (const std::exception& error) {
    return fail(FKV_DEVICE_FAILED, "%s", error.what());
  }
}

// FKV_BAD_ARGUMENT unless the handle begins with the magic word that live ones of its kind have.
template <class Handle>
int32_t check_magic(const Handle* handle, uint64_t magic, const char* what) {
  FKV_REQUIRE(handle != nullptr, FKV_BAD_ARGUMENT, "%s: null", what);
  FKV_REQUIRE(reinterpret_cast<uintptr_t>(handle) % alignof(Handle) == 0 && handle->magic == magic, FKV_BAD_ARGUMENT,
              "%s: not a live handle of this library", what);
  return FKV_OK;
}

// FKV_BAD_ARGUMENT unless the handle is alive.
int32_t check(const fkv_device* device);
int32_t check(const fkv_stream* stream);
int32_t check(const fkv_event* event);
int32_t check(const fkv_graph* graph);

// What of a capture decides whether a call is refused. The device's `issue` guards it.
struct CaptureState {
  std::thread::id thread;
  std::string broken{};  // why it can only be ended; empty while it is valid
  bool ended = false;
};

// FKV_CAPTURE for an operation that the capture does not allow, which breaks the capture.
inline int32_t break_capture(CaptureState& capture, const std::string& why) {
  if (capture.broken.empty()) capture.broken = why;
  return fail(FKV_CAPTURE, "not allowed during capture: %s; end the capture with fkv_capture_end", why.c_str());
}

// FKV_CAPTURE if the capture is broken.
inline int32_t check_capture(const CaptureState& capture) {
  FKV_REQUIRE(capture.broken.empty(), FKV_CAPTURE, "the capture is broken by %s; end it with fkv_capture_end",
              capture.broken.c_str());
  return FKV_OK;
}

// FKV_CAPTURE, and breaks those of `captures` that the calling thread has begun, if there are any.
template <class Captures>
int32_t break_own_captures(const Captures& captures, const char* call) {
  int32_t status = FKV_OK;
  for (const auto& capture : captures) {
    if (capture->thread == std::this_thread::get_id()) status = break_capture(*capture, call);
  }
  return status;
}

}  // namespace fkv
