#ifndef RESA_KERNELS_CUDA_CUBLAS_LIBRARY_H_
#define RESA_KERNELS_CUDA_CUBLAS_LIBRARY_H_

// cuBLASLt, opened when a GPU is used and not when the process starts. So a daemon that was built
// with CUDA runs where there is none; and the library's 94 KB of thread-local memory, which the
// loader would take from the stack of every thread, stays out of threads that have only 100 KB.
//
// cublas_library.cc defines those functions of cublasLt.h that the kernels use; each forwards to
// the library. REQUIRES OpenCublas() before the first.

#include <cublasLt.h>

#include <string>

#include "kernels/check.h"

namespace resa::kernels::cuda {

#define RESA_CUBLAS_CHECK(call)                                   \
  do {                                                            \
    const cublasStatus_t resa_status = (call);                    \
    RESA_CHECK(resa_status == CUBLAS_STATUS_SUCCESS)              \
        << #call << ": " << cublasLtGetStatusString(resa_status); \
  } while (0)

// Empty, or why the library cannot be used and what to do. Opens it once.
std::string OpenCublas();

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_CUBLAS_LIBRARY_H_
