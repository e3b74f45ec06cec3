#ifndef RESA_KERNELS_CUDA_TENSOR_MAP_H_
#define RESA_KERNELS_CUDA_TENSOR_MAP_H_

// Descriptions of bf16 arrays for the tensor copy engine.

#include <cuda.h>

#include <cstdint>
#include <initializer_list>

namespace resa::kernels::cuda {

// An array of `dims` elements, the innermost first, whose dimension i + 1 advances by strides[i]
// bytes (multiples of 16), copied in boxes. A box's innermost dimension is 64 elements, 128 bytes,
// and lies swizzled in shared memory, as wgmma and conflict-free ldmatrix want it: 16-byte unit u
// of 128-byte row r is at unit u ^ (r % 8). Boxes are then aligned to 1024 bytes there.
// `promotion`: how many bytes the L2 fetches at least when a box's row asks for 128.
CUtensorMap MakeTensorMap(const void* data, std::initializer_list<uint64_t> dims,
                          std::initializer_list<uint64_t> strides,
                          std::initializer_list<uint32_t> box,
                          CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B);

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_TENSOR_MAP_H_
