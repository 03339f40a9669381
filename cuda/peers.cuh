// peers.cuh: blocks that share one task where the launch decides how many they are: a cluster, or one block alone. What kernels compute
// does not depend on it.
#pragma once
#include "cluster.cuh"

namespace fkv {

// The calling block's cluster, whose blocks follow each other along x.
struct Peers {
  int32_t rank = 0, size = 1;

  __device__ Peers() {
#if __CUDA_ARCH__ >= 900
    rank = static_cast<int32_t>(cooperative_groups::this_cluster().block_rank());
    size = static_cast<int32_t>(cooperative_groups::this_cluster().num_blocks());
#endif
  }
  // All threads of all its blocks; also orders their shared memory, and global memory among them. A block may be written to from afar
  // after the first one (before it, it may not have started); one that is still to be written to or read from must not end.
  __device__ void sync() const {
    arrive();
    wait();
  }
  // The two halves of sync(). A block that ends has arrived at all that follow.
  __device__ void arrive() const {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
  }
  __device__ void wait() const {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
  }
  // The same variable in block `other`'s shared memory.
  template <class Value>
  __device__ Value* of(Value* shared, int32_t other) const {
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(shared, other);
#else
    return shared;
#endif
  }
};

}  // namespace fkv
