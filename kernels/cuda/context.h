#ifndef RESA_KERNELS_CUDA_CONTEXT_H_
#define RESA_KERNELS_CUDA_CONTEXT_H_

// What a CUDA kernel's launcher works with beside its params: the device, one stream, and memory
// that grows to the largest step seen and is then reused.

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/check.h"

namespace resa::kernels::cuda {

// Ends the process on an error: after start a CUDA error is fatal, restarting is the recovery.
#define RESA_CUDA_CHECK(call)                                    \
  do {                                                           \
    const cudaError_t resa_cuda_error = (call);                  \
    RESA_CHECK(resa_cuda_error == cudaSuccess)                   \
        << #call << ": " << cudaGetErrorString(resa_cuda_error); \
  } while (0)

struct DeviceInfo {
  int index = 0;
  std::string name;
  int sms = 0;
  size_t l2_bytes = 0;
  size_t memory_bytes = 0;
  size_t shared_bytes_per_block = 0;  // With the opt-in attribute.
};

// Device memory whose contents survive nothing. It grows in eager steps only: a recorded graph
// holds its address.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();

  // At least `bytes`, 256-byte aligned, valid until a larger Reserve. REQUIRES that no graph is
  // being recorded when it has to grow (cudaMalloc fails then).
  std::byte* Reserve(size_t bytes);
  size_t bytes() const { return bytes_; }
  // How often it has grown: recorded graphs of an earlier generation are stale.
  int generation() const { return generation_; }

 private:
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
  int generation_ = 0;
};

// Counters that kernels raise and must find at zero: zeroed when allocated, and left at zero by
// every kernel that uses them ("the last arriver resets").
class ZeroedScratch {
 public:
  ZeroedScratch() = default;
  ZeroedScratch(const ZeroedScratch&) = delete;
  ZeroedScratch& operator=(const ZeroedScratch&) = delete;
  ~ZeroedScratch();

  uint32_t* Reserve(size_t count, cudaStream_t stream);
  int generation() const { return generation_; }

 private:
  uint32_t* data_ = nullptr;
  size_t count_ = 0;
  int generation_ = 0;
};

class ChunkPlanner;

struct CublasPlans;  // linear_cublas.cc

// One of each for every family of kernels that needs it, so that none is in another's way.
struct Context {
  DeviceInfo device;
  cudaStream_t stream = nullptr;
  bool deterministic = false;  // A row's bits may not depend on the other rows.

  cublasLtHandle_t cublas = nullptr;
  Scratch cublas_workspace;
  std::shared_ptr<CublasPlans> cublas_plans;

  ZeroedScratch decode_partials;
  ZeroedScratch decode_counters;
  Scratch chunk_partials;
  std::shared_ptr<ChunkPlanner> chunk_planner;  // ChunkAttend's, made when first used.
  Scratch select;
  ZeroedScratch select_counters;
  ZeroedScratch select_parcels;  // Of one size for ever, so that no recording's address goes stale.
};

}  // namespace resa::kernels::cuda

#endif  // RESA_KERNELS_CUDA_CONTEXT_H_
