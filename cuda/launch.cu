// launch.cu: launches of kernels that are not ours. What the driver would refuse with one word is refused here with the kernel's name
// and the figure that does not fit.
#include "module.cuh"

namespace fkv {
namespace {

constexpr uint32_t kPortableCluster = 8, kLargestCluster = 16;

struct Shape {
  const uint32_t* v;
  uint64_t count() const { return uint64_t{v[0]} * v[1] * v[2]; }
};

unsigned long long wide(uint64_t n) { return n; }

int32_t check_shape(const fkv_kernel& kernel, const fkv_launch_params& params) {
  const cudaDeviceProp& has = kernel.module->device->properties;
  const char* call = kernel.call.c_str();
  for (int i = 0; i < 3; ++i) {
    FKV_REQUIRE(params.grid[i] >= 1 && params.grid[i] <= static_cast<uint32_t>(has.maxGridSize[i]), FKV_BAD_ARGUMENT,
                "%s: grid dimension %c is %u; it must be 1 to %d", call, "xyz"[i], params.grid[i], has.maxGridSize[i]);
    FKV_REQUIRE(params.block[i] >= 1 && params.block[i] <= static_cast<uint32_t>(has.maxThreadsDim[i]), FKV_BAD_ARGUMENT,
                "%s: block dimension %c is %u; it must be 1 to %d", call, "xyz"[i], params.block[i], has.maxThreadsDim[i]);
  }
  const uint64_t threads = Shape{params.block}.count();
  FKV_REQUIRE(threads <= static_cast<uint64_t>(kernel.most_threads), FKV_BAD_ARGUMENT,
              "%s: a block of %llu threads; with %d registers a thread it can have %d at most", call, wide(threads), kernel.registers,
              kernel.most_threads);
  const uint64_t shared = uint64_t{params.shared_bytes} + static_cast<uint64_t>(kernel.static_shared);
  FKV_REQUIRE(shared <= has.sharedMemPerBlockOptin, FKV_BAD_ARGUMENT,
              "%s: %u bytes of shared memory and %d of its own are more than the %zu that a block can have", call, params.shared_bytes,
              kernel.static_shared, has.sharedMemPerBlockOptin);
  return FKV_OK;
}

bool has_cluster(const fkv_launch_params& params) { return (params.cluster[0] | params.cluster[1] | params.cluster[2]) != 0; }

int32_t check_cluster(const fkv_kernel& kernel, const fkv_launch_params& params) {
  if (!has_cluster(params)) return FKV_OK;
  const char* call = kernel.call.c_str();
  FKV_REQUIRE(kernel.module->device->properties.major >= 9, FKV_UNSUPPORTED, "%s: %s has no clusters", call,
              kernel.module->device->properties.name);
  for (int i = 0; i < 3; ++i) {
    FKV_REQUIRE(params.cluster[i] >= 1 && params.grid[i] % params.cluster[i] == 0, FKV_BAD_ARGUMENT,
                "%s: grid dimension %c of %u is no multiple of the cluster's %u", call, "xyz"[i], params.grid[i], params.cluster[i]);
  }
  const uint64_t blocks = Shape{params.cluster}.count();
  FKV_REQUIRE(blocks <= kLargestCluster, FKV_BAD_ARGUMENT, "%s: a cluster of %llu blocks; it can have %u at most", call, wide(blocks),
              kLargestCluster);
  return FKV_OK;
}

// With `issue` held: lets the kernel have the shared memory and the cluster that it is launched with.
int32_t allow(fkv_kernel* kernel, const fkv_launch_params& params) {
  const Driver& driver = kernel->module->driver;
  const auto set = [&](CUfunction_attribute attribute, int value) {
    const CUresult result = driver.set_function_attribute(kernel->function, attribute, value);
    return status_of(kernel->module->device, runtime_error(result), kernel->call.c_str());
  };
  const int shared = static_cast<int>(params.shared_bytes);
  if (shared > kernel->dynamic_shared) {
    if (const int32_t status = set(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)) return status;
    kernel->dynamic_shared = shared;
  }
  if (has_cluster(params) && Shape{params.cluster}.count() > kPortableCluster && !kernel->wide_clusters) {
    if (const int32_t status = set(CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)) return status;
    kernel->wide_clusters = true;
  }
  return FKV_OK;
}

int32_t launch_status(const fkv_kernel& kernel, CUresult result) {
  switch (result) {
    case CUDA_ERROR_INVALID_VALUE:
    case CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES:
    case CUDA_ERROR_INVALID_CLUSTER_SIZE:
      return fail(FKV_BAD_ARGUMENT, "%s: %s (%s)", kernel.call.c_str(), cudaGetErrorString(runtime_error(result)),
                  cudaGetErrorName(runtime_error(result)));
    default:
      return status_of(kernel.module->device, runtime_error(result), kernel.call.c_str());
  }
}

}  // namespace
}  // namespace fkv

using namespace fkv;

int32_t fkv_kernel_launch(fkv_kernel* kernel, const fkv_launch_params* params, const void* arguments, fkv_stream* stream) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(kernel)) return status;
    if (const int32_t status = ready(stream, kernel->call.c_str())) return status;
    fkv_device* device = stream->device;
    FKV_REQUIRE(kernel->module->device == device, FKV_BAD_ARGUMENT, "%s: kernel and stream belong to different devices", kernel->call.c_str());
    FKV_REQUIRE(params != nullptr, FKV_BAD_ARGUMENT, "params: null");
    FKV_REQUIRE(params->struct_bytes == sizeof *params, FKV_ABI_MISMATCH,
                "fkv_launch_params: the caller's has %u bytes, this library's %zu", params->struct_bytes, sizeof *params);
    FKV_REQUIRE(arguments != nullptr || kernel->offsets.empty(), FKV_BAD_ARGUMENT, "arguments: null");
    if (const int32_t status = check_shape(*kernel, *params)) return status;
    if (const int32_t status = check_cluster(*kernel, *params)) return status;

    void* pointers[kMostArguments];  // the driver copies what they point to
    const auto block = static_cast<const char*>(arguments);
    for (size_t i = 0; i < kernel->offsets.size(); ++i) pointers[i] = const_cast<char*>(block + kernel->offsets[i]);

    CUlaunchAttribute cluster{};
    cluster.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    cluster.value.clusterDim = {params->cluster[0], params->cluster[1], params->cluster[2]};
    CUlaunchConfig config{};
    config.gridDimX = params->grid[0];
    config.gridDimY = params->grid[1];
    config.gridDimZ = params->grid[2];
    config.blockDimX = params->block[0];
    config.blockDimY = params->block[1];
    config.blockDimZ = params->block[2];
    config.sharedMemBytes = params->shared_bytes;
    config.hStream = stream->handle;
    config.attrs = &cluster;
    config.numAttrs = has_cluster(*params) ? 1 : 0;

    const std::lock_guard<std::mutex> issue(device->issue);
    if (const int32_t status = allow(kernel, *params)) return status;
    const CUresult result = kernel->module->driver.launch(&config, kernel->function, pointers, nullptr);
    if (result == CUDA_SUCCESS) return FKV_OK;
    const int32_t status = launch_status(*kernel, result);
    if (stream->capture && stream->capture->broken.empty()) stream->capture->broken = "a launch that failed: " + kernel->call;
    return status;
  });
}
