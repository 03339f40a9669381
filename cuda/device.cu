// device.cu: opens and closes devices, turns CUDA's errors into the ABI's, keeps a device's failure.
#include <cstdio>

#include "runtime.cuh"

namespace fkv {
namespace {

constexpr int kLeastMajor = 8;        // bf16 arithmetic and asynchronous copies to shared memory
constexpr int kLeastDriver = 13000;   // the runtime's own major version

int32_t code_of(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return FKV_OK;
    case cudaErrorMemoryAllocation:
      return FKV_OUT_OF_MEMORY;
    case cudaErrorNoDevice:
    case cudaErrorInvalidDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorDevicesUnavailable:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorSystemNotReady:
    case cudaErrorCompatNotSupportedOnDevice:
    case cudaErrorInitializationError:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilationDisabled:
      return FKV_NO_DEVICE;
    case cudaErrorStreamCaptureUnsupported:
    case cudaErrorStreamCaptureInvalidated:
    case cudaErrorStreamCaptureMerge:
    case cudaErrorStreamCaptureUnmatched:
    case cudaErrorStreamCaptureUnjoined:
    case cudaErrorStreamCaptureIsolation:
    case cudaErrorStreamCaptureImplicit:
    case cudaErrorStreamCaptureWrongThread:
    case cudaErrorCapturedEvent:
      return FKV_CAPTURE;
    case cudaErrorInvalidValue:
    case cudaErrorInvalidConfiguration:
    case cudaErrorInvalidResourceHandle:
    case cudaErrorInvalidPitchValue:
      return FKV_BAD_ARGUMENT;
    case cudaErrorNotSupported:
    case cudaErrorLaunchOutOfResources:
      return FKV_UNSUPPORTED;
    default:
      return FKV_DEVICE_FAILED;
  }
}

// FKV_NO_DEVICE with a text that says what to install, or the number of devices.
int32_t count_devices(int* count) {
  *count = 0;
  int driver = 0;
  cudaDriverGetVersion(&driver);
  FKV_REQUIRE(driver != 0, FKV_NO_DEVICE, "no NVIDIA driver answers on this machine; install one for CUDA %d.%d or later",
              kLeastDriver / 1000, kLeastDriver % 1000 / 10);
  FKV_REQUIRE(driver >= kLeastDriver, FKV_NO_DEVICE, "the NVIDIA driver supports CUDA %d.%d, this library needs %d.%d; update the driver",
              driver / 1000, driver % 1000 / 10, kLeastDriver / 1000, kLeastDriver % 1000 / 10);
  const cudaError_t error = cudaGetDeviceCount(count);
  if (error == cudaErrorNoDevice) {
    cudaGetLastError();
    *count = 0;
    return FKV_OK;
  }
  return status_of(nullptr, error, "cudaGetDeviceCount");
}

}  // namespace

int32_t check(const fkv_device* device) { return check_magic(device, kDeviceMagic, "device"); }
int32_t check(const fkv_stream* stream) { return check_magic(stream, kStreamMagic, "stream"); }
int32_t check(const fkv_event* event) { return check_magic(event, kEventMagic, "event"); }
int32_t check(const fkv_graph* graph) { return check_magic(graph, kGraphMagic, "graph"); }

int32_t status_of(fkv_device* device, cudaError_t error, const char* call) {
  if (error == cudaSuccess) return FKV_OK;
  cudaGetLastError();  // told once: the next launch must not find it again
  const int32_t status = code_of(error);
  if (status != FKV_DEVICE_FAILED || device == nullptr) {
    return fail(status, "%s: %s (%s)", call, cudaGetErrorString(error), cudaGetErrorName(error));
  }
  {
    const std::lock_guard<std::mutex> lock(device->failure_mutex);
    if (device->failure.empty()) {
      device->failure = std::string("found by ") + call + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")";
    }
  }
  return device->check_failure();
}

int32_t ready(fkv_device* device, const char* call) {
  if (const int32_t status = check(device)) return status;
  if (const int32_t status = device->check_failure()) return status;
  return status_of(device, cudaSetDevice(device->ordinal), call);
}

int32_t ready(fkv_stream* stream, const char* call) {
  if (const int32_t status = check(stream)) return status;
  if (const int32_t status = ready(stream->device, call)) return status;
  const std::lock_guard<std::mutex> issue(stream->device->issue);
  return stream->capture ? check_capture(*stream->capture) : FKV_OK;
}

int32_t launched(fkv_stream* stream, const char* call) {
  const int32_t status = status_of(stream->device, cudaGetLastError(), call);
  if (status == FKV_OK) return FKV_OK;
  const std::lock_guard<std::mutex> issue(stream->device->issue);
  if (stream->capture && stream->capture->broken.empty()) stream->capture->broken = std::string("a launch that failed: ") + call;
  return status;
}

int32_t drain(fkv_device* device, const char* call) {
  if (const int32_t status = status_of(device, cudaSetDevice(device->ordinal), call)) return status;
  const Beside beside;
  std::vector<cudaStream_t> streams;
  {
    const std::lock_guard<std::mutex> issue(device->issue);
    for (const auto& [handle, stream] : device->streams) {
      if (stream->shared) streams.push_back(stream->shared->handle);
      else if (!stream->capture) streams.push_back(stream->handle);
    }
  }
  int32_t status = device->check_failure();
  for (cudaStream_t stream : streams) {
    if (const int32_t waited = status_of(device, cudaStreamSynchronize(stream), call)) status = waited;
  }
  return status;
}

}  // namespace fkv

fkv_device::~fkv_device() {
  graphs.clear();
  modules.clear();
  events.clear();
  streams.clear();
  ledger.clear(fkv::release);
  magic = 0;
}

int32_t fkv_device::check_failure() {
  const std::lock_guard<std::mutex> lock(failure_mutex);
  if (failure.empty()) return FKV_OK;
  failure_told = true;
  return fkv::fail(FKV_DEVICE_FAILED, "an operation failed, and the device with it: %s", failure.c_str());
}

using namespace fkv;

const char* fkv_backend(void) { return "cuda"; }

int32_t fkv_device_count(int32_t* count) {
  return guarded([&]() -> int32_t {
    FKV_REQUIRE(count != nullptr, FKV_BAD_ARGUMENT, "count: null");
    return count_devices(count);
  });
}

int32_t fkv_device_open(fkv_device** device, const fkv_device_params* params) {
  return guarded([&]() -> int32_t {
    FKV_REQUIRE(device != nullptr && params != nullptr, FKV_BAD_ARGUMENT, "%s: null", device ? "params" : "device");
    FKV_REQUIRE(params->struct_bytes == sizeof *params, FKV_ABI_MISMATCH,
                "fkv_device_params: the caller's has %u bytes, this library's %zu", params->struct_bytes, sizeof *params);
    FKV_REQUIRE(params->schedule_seed == 0 && params->link_bytes_per_second == 0 && params->threads == 0, FKV_UNSUPPORTED,
                "schedule_seed, link_bytes_per_second and threads are the CPU twin's; a GPU has none of them");
    int count = 0;
    if (const int32_t status = count_devices(&count)) return status;
    FKV_REQUIRE(params->ordinal >= 0 && params->ordinal < count, FKV_NO_DEVICE, "ordinal %d: there are %d devices", params->ordinal,
                count);
    cudaDeviceProp properties;
    if (const int32_t status = status_of(nullptr, cudaGetDeviceProperties(&properties, params->ordinal), "fkv_device_open")) return status;
    FKV_REQUIRE(properties.major >= kLeastMajor, FKV_NO_DEVICE, "%s has compute capability %d.%d; freekv needs %d.0 or later",
                properties.name, properties.major, properties.minor, kLeastMajor);
    FKV_REQUIRE(properties.unifiedAddressing && properties.canUseHostPointerForRegisteredMem, FKV_NO_DEVICE,
                "%s: this system maps pinned memory at another address on the device", properties.name);
    auto made = std::make_unique<fkv_device>(params->ordinal, properties, params->plain != 0);
    // Makes the context, and finds out whether it can be used: an earlier failure in this process leaves it broken.
    const Beside beside;
    if (const int32_t status = status_of(nullptr, cudaSetDevice(params->ordinal), "fkv_device_open")) return status;
    if (const int32_t status = status_of(nullptr, cudaFree(nullptr), "fkv_device_open")) return status;
    *device = made.release();
    return FKV_OK;
  });
}

int32_t fkv_device_close_sync(fkv_device* device) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(device)) return status;
    {
      const std::lock_guard<std::mutex> issue(device->issue);
      while (!device->captures.empty()) {
        cudaGraph_t graph = nullptr;
        end_capture(device, std::shared_ptr<Capture>(device->captures.back()), &graph);
        if (graph != nullptr) cudaGraphDestroy(graph);
      }
    }
    const std::unique_ptr<fkv_device> owned(device);
    const bool told = device->failure_told;
    const int32_t status = drain(device, "fkv_device_close_sync");
    return told ? FKV_OK : status;  // closing must not hide a failure, nor tell it twice
  });
}

int32_t fkv_device_get_info(fkv_device_info* info, fkv_device* device) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(device)) return status;
    FKV_REQUIRE(info != nullptr, FKV_BAD_ARGUMENT, "info: null");
    FKV_REQUIRE(info->struct_bytes == sizeof *info, FKV_ABI_MISMATCH,
                "fkv_device_info: the caller's has %u bytes, this library's %zu", info->struct_bytes, sizeof *info);
    const Ledger::Usage usage = device->ledger.usage();
    *info = {};
    info->struct_bytes = sizeof *info;
    info->compute_major = device->properties.major;
    info->compute_minor = device->properties.minor;
    info->multiprocessors = device->properties.multiProcessorCount;
    info->allocated_bytes = static_cast<double>(usage.device);
    info->pinned_bytes = static_cast<double>(usage.pinned);
    info->total_bytes = static_cast<double>(device->properties.totalGlobalMem);
    info->shared_bytes_per_block = static_cast<double>(device->properties.sharedMemPerBlockOptin);
    info->l2_bytes = device->properties.l2CacheSize;
    info->max_threads_per_block = device->properties.maxThreadsPerBlock;
    info->warp_size = device->properties.warpSize;
    size_t free = 0, total = 0;
    const Beside beside;
    // Of a failed device only the accounts are known.
    if (cudaSetDevice(device->ordinal) == cudaSuccess && cudaMemGetInfo(&free, &total) == cudaSuccess) {
      info->total_bytes = static_cast<double>(total);
      info->free_bytes = static_cast<double>(free);
    } else {
      cudaGetLastError();
    }
    std::snprintf(info->name, sizeof info->name, "%.*s", static_cast<int>(sizeof info->name - 1), device->properties.name);
    return FKV_OK;
  });
}

int32_t fkv_device_synchronize_sync(fkv_device* device) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(device)) return status;
    if (const int32_t status = refuse_while_capturing(device, "fkv_device_synchronize_sync")) return status;
    return drain(device, "fkv_device_synchronize_sync");
  });
}
