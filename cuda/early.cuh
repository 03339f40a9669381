// early.cuh: launches that begin before the one ahead of them has ended (programmatic dependent launch, Hopper and later): what takes
// them a microsecond or more to start, and what they read that the one ahead does not write, costs no time then.
//
// Two rules make it safe. A kernel lets the next one begin only after its own await_ahead(): whatever lies further back has ended. And
// before its await_ahead() a kernel reads nothing that the one ahead may write, and writes nothing at all; hence `behind`, the kinds of
// launches that it may follow so. Only captured launches do, and only right behind one another on a stream.
#pragma once
#include "common.cuh"

namespace fkv {

// The launch ahead has ended, and what it wrote is seen. At once where this kernel did not begin early.
__device__ __forceinline__ void await_ahead() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next launch may begin as soon as all blocks have come here, or ended, and there is room for it.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct Launch {
  Kind kind;
  unsigned behind;  // kinds, a bit each
  dim3 grid;
  int threads;
  size_t shared_bytes;
  int cluster = 1;  // blocks along x
};
constexpr unsigned bit(Kind kind) { return 1u << static_cast<int>(kind); }

// Launches a kernel that also runs beside a dense chain: see side_kernel.
template <class... Parameters, class... Arguments>
int32_t launch_early(fkv_stream* stream, const char* call, void (*kernel)(Parameters...), const Launch& launch, Arguments&&... arguments) {
  if (const int32_t status = side_kernel(stream, call, kernel, launch.shared_bytes)) return status;
  cudaLaunchAttribute attributes[2]{};
  unsigned n = 0;
  if (launch.cluster > 1) {
    attributes[n].id = cudaLaunchAttributeClusterDimension;
    attributes[n++].val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
  }
  if (begins_early(stream, launch.behind)) {
    attributes[n].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[n++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = launch.grid;
  config.blockDim = dim3(launch.threads);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = stream->handle;
  config.attrs = attributes;
  config.numAttrs = n;
  // What it returns is also the last error, which `launched` takes.
  static_cast<void>(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
  const int32_t status = launched(stream, call);
  if (status == FKV_OK) remember_launch(stream, launch.kind);
  return status;
}

}  // namespace fkv
