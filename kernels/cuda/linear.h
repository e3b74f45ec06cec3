#ifndef RESA_KERNELS_CUDA_LINEAR_H_
#define RESA_KERNELS_CUDA_LINEAR_H_

// The ways to multiply by a weight matrix; Linear() of linear.cu chooses.

#include "kernels/cuda/context.h"
#include "kernels/params.h"

namespace resa::kernels::cuda {

// Few rows: all `count` products in one launch at the speed at which weights can be read. A row's
// bits depend neither on the other rows nor on their number.
bool StreamSupports(const LinearParams* params, int count);
void LinearStream(Context& context, const LinearParams* params, int count);

// Many rows, by cuBLASLt. False, and nothing enqueued, when it has no algorithm for the shape.
bool LinearCublas(Context& context, const LinearParams& params);

// out (+)= bias of every row, in f32, rounded to out's type.
void AddBias(Context& context, const float* bias, const Matrix& out);

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_LINEAR_H_
