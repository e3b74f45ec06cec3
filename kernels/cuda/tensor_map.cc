#include "kernels/cuda/tensor_map.h"

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <vector>

#include "kernels/check.h"
#include "kernels/cuda/context.h"

namespace resa::kernels::cuda {
namespace {

// Looked up at run time, so that a program for any machine need not link the driver's library.
PFN_cuTensorMapEncodeTiled_v12000 EncodeFunction() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  RESA_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                   cudaEnableDefault, &result));
  RESA_CHECK(result == cudaDriverEntryPointSuccess) << "the driver has no cuTensorMapEncodeTiled";
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

}  // namespace

CUtensorMap MakeTensorMap(const void* data, std::initializer_list<uint64_t> dims,
                          std::initializer_list<uint64_t> strides,
                          std::initializer_list<uint32_t> box, CUtensorMapL2promotion promotion) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = EncodeFunction();
  RESA_CHECK(strides.size() + 1 == dims.size() && box.size() == dims.size());
  const std::vector<uint32_t> element_strides(dims.size(), 1);
  CUtensorMap map;
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, static_cast<uint32_t>(dims.size()),
             const_cast<void*>(data), dims.begin(), strides.begin(), box.begin(),
             element_strides.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  RESA_CHECK(result == CUDA_SUCCESS) << "cuTensorMapEncodeTiled: error " << result;
  return map;
}

}  // namespace resa::kernels::cuda
