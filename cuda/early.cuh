// early.cuh: launches that begin before the one ahead of them has ended (programmatic dependent launch, Hopper and later): what takes
// them a microsecond or more to start, and what they read that the one ahead does not write, costs no time then.
//
// Two rules make it safe. A kernel lets the next one begin only after its own await_ahead(): whatever lies further back has ended. And
// before its await_ahead() a kernel reads nothing that the one ahead may write, and writes nothing at all; hence `behind`, the kinds of
// launches that it may follow so. Only captured launches do, and only right behind one another on a stream.
#pragma once
#include "cluster.cuh"

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
// Both, where nothing is to be done between.
__device__ __forceinline__ void take_over() {
  await_ahead();
  let_next_begin();
}

constexpr unsigned bit(Kind kind) { return 1u << static_cast<int>(kind); }

// launch_clusters of a kernel of kind `kind`, early behind the kinds `behind` (a bit each).
template <class... Parameters, class... Arguments>
int32_t launch_early(fkv_stream* stream, const char* call, Kind kind, unsigned behind, void (*kernel)(Parameters...), const Launch& launch,
                     Arguments&&... arguments) {
  Launch early = launch;
  early.early = begins_early(stream, behind);
  const int32_t status = launch_clusters(stream, call, kernel, early, std::forward<Arguments>(arguments)...);
  if (status == FKV_OK) remember_launch(stream, kind);
  return status;
}

}  // namespace fkv
