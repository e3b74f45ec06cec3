#include "kernels/cuda/cublas_library.h"

#include <cublasLt.h>
#include <dlfcn.h>

#include "kernels/check.h"

namespace resa::kernels::cuda {
namespace {

constexpr int kMajor = CUBLAS_VER_MAJOR;

struct Library {
  void* handle = nullptr;
  std::string why_not;

  Library() {
    const std::string name = "libcublasLt.so." + std::to_string(kMajor);
    for (const std::string& path : {name, "/usr/local/cuda/lib64/" + name}) {
      handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
      if (handle != nullptr) return;
    }
    why_not = name + " cannot be opened (" + dlerror() + "); install cuBLAS of CUDA " +
              std::to_string(kMajor) + " or add its folder to LD_LIBRARY_PATH";
  }
};

const Library& TheLibrary() {
  static const Library* const library = new Library;
  return *library;
}

template <class Function>
Function* Find(const char* name) {
  RESA_CHECK(TheLibrary().handle != nullptr) << name << " before OpenCublas()";
  void* const found = dlsym(TheLibrary().handle, name);
  RESA_CHECK(found != nullptr) << "libcublasLt has no " << name;
  return reinterpret_cast<Function*>(found);
}

}  // namespace

std::string OpenCublas() { return TheLibrary().why_not; }

}  // namespace resa::kernels::cuda

#define RESA_FORWARD(result, name, parameters, arguments)                          \
  result CUBLASWINAPI name parameters {                                            \
    static const auto function = resa::kernels::cuda::Find<decltype(name)>(#name); \
    return function arguments;                                                     \
  }

extern "C" {
RESA_FORWARD(cublasStatus_t, cublasLtCreate, (cublasLtHandle_t * handle), (handle))
RESA_FORWARD(cublasStatus_t, cublasLtDestroy, (cublasLtHandle_t handle), (handle))
RESA_FORWARD(const char*, cublasLtGetStatusString, (cublasStatus_t status), (status))
RESA_FORWARD(cublasStatus_t, cublasLtMatmul,
             (cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void* alpha, const void* a,
              cublasLtMatrixLayout_t a_desc, const void* b, cublasLtMatrixLayout_t b_desc,
              const void* beta, const void* c, cublasLtMatrixLayout_t c_desc, void* d,
              cublasLtMatrixLayout_t d_desc, const cublasLtMatmulAlgo_t* algo, void* workspace,
              size_t workspace_bytes, cudaStream_t stream),
             (handle, desc, alpha, a, a_desc, b, b_desc, beta, c, c_desc, d, d_desc, algo,
              workspace, workspace_bytes, stream))
RESA_FORWARD(cublasStatus_t, cublasLtMatmulAlgoGetHeuristic,
             (cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
              cublasLtMatmulPreference_t preference, int wanted,
              cublasLtMatmulHeuristicResult_t* results, int* found),
             (handle, desc, a, b, c, d, preference, wanted, results, found))
RESA_FORWARD(cublasStatus_t, cublasLtMatmulDescCreate,
             (cublasLtMatmulDesc_t * desc, cublasComputeType_t compute, cudaDataType_t scale),
             (desc, compute, scale))
RESA_FORWARD(cublasStatus_t, cublasLtMatmulDescDestroy, (cublasLtMatmulDesc_t desc), (desc))
RESA_FORWARD(cublasStatus_t, cublasLtMatmulPreferenceCreate,
             (cublasLtMatmulPreference_t * preference), (preference))
RESA_FORWARD(cublasStatus_t, cublasLtMatmulPreferenceDestroy,
             (cublasLtMatmulPreference_t preference), (preference))
RESA_FORWARD(cublasStatus_t, cublasLtMatrixLayoutCreate,
             (cublasLtMatrixLayout_t * layout, cudaDataType type, uint64_t rows, uint64_t columns,
              int64_t stride),
             (layout, type, rows, columns, stride))
RESA_FORWARD(cublasStatus_t, cublasLtMatrixLayoutDestroy, (cublasLtMatrixLayout_t layout), (layout))
RESA_FORWARD(cublasStatus_t, cublasLtMatmulDescInit_internal,
             (cublasLtMatmulDesc_t desc, size_t size, cublasComputeType_t compute,
              cudaDataType_t scale),
             (desc, size, compute, scale))
RESA_FORWARD(cublasStatus_t, cublasLtMatmulDescSetAttribute,
             (cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,
              const void* value, size_t bytes),
             (desc, attribute, value, bytes))
RESA_FORWARD(cublasStatus_t, cublasLtMatmulPreferenceInit_internal,
             (cublasLtMatmulPreference_t preference, size_t size), (preference, size))
RESA_FORWARD(cublasStatus_t, cublasLtMatmulPreferenceSetAttribute,
             (cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute,
              const void* value, size_t bytes),
             (preference, attribute, value, bytes))
RESA_FORWARD(cublasStatus_t, cublasLtMatrixLayoutInit_internal,
             (cublasLtMatrixLayout_t layout, size_t size, cudaDataType type, uint64_t rows,
              uint64_t columns, int64_t stride),
             (layout, size, type, rows, columns, stride))
}  // extern "C"

#undef RESA_FORWARD
