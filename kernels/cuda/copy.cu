// CopyPages: K, V and descriptors of whole pages, in every layer (copy on write).
//
// A CTA copies one array's part of one page in one layer: 8 to 32 KiB of keys or values, or a few
// KiB of descriptors. Bound by memory when pages are many: 4.0 TB/s read and written at 128 pages
// (a device copy reaches 4.3). One page of 28 layers takes 3 us.

#include <cstdint>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.cuh"

namespace resa::kernels::cuda {
namespace {

constexpr int kThreads = 256;

struct CopyArgs {
  const KvLayer* layers;
  const int32_t* from;
  const int32_t* to;
  int64_t kv_units;  // Of 16 bytes, per page and layer.
  int64_t descriptor_units;
};

// Grid (page, layer, array).
__global__ void __launch_bounds__(kThreads) CopyPagesKernel(const CopyArgs args) {
  WaitForPrevious();
  const KvLayer& layer = args.layers[blockIdx.y];
  std::byte* const array = blockIdx.z == 0   ? layer.k
                           : blockIdx.z == 1 ? layer.v
                                             : layer.descriptors;
  const int64_t units = blockIdx.z == 2 ? args.descriptor_units : args.kv_units;
  uint4* const data = reinterpret_cast<uint4*>(array);
  const uint4* const __restrict__ from = data + args.from[blockIdx.x] * units;
  uint4* const __restrict__ to = data + args.to[blockIdx.x] * units;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < units; i += kThreads) to[i] = from[i];
}

}  // namespace

void CopyPages(Context& context, const CopyPagesParams& params) {
  if (params.count == 0) return;
  const KvLayout& layout = params.layout;
  const size_t heads = static_cast<size_t>(layout.num_kv_heads);
  RESA_CHECK(layout.DescriptorRunBytes() % 16 == 0 && layout.RunBytes() % 16 == 0)
      << "CopyPages: descriptors of " << layout.DescriptorRunBytes() << " bytes";
  const CopyArgs args = {
      .layers = params.layers,
      .from = params.from,
      .to = params.to,
      .kv_units = static_cast<int64_t>(heads * layout.RunBytes() / 16),
      .descriptor_units = static_cast<int64_t>(heads * layout.DescriptorRunBytes() / 16),
  };
  const dim3 grid(static_cast<unsigned>(params.count), static_cast<unsigned>(layout.num_layers), 3);
  LaunchOverlapped(context.stream, CopyPagesKernel, grid, kThreads, 0, 1, args);
}

}  // namespace resa::kernels::cuda
