// The sketch selector for heads of 64 components.

#include "kernels/cuda/select_sketch_launch.cuh"

namespace resa::kernels::cuda {

template void LaunchSketch<64>(Context&, const SketchArgs&, const SelectorSpec&);

}  // namespace resa::kernels::cuda
