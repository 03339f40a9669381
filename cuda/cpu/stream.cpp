// stream.cpp: a stream is a queue and, without a schedule seed, a thread that empties it in order.
#include <algorithm>

#include "runtime.h"

namespace fkv {

void enqueue(fkv_stream* stream, Op op) {
  {
    std::lock_guard<std::mutex> lock(stream->mutex);
    stream->queue.push_back(std::move(op));
    stream->pending.fetch_add(1);
  }
  stream->arrived.notify();
}

void execute(fkv_stream* stream, Op& op) {
  switch (op.kind) {
    case Op::Kind::kWork:
      stream->device->run(op.name, op.work);
      break;
    case Op::Kind::kRecord:
      op.record->complete();
      break;
    case Op::Kind::kWait:
      op.record->signal.wait([&] { return op.record->is_done(); }, kSpinNs);
      break;
    case Op::Kind::kGraph:
      replay(stream, op.graph);
      break;
  }
}

int32_t launch(fkv_stream* stream, const char* name, Work work) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(stream)) return status;
    if (const int32_t status = stream->device->check_failure()) return status;
    std::lock_guard<std::mutex> issue(stream->device->issue);
    if (!stream->capture) {
      enqueue(stream, {Op::Kind::kWork, name, std::move(work)});
      return FKV_OK;
    }
    if (const int32_t status = check_capture(*stream->capture)) return status;
    std::vector<GraphNode>& nodes = stream->capture->nodes;
    nodes.push_back({name, std::move(work), stream->lane, std::move(stream->frontier)});
    stream->frontier = {static_cast<int>(nodes.size()) - 1};
    return FKV_OK;
  });
}

int32_t await_record(fkv_device* device, Record& record) {
  if (device->schedule) {
    if (!device->schedule->run_until(record)) {
      return fail(FKV_DEVICE_FAILED, "deadlock: nothing that is queued can run, and what is waited for is not done");
    }
  } else {
    record.signal.wait([&] { return record.is_done(); }, kSpinNs / 2);
  }
  return device->check_failure();
}

int32_t drain(fkv_device* device) {
  std::vector<std::shared_ptr<Record>> records;
  {
    std::lock_guard<std::mutex> issue(device->issue);
    for (const auto& stream : device->streams) {
      if (stream->pending.load() == 0) continue;
      records.push_back(std::make_shared<Record>());
      enqueue(stream.get(), {Op::Kind::kRecord, "", {}, records.back()});
    }
  }
  int32_t status = device->check_failure();
  for (const auto& record : records) {
    if (const int32_t awaited = await_record(device, *record)) status = awaited;
  }
  return status;
}

}  // namespace fkv

fkv_stream::fkv_stream(fkv_device* owner, uint32_t number) : device(owner), id(number) {
  if (!device->schedule) worker = fkv::start_thread([this] { work(); });
}

fkv_stream::~fkv_stream() {
  stopping.store(true);
  arrived.notify();
  if (worker.joinable()) worker.join();
  magic = 0;
}

void fkv_stream::work() {
  for (;;) {
    arrived.wait([this] { return pending.load() > 0 || stopping.load(); }, fkv::kSpinNs);
    if (pending.load() == 0) return;
    {
      fkv::Op op{};
      {
        std::lock_guard<std::mutex> lock(mutex);
        op = std::move(queue.front());
        queue.pop_front();
      }
      fkv::execute(this, op);
    }
    pending.fetch_sub(1);  // after the operation and what it owns are gone
  }
}

using namespace fkv;

namespace {

// Waits until what the stream holds now is done. Refused while the stream captures.
int32_t synchronize(fkv_stream* stream, const char* call) {
  const auto record = std::make_shared<Record>();
  {
    std::lock_guard<std::mutex> issue(stream->device->issue);
    if (stream->capture) return break_capture(*stream->capture, std::string(call) + " on a capturing stream");
    enqueue(stream, {Op::Kind::kRecord, "", {}, record});
  }
  return await_record(stream->device, *record);
}

}  // namespace

int32_t fkv_stream_create(fkv_stream** stream, fkv_device* device) {
  return guarded([&]() -> int32_t {
    FKV_REQUIRE(stream != nullptr, FKV_BAD_ARGUMENT, "stream: null");
    if (const int32_t status = check(device)) return status;
    if (const int32_t status = device->check_failure()) return status;
    std::lock_guard<std::mutex> issue(device->issue);
    device->streams.push_back(std::make_unique<fkv_stream>(device, device->streams_made++));
    *stream = device->streams.back().get();
    return FKV_OK;
  });
}

int32_t fkv_stream_compute(fkv_stream** stream, fkv_device* device) {
  return guarded([&]() -> int32_t {
    FKV_REQUIRE(stream != nullptr, FKV_BAD_ARGUMENT, "stream: null");
    if (const int32_t status = check(device)) return status;
    if (const int32_t status = device->check_failure()) return status;
    std::lock_guard<std::mutex> issue(device->issue);
    if (device->compute != nullptr) {
      ++device->compute->uses;
    } else {
      device->streams.push_back(std::make_unique<fkv_stream>(device, device->streams_made++));
      device->compute = device->streams.back().get();
    }
    *stream = device->compute;
    return FKV_OK;
  });
}

int32_t fkv_stream_destroy_sync(fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(stream)) return status;
    fkv_device* device = stream->device;
    const int32_t status = synchronize(stream, "fkv_stream_destroy_sync");
    if (status != FKV_OK && status != FKV_DEVICE_FAILED) return status;
    std::unique_ptr<fkv_stream> owned;
    {
      std::lock_guard<std::mutex> issue(device->issue);
      if (--stream->uses > 0) return FKV_OK;
      if (device->compute == stream) device->compute = nullptr;
      const auto found = std::find_if(device->streams.begin(), device->streams.end(),
                                      [&](const auto& candidate) { return candidate.get() == stream; });
      owned = std::move(*found);
      device->streams.erase(found);
    }
    return FKV_OK;
  });
}

int32_t fkv_stream_synchronize_sync(fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(stream)) return status;
    return synchronize(stream, "fkv_stream_synchronize_sync");
  });
}
