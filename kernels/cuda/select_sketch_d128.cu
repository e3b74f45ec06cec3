// The sketch selector for heads of 128 components.

#include "kernels/cuda/select_sketch_launch.cuh"

namespace resa::kernels::cuda {

template void LaunchSketch<128>(Context&, const SketchArgs&, const SelectorSpec&);

}  // namespace resa::kernels::cuda
