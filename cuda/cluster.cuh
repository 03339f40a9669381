// cluster.cuh: blocks that share one task, as a cluster that sees its members' shared memory (Hopper and data-centre Blackwell), or as
// one block that does the work of all. Kernels are templates over the number; what they compute does not depend on it.
#pragma once
#include <cooperative_groups.h>

#include <utility>

#include "common.cuh"

namespace fkv {

constexpr int kClusterBlocks = 8;  // the most that every chip with clusters takes

inline bool has_clusters(const fkv_stream* stream) {
  const int major = stream->device->properties.major;
  return !stream->device->plain && (major == 9 || major == 10);
}

// The calling block's cluster: kBlocks blocks along x.
template <int kBlocks>
struct Cluster {
  __device__ static int rank() { return static_cast<int>(blockIdx.x) % kBlocks; }
  // All threads of all its blocks; also orders their shared memory.
  __device__ static void sync() {
    if constexpr (kBlocks == 1) {
      __syncthreads();
    } else {
#if __CUDA_ARCH__ >= 900
      cooperative_groups::this_cluster().sync();
#else
      __trap();  // never launched there
#endif
    }
  }
  // The same variable in block `rank`'s shared memory; between two sync().
  template <class Value>
  __device__ static const Value* of(const Value* shared, int rank) {
    if constexpr (kBlocks == 1) {
      return shared;
    } else {
#if __CUDA_ARCH__ >= 900
      return cooperative_groups::this_cluster().map_shared_rank(const_cast<Value*>(shared), rank);
#else
      return shared;
#endif
    }
  }
};

struct Launch {
  dim3 grid;
  int threads;
  size_t shared_bytes;
  int cluster = 1;     // blocks along x that are one; grid.x is a multiple of it
  bool early = false;  // may begin before the launch ahead has ended: see early.cuh
};

// Launches a kernel that also runs beside a dense chain: see side_kernel.
template <class... Parameters, class... Arguments>
int32_t launch_clusters(fkv_stream* stream, const char* call, void (*kernel)(Parameters...), const Launch& launch,
                        Arguments&&... arguments) {
  if (const int32_t status = side_kernel(stream, call, kernel, launch.shared_bytes)) return status;
  cudaLaunchAttribute attributes[2]{};
  unsigned n = 0;
  if (launch.cluster > 1) {
    attributes[n].id = cudaLaunchAttributeClusterDimension;
    attributes[n++].val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
  }
  if (launch.early) {
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
  return launched(stream, call);
}

}  // namespace fkv
