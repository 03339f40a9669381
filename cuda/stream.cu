// stream.cu: streams and events. CUDA takes a wait on an event that was never recorded for done; here it is refused, and so is what
// would cross the boundary of a capture.
#include <algorithm>
#include <chrono>
#include <map>

#include "runtime.cuh"

fkv::ComputeStream::~ComputeStream() {
  cudaStreamDestroy(handle);  // of the current device or not
  cudaGetLastError();
}

fkv_stream::~fkv_stream() {
  cudaStreamDestroy(own);
  cudaGetLastError();
  magic = 0;
}

fkv_event::~fkv_event() {
  cudaEventDestroy(handle);
  cudaGetLastError();
  magic = 0;
}

using namespace fkv;

namespace {

// The event may be asked about by the host.
int32_t check_recorded(fkv_event* event, const char* call) {
  if (const int32_t status = check(event)) return status;
  if (const int32_t status = ready(event->device, call)) return status;
  const std::lock_guard<std::mutex> issue(event->device->issue);
  if (event->capture && !event->capture->ended) {
    return break_capture(*event->capture, std::string(call) + " on an event recorded in the capture");
  }
  FKV_REQUIRE(!event->capture, FKV_CAPTURE,
              "%s: the event was last recorded in a capture, where it is only an edge of the graph; record it outside", call);
  FKV_REQUIRE(event->recorded, FKV_NOT_RECORDED, "%s: the event was never recorded", call);
  return FKV_OK;
}

int32_t query(bool* done, fkv_event* event, const char* call) {
  const Beside beside;
  const cudaError_t error = cudaEventQuery(event->handle);
  *done = error == cudaSuccess;
  if (error != cudaErrorNotReady) return status_of(event->device, error, call);
  cudaGetLastError();
  return FKV_OK;
}

// With `issue` held: whether a capturing stream may wait for the event.
int32_t check_wait_in_capture(fkv_event* event, fkv_stream* stream) {
  Capture& capture = *stream->capture;
  if (const int32_t status = check_capture(capture)) return status;
  if (event->capture == stream->capture) return FKV_OK;
  if (!event->capture && !event->recorded) {
    break_capture(capture, "a wait on an event that was never recorded");
    return fail(FKV_NOT_RECORDED, "fkv_stream_wait_event: the event was never recorded; the capture is broken");
  }
  if (event->capture && !event->capture->ended) {
    break_capture(*event->capture, "another capture waited on an event recorded in this one");
  }
  return break_capture(capture, "a wait on an event recorded outside the capture; record it inside");
}

// With `issue` held: whether the stream may join the capture in which the event was recorded.
int32_t check_join(const fkv_event* event) {
  FKV_REQUIRE(!event->capture->ended, FKV_CAPTURE,
              "fkv_stream_wait_event: the event was recorded inside a capture that has ended; record it outside");
  return check_capture(*event->capture);
}

int32_t check_pair(const fkv_event* event, const fkv_stream* stream, const char* call) {
  if (const int32_t status = check(event)) return status;
  if (const int32_t status = check(stream)) return status;
  FKV_REQUIRE(event->device == stream->device, FKV_BAD_ARGUMENT, "event and stream belong to different devices");
  return ready(stream->device, call);
}

// The compute stream of an ordinal. It lives as long as some fkv_device of the process uses it.
cudaError_t shared_compute(std::shared_ptr<ComputeStream>* shared, int ordinal) {
  static std::mutex mutex;
  static std::map<int, std::weak_ptr<ComputeStream>> streams;
  const std::lock_guard<std::mutex> lock(mutex);
  *shared = streams[ordinal].lock();
  if (*shared) return cudaSuccess;
  cudaStream_t made = nullptr;
  if (const cudaError_t error = cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking)) return error;
  *shared = std::make_shared<ComputeStream>(made);
  streams[ordinal] = *shared;
  return cudaSuccess;
}

// Waits until what the stream holds now is done. Refused while the stream captures.
int32_t synchronize(fkv_stream* stream, const char* call) {
  {
    const std::lock_guard<std::mutex> issue(stream->device->issue);
    if (stream->capture) return break_capture(*stream->capture, std::string(call) + " on a capturing stream");
  }
  if (const int32_t status = ready(stream->device, call)) return status;
  const Beside beside;
  return status_of(stream->device, cudaStreamSynchronize(stream->handle), call);
}

}  // namespace

int32_t fkv_stream_create(fkv_stream** stream, fkv_device* device) {
  return guarded([&]() -> int32_t {
    FKV_REQUIRE(stream != nullptr, FKV_BAD_ARGUMENT, "stream: null");
    if (const int32_t status = ready(device, "fkv_stream_create")) return status;
    cudaStream_t made = nullptr;
    const cudaError_t error = cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking);
    if (const int32_t status = status_of(device, error, "fkv_stream_create")) return status;
    auto owned = std::make_unique<fkv_stream>(device, made);
    *stream = owned.get();
    const std::lock_guard<std::mutex> issue(device->issue);
    device->streams.emplace(*stream, std::move(owned));
    return FKV_OK;
  });
}

int32_t fkv_stream_compute(fkv_stream** stream, fkv_device* device) {
  return guarded([&]() -> int32_t {
    constexpr const char* kCall = "fkv_stream_compute";
    FKV_REQUIRE(stream != nullptr, FKV_BAD_ARGUMENT, "stream: null");
    if (const int32_t status = ready(device, kCall)) return status;
    const std::lock_guard<std::mutex> issue(device->issue);
    if (device->compute != nullptr) {
      ++device->compute->uses;
      *stream = device->compute;
      return FKV_OK;
    }
    std::shared_ptr<ComputeStream> shared;
    if (const int32_t status = status_of(device, shared_compute(&shared, device->ordinal), kCall)) return status;
    cudaStream_t own = nullptr;
    const cudaError_t error = cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking);
    if (const int32_t status = status_of(device, error, kCall)) return status;
    auto made = std::make_unique<fkv_stream>(device, own);
    made->shared = std::move(shared);
    made->leave();
    *stream = device->compute = made.get();
    device->streams.emplace(*stream, std::move(made));
    return FKV_OK;
  });
}

int32_t fkv_stream_destroy_sync(fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(stream)) return status;
    fkv_device* device = stream->device;
    const int32_t status = synchronize(stream, "fkv_stream_destroy_sync");
    if (status != FKV_OK && status != FKV_DEVICE_FAILED) return status;
    const std::lock_guard<std::mutex> issue(device->issue);
    if (--stream->uses > 0) return FKV_OK;
    if (device->compute == stream) device->compute = nullptr;
    device->streams.erase(stream);
    return FKV_OK;
  });
}

int32_t fkv_stream_synchronize_sync(fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(stream)) return status;
    return synchronize(stream, "fkv_stream_synchronize_sync");
  });
}

int32_t fkv_stream_wait_event(fkv_event* event, fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check_pair(event, stream, "fkv_stream_wait_event")) return status;
    const std::lock_guard<std::mutex> issue(stream->device->issue);
    const bool joins = !stream->capture && event->capture;
    if (stream->capture) {
      if (const int32_t status = check_wait_in_capture(event, stream)) return status;
    } else if (joins) {
      if (const int32_t status = check_join(event)) return status;
    } else {
      FKV_REQUIRE(event->recorded, FKV_NOT_RECORDED, "fkv_stream_wait_event: the event was never recorded");
    }
    const cudaError_t error = cudaStreamWaitEvent(joins ? stream->own : stream->handle, event->handle, 0);
    if (const int32_t status = status_of(stream->device, error, "fkv_stream_wait_event")) return status;
    if (joins) {
      event->capture->streams.push_back(stream);
      stream->enter(event->capture);
    }
    return FKV_OK;
  });
}

int32_t fkv_event_create(fkv_event** event, fkv_device* device) {
  return guarded([&]() -> int32_t {
    FKV_REQUIRE(event != nullptr, FKV_BAD_ARGUMENT, "event: null");
    if (const int32_t status = ready(device, "fkv_event_create")) return status;
    cudaEvent_t made = nullptr;
    if (const int32_t status = status_of(device, cudaEventCreate(&made), "fkv_event_create")) return status;
    auto owned = std::make_unique<fkv_event>(device, made);
    *event = owned.get();
    const std::lock_guard<std::mutex> issue(device->issue);
    device->events.emplace(*event, std::move(owned));
    return FKV_OK;
  });
}

int32_t fkv_event_destroy(fkv_event* event) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(event)) return status;
    fkv_device* device = event->device;
    const std::lock_guard<std::mutex> issue(device->issue);
    device->events.erase(event);
    return FKV_OK;
  });
}

int32_t fkv_event_record(fkv_event* event, fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check_pair(event, stream, "fkv_event_record")) return status;
    const std::lock_guard<std::mutex> issue(stream->device->issue);
    if (stream->capture) {
      if (const int32_t status = check_capture(*stream->capture)) return status;
    }
    const cudaError_t error = cudaEventRecord(event->handle, stream->handle);
    if (const int32_t status = status_of(stream->device, error, "fkv_event_record")) return status;
    if (!stream->capture) event->recorded = true;
    event->capture = stream->capture;
    return FKV_OK;
  });
}

int32_t fkv_event_query(int32_t* done, fkv_event* event) {
  return guarded([&]() -> int32_t {
    FKV_REQUIRE(done != nullptr, FKV_BAD_ARGUMENT, "done: null");
    if (const int32_t status = check_recorded(event, "fkv_event_query")) return status;
    bool is_done = false;
    if (const int32_t status = query(&is_done, event, "fkv_event_query")) return status;
    *done = is_done ? 1 : 0;
    return FKV_OK;
  });
}

int32_t fkv_event_wait_sync(int32_t* done, fkv_event* event, uint64_t timeout_us) {
  return guarded([&]() -> int32_t {
    FKV_REQUIRE(done != nullptr, FKV_BAD_ARGUMENT, "done: null");
    *done = 0;
    if (const int32_t status = check_recorded(event, "fkv_event_wait_sync")) return status;
    using Clock = std::chrono::steady_clock;
    using Us = std::chrono::microseconds;
    constexpr uint64_t kLongestUs = uint64_t{1000} * 1000 * 3600 * 24 * 365;  // the clock counts no further than a few centuries
    const auto start = Clock::now(), end = start + Us(std::min(timeout_us, kLongestUs));
    for (auto sleep = Us(10);;) {
      bool is_done = false;
      if (const int32_t status = query(&is_done, event, "fkv_event_wait_sync")) return status;
      if (is_done) {
        *done = 1;
        return FKV_OK;
      }
      const auto now = Clock::now();
      if (now >= end) return FKV_OK;
      if (now < start + Us(20)) continue;  // mostly it is nearly there, and a sleep takes longer
      std::this_thread::sleep_for(std::min<Clock::duration>(sleep, end - now));
      sleep = std::min(2 * sleep, Us(200));
    }
  });
}

int32_t fkv_event_elapsed_ms(float* ms, fkv_event* start, fkv_event* end) {
  return guarded([&]() -> int32_t {
    FKV_REQUIRE(ms != nullptr, FKV_BAD_ARGUMENT, "ms: null");
    constexpr const char* kCall = "fkv_event_elapsed_ms";
    if (const int32_t status = check_recorded(start, kCall)) return status;
    if (const int32_t status = check_recorded(end, kCall)) return status;
    FKV_REQUIRE(start->device == end->device, FKV_BAD_ARGUMENT, "the events belong to different devices");
    bool started = false, ended = false;
    if (const int32_t status = query(&started, start, kCall)) return status;
    if (const int32_t status = query(&ended, end, kCall)) return status;
    FKV_REQUIRE(started && ended, FKV_BAD_ARGUMENT, "%s: %s has not completed; wait for it first", kCall, started ? "end" : "start");
    if (start == end) {
      *ms = 0;
      return FKV_OK;
    }
    return status_of(start->device, cudaEventElapsedTime(ms, start->handle, end->handle), kCall);
  });
}
