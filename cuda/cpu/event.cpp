// event.cpp: events point at their latest record; who waits keeps the record that was latest when it asked.
#include "runtime.h"

using namespace fkv;

namespace {

// The record that the host may ask about.
int32_t latest_record(std::shared_ptr<Record>* record, fkv_event* event, const char* call) {
  if (const int32_t status = check(event)) return status;
  if (const int32_t status = event->device->check_failure()) return status;
  std::lock_guard<std::mutex> issue(event->device->issue);
  if (event->capture && !event->capture->ended) {
    return break_capture(*event->capture, std::string(call) + " on an event recorded in the capture");
  }
  FKV_REQUIRE(!event->capture, FKV_CAPTURE,
              "%s: the event was last recorded in a capture, where it is only an edge of the graph; record it outside",
              call);
  FKV_REQUIRE(event->record != nullptr, FKV_NOT_RECORDED, "%s: the event was never recorded", call);
  *record = event->record;
  return FKV_OK;
}

// With `issue` held: a wait of a capturing stream.
int32_t wait_in_capture(fkv_event* event, fkv_stream* stream) {
  Capture& capture = *stream->capture;
  if (const int32_t status = check_capture(capture)) return status;
  if (event->capture == stream->capture) {
    add_frontier(stream, event->frontier);
    return FKV_OK;
  }
  if (!event->capture && !event->record) {
    break_capture(capture, "a wait on an event that was never recorded");
    return fail(FKV_NOT_RECORDED, "fkv_stream_wait_event: the event was never recorded; the capture is broken");
  }
  if (event->capture && !event->capture->ended) {
    break_capture(*event->capture, "another capture waited on an event recorded in this one");
  }
  return break_capture(capture, "a wait on an event recorded outside the capture; record it inside");
}

// With `issue` held: the stream joins the capture in which the event was recorded.
int32_t join_capture(fkv_event* event, fkv_stream* stream) {
  FKV_REQUIRE(!event->capture->ended, FKV_CAPTURE,
              "fkv_stream_wait_event: the event was recorded inside a capture that has ended; record it outside");
  if (const int32_t status = check_capture(*event->capture)) return status;
  event->capture->streams.push_back(stream);
  stream->lane = static_cast<int>(event->capture->streams.size()) - 1;
  stream->frontier = event->frontier;
  stream->capture = event->capture;
  return FKV_OK;
}

int32_t check_pair(const fkv_event* event, const fkv_stream* stream) {
  if (const int32_t status = check(event)) return status;
  if (const int32_t status = check(stream)) return status;
  FKV_REQUIRE(event->device == stream->device, FKV_BAD_ARGUMENT, "event and stream belong to different devices");
  return stream->device->check_failure();
}

}  // namespace

int32_t fkv_stream_wait_event(fkv_event* event, fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check_pair(event, stream)) return status;
    std::lock_guard<std::mutex> issue(stream->device->issue);
    if (stream->capture) return wait_in_capture(event, stream);
    if (event->capture) return join_capture(event, stream);
    FKV_REQUIRE(event->record != nullptr, FKV_NOT_RECORDED, "fkv_stream_wait_event: the event was never recorded");
    if (!event->record->is_done()) enqueue(stream, {Op::Kind::kWait, "", {}, event->record});
    return FKV_OK;
  });
}

int32_t fkv_event_create(fkv_event** event, fkv_device* device) {
  return guarded([&]() -> int32_t {
    FKV_REQUIRE(event != nullptr, FKV_BAD_ARGUMENT, "event: null");
    if (const int32_t status = check(device)) return status;
    auto made = std::make_unique<fkv_event>(device);
    fkv_event* handle = made.get();
    std::lock_guard<std::mutex> issue(device->issue);
    device->events.emplace(handle, std::move(made));
    *event = handle;
    return FKV_OK;
  });
}

int32_t fkv_event_destroy(fkv_event* event) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(event)) return status;
    fkv_device* device = event->device;
    std::lock_guard<std::mutex> issue(device->issue);
    device->events.erase(event);
    return FKV_OK;
  });
}

int32_t fkv_event_record(fkv_event* event, fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check_pair(event, stream)) return status;
    std::lock_guard<std::mutex> issue(stream->device->issue);
    if (stream->capture) {
      if (const int32_t status = check_capture(*stream->capture)) return status;
      event->frontier = stream->frontier;
    } else {
      event->record = std::make_shared<Record>();
      enqueue(stream, {Op::Kind::kRecord, "", {}, event->record});
    }
    event->capture = stream->capture;
    return FKV_OK;
  });
}

int32_t fkv_event_query(int32_t* done, fkv_event* event) {
  return guarded([&]() -> int32_t {
    FKV_REQUIRE(done != nullptr, FKV_BAD_ARGUMENT, "done: null");
    std::shared_ptr<Record> record;
    if (const int32_t status = latest_record(&record, event, "fkv_event_query")) return status;
    if (event->device->schedule) event->device->schedule->run_some();
    *done = record->is_done() ? 1 : 0;
    return event->device->check_failure();
  });
}

int32_t fkv_event_wait_sync(int32_t* done, fkv_event* event, uint64_t timeout_us) {
  return guarded([&]() -> int32_t {
    FKV_REQUIRE(done != nullptr, FKV_BAD_ARGUMENT, "done: null");
    std::shared_ptr<Record> record;
    if (const int32_t status = latest_record(&record, event, "fkv_event_wait_sync")) return status;
    *done = 0;
    fkv_device* device = event->device;
    if (device->schedule) {
      // Time is the schedule's, not the clock's: an answer that depended on the clock would not be deterministic.
      if (const int32_t status = await_record(device, *record)) return status;
    } else {
      const uint64_t now = now_ns();
      const uint64_t deadline = timeout_us > (kForever - now) / 1000 - 1 ? kForever : now + timeout_us * 1000;
      if (!record->signal.wait([&] { return record->is_done(); }, 0, deadline)) return device->check_failure();
    }
    *done = 1;
    return device->check_failure();
  });
}

int32_t fkv_event_elapsed_ms(float* ms, fkv_event* start, fkv_event* end) {
  return guarded([&]() -> int32_t {
    FKV_REQUIRE(ms != nullptr, FKV_BAD_ARGUMENT, "ms: null");
    std::shared_ptr<Record> from, to;
    if (const int32_t status = latest_record(&from, start, "fkv_event_elapsed_ms")) return status;
    if (const int32_t status = latest_record(&to, end, "fkv_event_elapsed_ms")) return status;
    FKV_REQUIRE(start->device == end->device, FKV_BAD_ARGUMENT, "the events belong to different devices");
    FKV_REQUIRE(from->is_done() && to->is_done(), FKV_BAD_ARGUMENT,
                "fkv_event_elapsed_ms: %s has not completed; wait for it first", from->is_done() ? "end" : "start");
    *ms = static_cast<float>((static_cast<double>(to->time_ns) - static_cast<double>(from->time_ns)) * 1e-6);
    return FKV_OK;
  });
}
