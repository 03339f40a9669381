// device.cpp: opens and closes devices, runs operations, keeps a device's failure.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "runtime.h"

namespace fkv {

void DeviceContext::parallel(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  device_->pool.parallel(n, grain, body);
}

void DeviceContext::link(uint64_t bytes, bool to_device) { Link::finish(device_->link.begin(bytes, to_device)); }

namespace {

int compute_threads(int32_t wanted) {
  return wanted > 0 ? wanted : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace

int32_t check(const fkv_device* device) { return check_magic(device, kDeviceMagic, "device"); }
int32_t check(const fkv_stream* stream) { return check_magic(stream, kStreamMagic, "stream"); }
int32_t check(const fkv_event* event) { return check_magic(event, kEventMagic, "event"); }
int32_t check(const fkv_graph* graph) { return check_magic(graph, kGraphMagic, "graph"); }

}  // namespace fkv

fkv_device::fkv_device(const fkv_device_params& given)
    : params(given), link(given.link_bytes_per_second), pool(fkv::compute_threads(given.threads)) {
  if (params.schedule_seed != 0) schedule = std::make_unique<fkv::Schedule>(this, params.schedule_seed);
}

fkv_device::~fkv_device() {
  streams.clear();  // their threads use the rest
  magic = 0;
}

void fkv_device::run(const char* name, const fkv::Work& work) noexcept {
  if (failed.load()) return;
  const char* reason = "an unknown exception";
  std::exception_ptr held;
  try {
    work(context);
    return;
  } catch (const std::exception& error) {
    held = std::current_exception();
    reason = error.what();
  } catch (...) {
  }
  std::lock_guard<std::mutex> lock(failure_mutex);
  if (failed.load()) return;  // another stream's was first
  failure = std::string(name) + ": " + reason;
  failed.store(true);
}

int32_t fkv_device::check_failure() {
  if (!failed.load()) return FKV_OK;
  failure_told.store(true);
  std::lock_guard<std::mutex> lock(failure_mutex);
  return fkv::fail(FKV_DEVICE_FAILED, "an operation failed, and the device with it: %s", failure.c_str());
}

using namespace fkv;

const char* fkv_backend(void) { return "cpu"; }

int32_t fkv_device_count(int32_t* count) {
  FKV_REQUIRE(count != nullptr, FKV_BAD_ARGUMENT, "count: null");
  *count = 1;
  return FKV_OK;
}

int32_t fkv_device_open(fkv_device** device, const fkv_device_params* params) {
  return guarded([&]() -> int32_t {
    FKV_REQUIRE(device != nullptr && params != nullptr, FKV_BAD_ARGUMENT, "%s: null", device ? "params" : "device");
    FKV_REQUIRE(params->struct_bytes == sizeof *params, FKV_ABI_MISMATCH,
                "fkv_device_params: the caller's has %u bytes, this library's %zu", params->struct_bytes,
                sizeof *params);
    FKV_REQUIRE(params->ordinal == 0, FKV_NO_DEVICE, "ordinal %d: the twin is one device, ordinal 0", params->ordinal);
    FKV_REQUIRE(params->threads >= 0 && params->threads <= 1024, FKV_BAD_ARGUMENT, "threads: %d is not in 0..1024",
                params->threads);
    FKV_REQUIRE(std::isfinite(params->link_bytes_per_second) && params->link_bytes_per_second >= 0, FKV_BAD_ARGUMENT,
                "link_bytes_per_second: %g is not a rate", params->link_bytes_per_second);
    *device = std::make_unique<fkv_device>(*params).release();
    return FKV_OK;
  });
}

int32_t fkv_device_close_sync(fkv_device* device) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(device)) return status;
    {
      std::lock_guard<std::mutex> issue(device->issue);
      while (!device->captures.empty()) {
        const std::shared_ptr<Capture> capture = device->captures.back();
        end_capture(device, capture);
      }
    }
    const std::unique_ptr<fkv_device> owned(device);
    const bool told = device->failure_told.load();
    const int32_t status = drain(device);
    return told ? FKV_OK : status;  // closing must not hide a failure, nor tell it twice
  });
}

int32_t fkv_device_get_info(fkv_device_info* info, fkv_device* device) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(device)) return status;
    FKV_REQUIRE(info != nullptr, FKV_BAD_ARGUMENT, "info: null");
    FKV_REQUIRE(info->struct_bytes == sizeof *info, FKV_ABI_MISMATCH,
                "fkv_device_info: the caller's has %u bytes, this library's %zu", info->struct_bytes, sizeof *info);
    const Memory::Usage usage = device->memory.usage();
    const uint64_t used = std::min(usage.total, usage.allocated + usage.pinned);
    *info = {};
    info->struct_bytes = sizeof *info;
    info->multiprocessors = device->pool.threads();
    info->total_bytes = static_cast<double>(usage.total);
    info->free_bytes = static_cast<double>(usage.total - used);
    info->allocated_bytes = static_cast<double>(usage.allocated);
    info->pinned_bytes = static_cast<double>(usage.pinned);
    const double rate = device->params.link_bytes_per_second;
    if (rate > 0) {
      std::snprintf(info->name, sizeof info->name, "CPU twin, %d threads, simulated link of %.3g GB/s each way",
                    info->multiprocessors, rate * 1e-9);
    } else {
      std::snprintf(info->name, sizeof info->name, "CPU twin, %d threads", info->multiprocessors);
    }
    return FKV_OK;
  });
}

int32_t fkv_device_synchronize_sync(fkv_device* device) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(device)) return status;
    if (const int32_t status = refuse_while_capturing(device, "fkv_device_synchronize_sync")) return status;
    return drain(device);
  });
}
