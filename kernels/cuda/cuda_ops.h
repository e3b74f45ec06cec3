#ifndef RESA_KERNELS_CUDA_CUDA_OPS_H_
#define RESA_KERNELS_CUDA_CUDA_OPS_H_

// The CUDA backend: kernels for NVIDIA GPUs of compute capability 9.0 (Hopper).
//
// Activations, K and V are bf16, logits and all sums f32. Pointers of the params are device memory
// except the step's small lists, which are host memory and copied (kernels/params.h, StepLists).
// Ops are enqueued on one stream and return before they are done; Sample, RunStep with samples and
// Download wait. Decode steps are recorded as CUDA graphs, keyed by their counts, and replayed.
//
// Attention, selection and sampling of a row do not depend on the other rows of the batch, bit for
// bit. Products do, within rounding, unless CudaOptions::deterministic.

#include <memory>
#include <string>

#include "kernels/ops.h"

namespace resa::kernels {

struct CudaOptions {
  int device = 0;              // As the CUDA driver counts them.
  bool deterministic = false;  // Products of a row do not depend on the other rows; slower prefill.
};

// The GPUs that the driver shows to this process; 0 without a driver.
int CudaDeviceCount();

// Null when the device cannot be used: no driver, no such device, or of another generation than the
// kernels were compiled for; `why_not` then says so with the numbers.
std::unique_ptr<Ops> CreateCudaOps(const CudaOptions& options, std::string* why_not);

}  // namespace resa::kernels

#endif  // RESA_KERNELS_CUDA_CUDA_OPS_H_
