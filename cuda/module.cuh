// module.cuh: modules of kernels that are not ours, and the driver's entries that load and launch them. The driver is looked up through
// the runtime: the library must load where there is none.
#pragma once
#include <cudaTypedefs.h>

#include <memory>
#include <string>
#include <vector>

#include "runtime.cuh"

namespace fkv {

constexpr uint64_t kModuleMagic = 0x666b76206d6f6432, kKernelMagic = 0x666b76206b726e32;
constexpr int kMostArguments = 128;

struct Driver {
  PFN_cuModuleLoadDataEx_v2010 module_load;
  PFN_cuModuleUnload_v2000 module_unload;
  PFN_cuModuleGetFunction_v2000 module_function;
  PFN_cuModuleGetFunctionCount_v12040 module_function_count;
  PFN_cuModuleEnumerateFunctions_v12040 module_functions;
  PFN_cuFuncLoad_v12040 function_load;
  PFN_cuFuncGetName_v12030 function_name;
  PFN_cuFuncGetParamInfo_v12040 function_parameter;
  PFN_cuFuncGetAttribute_v2020 function_attribute;
  PFN_cuFuncSetAttribute_v9000 set_function_attribute;
  PFN_cuLaunchKernelEx_v11060 launch;
};
// FKV_UNSUPPORTED where the driver lacks one of them.
int32_t find_driver(Driver* driver);

// The driver numbers its errors as the runtime does.
inline cudaError_t runtime_error(CUresult result) { return static_cast<cudaError_t>(result); }

// FKV_BAD_ARGUMENT unless the handle is alive.
int32_t check(const fkv_module* module);
int32_t check(const fkv_kernel* kernel);

}  // namespace fkv

struct fkv_kernel {
  uint64_t magic = fkv::kKernelMagic;
  fkv_module* module;
  CUfunction function;
  std::string name;
  std::string call;               // how errors call a launch of it
  std::vector<uint32_t> offsets;  // of each argument in a block of them
  int most_threads = 0, registers = 0, static_shared = 0;
  int dynamic_shared = 0;      // allowed so far; guarded by the device's `issue`
  bool wide_clusters = false;  // likewise: more than 8 blocks

  fkv_kernel(fkv_module* owner, CUfunction found, const char* text)
      : module(owner), function(found), name(text), call("launch of kernel " + name) {}
  ~fkv_kernel() { magic = 0; }
};

struct fkv_module {
  uint64_t magic = fkv::kModuleMagic;
  fkv_device* device;
  fkv::Driver driver{};
  CUmodule handle = nullptr;
  std::vector<std::unique_ptr<fkv_kernel>> kernels{};  // guarded by the device's `issue`

  explicit fkv_module(fkv_device* owner) : device(owner) {}
  ~fkv_module() {
    kernels.clear();
    if (handle != nullptr) driver.module_unload(handle);  // of a failed device, whose failure is told elsewhere
    magic = 0;
  }
};
