#ifndef RESA_KERNELS_CUDA_LINEAR_H_
#define RESA_KERNELS_CUDA_LINEAR_H_

// The ways to multiply by a weight matrix; Linear() of linear.cu chooses.

#include <cstddef>

#include "kernels/cuda/context.h"
#include "kernels/params.h"

namespace resa::kernels::cuda {

// ---- few rows, linear_stream.cu -----------------------------------------------------------------

// All products in one launch, at the speed at which weights can be read. With one configuration a
// row's bits depend neither on the other rows nor on their number.
inline constexpr int kMaxStreamRows = 64;

// How a launch is cut; the kernel's banner has the terms.
struct StreamConfig {
  int row_warps = 1;  // 1, 2 or 4: a pass takes 32 columns for each.
  int cluster = 1;    // 1, 2 or 4 CTAs share a sum.
  int chunk = 256;    // Of `in`, per stage: a multiple of 64.
  size_t shared_bytes = 0;
};

bool StreamSupports(const LinearParams* params, int count);
void LinearStreamWith(Context& context, const LinearParams* params, int count,
                      const StreamConfig& config);

// ---- many rows, linear_cublas.cc ----------------------------------------------------------------

// False, and nothing enqueued, when cuBLASLt has no algorithm for the shape.
bool LinearCublas(Context& context, const LinearParams& params);

// out (+)= bias of every row, in f32, rounded to out's type.
void AddBias(Context& context, const float* bias, const Matrix& out);

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_LINEAR_H_
