// module.cpp: the twin has no GPU code and no compiler for it. It says so at each of these entries, before it looks at anything but
// the handles that it knows.
#include "runtime.h"

using namespace fkv;

namespace {

int32_t refuse(const char* call) {
  return fail(FKV_UNSUPPORTED,
              "%s: the CPU twin runs the operations of freekv.h alone, it cannot run GPU code; open a CUDA device for modules and "
              "kernels of your own",
              call);
}

int32_t refuse(const fkv_device* device, const char* call) {
  if (const int32_t status = check(device)) return status;
  return refuse(call);
}

}  // namespace

int32_t fkv_module_load(fkv_module**, const void*, uint64_t, fkv_device* device) {
  return refuse(device, "fkv_module_load");
}

int32_t fkv_module_unload_sync(fkv_module*) { return refuse("fkv_module_unload_sync"); }

int32_t fkv_module_kernel(fkv_kernel**, const char*, const int32_t*, int32_t, fkv_module*) {
  return refuse("fkv_module_kernel");
}

int32_t fkv_kernel_launch(fkv_kernel*, const fkv_launch_params*, const void*, fkv_stream*) {
  return refuse("fkv_kernel_launch");
}

int32_t fkv_program_compile_sync(fkv_program**, const char*, const char*, const char*, const char*, fkv_device* device) {
  return refuse(device, "fkv_program_compile_sync");
}

int32_t fkv_program_sizes(uint64_t*, uint64_t*, fkv_program*) { return refuse("fkv_program_sizes"); }

int32_t fkv_program_read(void*, char*, fkv_program*) { return refuse("fkv_program_read"); }

int32_t fkv_program_destroy(fkv_program*) { return refuse("fkv_program_destroy"); }
