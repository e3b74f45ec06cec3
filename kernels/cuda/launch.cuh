#ifndef RESA_KERNELS_CUDA_LAUNCH_CUH_
#define RESA_KERNELS_CUDA_LAUNCH_CUH_

// Programmatic dependent launch: a kernel's CTAs may be set up while the kernel before it in the
// stream still drains, which hides about a microsecond of launch latency per kernel. Inside a
// recorded graph the edges between such kernels become programmatic too.
//
// Rules for a kernel launched by LaunchOverlapped:
// - every thread calls WaitForPrevious() before it touches memory that another kernel writes, or
//   writes memory that another kernel reads; before that only weights may be read, and the step's
//   lists, which were copied before any kernel of the step was launched;
// - LetNextStart() may come any time, even before the wait. It lets the next kernel's CTAs take
//   what room is left on the multiprocessors, and load weights, no more: their own wait is for
//   this kernel's end and its writes.

#include <cuda_runtime.h>

#include <utility>

#include "kernels/cuda/context.h"

namespace resa::kernels::cuda {

__device__ __forceinline__ void WaitForPrevious() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void LetNextStart() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Launches kernel(args...) on `stream`, with clusters of `cluster` CTAs in x when that is above 1.
template <class... Parameters, class... Arguments>
void LaunchOverlapped(cudaStream_t stream, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                      size_t shared_bytes, int cluster, Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(cluster);
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  RESA_CUDA_CHECK(
      cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...));
  RESA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_LAUNCH_CUH_
