#ifndef RESA_KERNELS_CUDA_LINEAR_H_
#define RESA_KERNELS_CUDA_LINEAR_H_

// The ways to multiply by a weight matrix; Linear() of linear.cu chooses.

#include <cstddef>

#include "kernels/cuda/context.h"
#include "kernels/params.h"

namespace resa::kernels::cuda {

inline constexpr int kMaxProducts = 3;  // Of one x, in a launch.

// ---- a few rows, linear_stream.cu ---------------------------------------------------------------

inline constexpr int kMaxStreamRows = 8;

// All products in one launch, norm and gate included, at the speed at which weights can be read.
// False, and nothing enqueued, where a shape or an alignment is not for it.
bool LinearStream(Context& context, const LinearsParams& params);

// ---- some tens of rows, linear_tile.cu ----------------------------------------------------------

// All products in one launch, by wgmma. With one `cluster`, the number of CTAs that share a sum, a
// row's bits depend neither on the other rows nor on their number; LinearTile chooses it by the
// columns alone.
inline constexpr int kMaxTileRows = 128;

bool TileSupports(const LinearParams* params, int count);
void LinearTile(Context& context, const LinearParams* params, int count);
void LinearTileWith(Context& context, const LinearParams* params, int count, int cluster);

// ---- many rows, linear_cublas.cc ----------------------------------------------------------------

// False, and nothing enqueued, when cuBLASLt has no algorithm for the shape.
bool LinearCublas(Context& context, const LinearParams& params);

// out (+)= bias of every row, in f32, rounded to out's type.
void AddBias(Context& context, const float* bias, const Matrix& out);

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_LINEAR_H_
