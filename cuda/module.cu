// module.cu: loads modules through the driver and finds their kernels. A kernel's arguments are checked against what the image says of
// it when it is found, so that a launch needs to check their values alone.
#include "module.cuh"

#include <algorithm>

#include "image.h"

namespace fkv {
namespace {

template <class Entry>
bool find(Entry* entry, const char* symbol, unsigned version) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(symbol, &found, version, cudaEnableDefault, &result);
  if (error != cudaSuccess) cudaGetLastError();
  *entry = reinterpret_cast<Entry>(found);
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess && found != nullptr;
}

// Why the driver did not load an image. What is wrong with the image is no failure of the device.
int32_t load_status(fkv_device* device, CUresult result, const char* log) {
  const cudaError_t error = runtime_error(result);
  const char* text = cudaGetErrorString(error);
  switch (result) {
    case CUDA_ERROR_NO_BINARY_FOR_GPU:
      return fail(FKV_BAD_ARGUMENT, "image: it has no code for %s; compile it for sm_%d%d, or to PTX of that architecture or an older one",
                  device->properties.name, device->properties.major, device->properties.minor);
    case CUDA_ERROR_UNSUPPORTED_PTX_VERSION:
      return fail(FKV_BAD_ARGUMENT, "image: its PTX is of a newer CUDA than the driver knows; compile it with an older nvcc, or update the driver");
    case CUDA_ERROR_INVALID_VALUE:
    case CUDA_ERROR_INVALID_IMAGE:
    case CUDA_ERROR_INVALID_PTX:
    case CUDA_ERROR_INVALID_SOURCE:
    case CUDA_ERROR_JIT_COMPILER_NOT_FOUND:
    case CUDA_ERROR_JIT_COMPILATION_DISABLED:
    case CUDA_ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND:
    case CUDA_ERROR_SHARED_OBJECT_INIT_FAILED:
      return fail(FKV_BAD_ARGUMENT, "image: %s (%s)%s%s", text, cudaGetErrorName(error), log[0] == '\0' ? "" : ": ", log);
    default:
      return status_of(device, error, "fkv_module_load");
  }
}

// The names of a module's kernels, for a text.
std::string names_of(const fkv_module& owner) {
  unsigned count = 0;
  std::string names;
  if (owner.driver.module_function_count(&count, owner.handle) != CUDA_SUCCESS || count == 0) return "none";
  std::vector<CUfunction> functions(count);
  if (owner.driver.module_functions(functions.data(), count, owner.handle) != CUDA_SUCCESS) return "none that the driver tells";
  for (CUfunction function : functions) {
    const char* name = nullptr;
    if (owner.driver.function_name(&name, function) != CUDA_SUCCESS || name == nullptr) continue;
    names += (names.empty() ? "" : ", ") + std::string(name);
  }
  return names;
}

std::string list(const std::vector<size_t>& sizes) {
  std::string text = std::to_string(sizes.size()) + (sizes.size() == 1 ? " argument" : " arguments");
  for (size_t i = 0; i < sizes.size(); ++i) text += (i == 0 ? " of " : ", ") + std::to_string(sizes[i]);
  return text + (sizes.empty() ? "" : " bytes");
}

// FKV_BAD_ARGUMENT unless the kernel takes arguments of these sizes. Where the driver places them is its own matter: a launch gives it a
// pointer to each, so that a caller needs to know no alignment of theirs.
int32_t place_arguments(fkv_kernel* kernel, const int32_t* sizes, int32_t n) {
  std::vector<size_t> takes, given;
  for (size_t offset, bytes; kernel->module->driver.function_parameter(kernel->function, takes.size(), &offset, &bytes) == CUDA_SUCCESS;) {
    takes.push_back(bytes);
  }
  for (int32_t i = 0; i < n; ++i) {
    FKV_REQUIRE(sizes[i] > 0, FKV_BAD_ARGUMENT, "sizes: argument %d has %d bytes", i, sizes[i]);
    given.push_back(static_cast<size_t>(sizes[i]));
  }
  FKV_REQUIRE(takes == given, FKV_BAD_ARGUMENT, "kernel %s takes %s; %s were declared", kernel->name.c_str(), list(takes).c_str(),
              list(given).c_str());
  uint32_t end = 0;
  for (size_t bytes : given) {
    kernel->offsets.push_back(end);
    end += static_cast<uint32_t>((bytes + 7) / 8 * 8);
  }
  return FKV_OK;
}

int32_t read_attributes(fkv_kernel* kernel) {
  const std::pair<CUfunction_attribute, int*> wanted[] = {
      {CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, &kernel->most_threads},
      {CU_FUNC_ATTRIBUTE_NUM_REGS, &kernel->registers},
      {CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, &kernel->static_shared},
      {CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, &kernel->dynamic_shared},
  };
  for (const auto& [attribute, value] : wanted) {
    const CUresult result = kernel->module->driver.function_attribute(value, attribute, kernel->function);
    if (const int32_t status = status_of(kernel->module->device, runtime_error(result), "fkv_module_kernel")) return status;
  }
  return FKV_OK;
}

}  // namespace

int32_t find_driver(Driver* driver) {
  const bool found = find(&driver->module_load, "cuModuleLoadDataEx", 2010) && find(&driver->module_unload, "cuModuleUnload", 2000) &&
                     find(&driver->module_function, "cuModuleGetFunction", 2000) &&
                     find(&driver->module_function_count, "cuModuleGetFunctionCount", 12040) &&
                     find(&driver->module_functions, "cuModuleEnumerateFunctions", 12040) &&
                     find(&driver->function_load, "cuFuncLoad", 12040) && find(&driver->function_name, "cuFuncGetName", 12030) &&
                     find(&driver->function_parameter, "cuFuncGetParamInfo", 12040) &&
                     find(&driver->function_attribute, "cuFuncGetAttribute", 2020) &&
                     find(&driver->set_function_attribute, "cuFuncSetAttribute", 9000) && find(&driver->launch, "cuLaunchKernelEx", 11060);
  FKV_REQUIRE(found, FKV_UNSUPPORTED, "the NVIDIA driver lacks what modules need; update it to one for CUDA 12.4 or later");
  return FKV_OK;
}

int32_t check(const fkv_module* module) { return check_magic(module, kModuleMagic, "module"); }
int32_t check(const fkv_kernel* kernel) { return check_magic(kernel, kKernelMagic, "kernel"); }

}  // namespace fkv

using namespace fkv;

int32_t fkv_module_load(fkv_module** module, const void* image, uint64_t bytes, fkv_device* device) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = ready(device, "fkv_module_load")) return status;
    FKV_REQUIRE(module != nullptr && image != nullptr, FKV_BAD_ARGUMENT, "%s: null", image ? "module" : "image");
    if (const int32_t status = refuse_while_capturing(device, "fkv_module_load")) return status;
    if (const int32_t status = check_image(static_cast<const char*>(image), bytes)) return status;
    auto made = std::make_shared<fkv_module>(device);
    if (const int32_t status = find_driver(&made->driver)) return status;
    const std::string copy(static_cast<const char*>(image), bytes);  // PTX ends with a zero byte
    char log[800] = "";
    CUjit_option options[] = {CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES};
    void* values[] = {log, reinterpret_cast<void*>(sizeof log - 1)};
    const CUresult result = made->driver.module_load(&made->handle, copy.c_str(), 2, options, values);
    if (result != CUDA_SUCCESS) {
      made->handle = nullptr;
      return load_status(device, result, log);
    }
    *module = made.get();
    const std::lock_guard<std::mutex> issue(device->issue);
    device->modules.emplace(*module, std::move(made));
    return FKV_OK;
  });
}

int32_t fkv_module_unload_sync(fkv_module* module) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(module)) return status;
    fkv_device* device = module->device;
    if (const int32_t status = refuse_while_capturing(device, "fkv_module_unload_sync")) return status;
    drain(device, "fkv_module_unload_sync");  // a failed device still takes it back
    const std::lock_guard<std::mutex> issue(device->issue);
    device->modules.erase(module);
    return FKV_OK;
  });
}

int32_t fkv_module_kernel(fkv_kernel** kernel, const char* name, const int32_t* sizes, int32_t n_arguments, fkv_module* module) {
  return guarded([&]() -> int32_t {
    if (const int32_t status = check(module)) return status;
    FKV_REQUIRE(kernel != nullptr && name != nullptr, FKV_BAD_ARGUMENT, "%s: null", name ? "kernel" : "name");
    FKV_REQUIRE(n_arguments >= 0 && n_arguments <= kMostArguments, FKV_BAD_ARGUMENT, "n_arguments: %d is not in 0..%d", n_arguments,
                kMostArguments);
    FKV_REQUIRE(sizes != nullptr || n_arguments == 0, FKV_BAD_ARGUMENT, "sizes: null");
    fkv_device* device = module->device;
    if (const int32_t status = ready(device, "fkv_module_kernel")) return status;
    if (const int32_t status = refuse_while_capturing(device, "fkv_module_kernel")) return status;
    CUfunction function = nullptr;
    const CUresult result = module->driver.module_function(&function, module->handle, name);
    FKV_REQUIRE(result != CUDA_ERROR_NOT_FOUND, FKV_BAD_ARGUMENT,
                "the module has no kernel %s, but: %s. A C++ kernel has its plain name only when it is declared extern \"C\"", name,
                names_of(*module).c_str());
    if (const int32_t status = status_of(device, runtime_error(result), "fkv_module_kernel")) return status;
    // Else the driver would load its code at the first launch, which may be in a capture.
    const CUresult loaded = module->driver.function_load(function);
    if (const int32_t status = status_of(device, runtime_error(loaded), "fkv_module_kernel")) return status;
    auto made = std::make_unique<fkv_kernel>(module, function, name);
    if (const int32_t status = place_arguments(made.get(), sizes, n_arguments)) return status;
    if (const int32_t status = read_attributes(made.get())) return status;
    const std::lock_guard<std::mutex> issue(device->issue);
    *kernel = module->kernels.emplace_back(std::move(made)).get();
    return FKV_OK;
  });
}
