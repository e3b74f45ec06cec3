#ifndef RESA_KERNELS_CUDA_LINEAR_H_
#define RESA_KERNELS_CUDA_LINEAR_H_

// The ways to multiply by a weight matrix; Linear() of linear.cu chooses.

#include <cstddef>

#include "kernels/cuda/context.h"
#include "kernels/params.h"

namespace resa::kernels::cuda {

inline constexpr int kMaxProducts = 3;  // Of one x, in a launch.

// ---- a few rows, linear_stream.cu ---------------------------------------------------------------

// All products in one launch, at the speed at which weights can be read. With one configuration a
// row's bits depend neither on the other rows nor on their number.
inline constexpr int kMaxStreamRows = 8;

// How a launch is cut; the kernel's banner has the terms.
struct StreamConfig {
  int column_warps = 1;  // 1 or 2: a pass takes 32 columns for each.
  int cluster = 1;       // 1, or with two column warps 2: CTAs that share a sum.
  // More than half of a multiprocessor's: two CTAs of one launch there would take twice as long.
  size_t shared_bytes = size_t{200} << 10;
};

bool StreamSupports(const LinearParams* params, int count);
void LinearStream(Context& context, const LinearParams* params, int count);
// False, and nothing enqueued, when two stages do not fit.
bool LinearStreamWith(Context& context, const LinearParams* params, int count,
                      const StreamConfig& config);

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
