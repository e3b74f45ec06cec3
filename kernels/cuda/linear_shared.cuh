#ifndef RESA_KERNELS_CUDA_LINEAR_SHARED_CUH_
#define RESA_KERNELS_CUDA_LINEAR_SHARED_CUH_

// What the two kernels of Linear that stream weights use: how columns are dealt out, where a warp
// stands in its ring of stages, and the shared memory of a cluster's CTAs.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/context.h"
#include "kernels/cuda/ptx.cuh"

namespace resa::kernels::cuda {

// Part `pass` of a cluster. `units` are cut into as many equal parts as all clusters have passes,
// and the clusters take part after part together: what is read at a time lies close by.
struct Deal {
  int units, passes, cluster_size;

  // What the arithmetic below can hold.
  static constexpr bool Fits(int64_t units, int64_t parts) {
    return units * parts <= int64_t{0xffffffff};
  }

  // Of the part of this CTA's cluster.
  __device__ __forceinline__ int Begin(int pass) const { return Part(pass, 0); }
  __device__ __forceinline__ int End(int pass) const { return Part(pass, 1); }

 private:
  // In 32 bits: a division of 64 takes a third of a microsecond, before the first copy.
  __device__ __forceinline__ int Part(int pass, int next) const {
    const uint32_t clusters = gridDim.x / static_cast<uint32_t>(cluster_size);
    const uint32_t index = static_cast<uint32_t>(pass) * clusters +
                           blockIdx.x / static_cast<uint32_t>(cluster_size) +
                           static_cast<uint32_t>(next);
    return static_cast<int>(static_cast<uint32_t>(units) * index /
                            (clusters * static_cast<uint32_t>(passes)));
  }
};

// Where a warp stands in the ring. Consumers begin with parity 0; producers with 1, which a barrier
// that has seen no phase lets pass.
struct Slot {
  int stage = 0;
  uint32_t parity;
  __device__ explicit Slot(uint32_t first_parity) : parity(first_parity) {}
  __device__ __forceinline__ void Next(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ float4 Add(float4 a, float4 b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

__device__ __forceinline__ int ClusterRank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// Every thread of the cluster arrives, and then waits.
__device__ __forceinline__ void ClusterArrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void ClusterWait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The address of the same place in another CTA of the cluster.
__device__ __forceinline__ uint32_t AddressIn(uint32_t address, int rank) {
  uint32_t to;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(address), "r"(rank));
  return to;
}
__device__ __forceinline__ void StoreIn(uint32_t address, float4 value) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(value.x),
               "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
}
// How many clusters of `size` CTAs of `kernel`, one on a multiprocessor, run at a time. Where
// clusters do not fill a part of the chip, its last multiprocessors stay idle.
template <class Kernel>
int MaxClusters(const Context& context, Kernel kernel, int threads, int size) {
  RESA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(context.device.shared_bytes_per_block)));
  if (size == 1) return context.device.sms;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(static_cast<unsigned>(size));
  launch.blockDim = dim3(static_cast<unsigned>(threads));
  launch.dynamicSmemBytes = context.device.shared_bytes_per_block;
  launch.attrs = &attribute;
  launch.numAttrs = 1;
  int clusters = 0;
  RESA_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch));
  return clusters;
}

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_LINEAR_SHARED_CUH_
