#ifndef RESA_ENGINE_ACTIVATIONS_H_
#define RESA_ENGINE_ACTIVATIONS_H_

// The transformer's workspace: every intermediate of a step, allocated once for the largest.

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model_config.h"
#include "engine/ragged_batch.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"

namespace resa::engine {

// Views for one step. T rows, A the backend's activation type.
struct Activations {
  kernels::Matrix hidden;        // [T, D] A: the residual stream
  kernels::Matrix normed;        // [T, D] A
  kernels::Matrix q;             // [T, Hq * d] A
  kernels::Matrix k;             // [T, Hk * d] A
  kernels::Matrix v;             // [T, Hk * d] A
  kernels::Matrix attended;      // [T, Hq * d] A
  kernels::Matrix gate;          // [T, F] A
  kernels::Matrix up;            // [T, F] A
  float* cos = nullptr;          // [T, d / 2]
  float* sin = nullptr;          // [T, d / 2]
  int32_t* block_ids = nullptr;  // What Select kept, all sparse rows.
};

// What the head needs for R rows.
struct HeadActivations {
  kernels::Matrix hidden;  // [R, D] A
  kernels::Matrix logits;  // [R, V] f32
};

// Owns the memory. Thread: the engine's.
class ActivationMemory {
 public:
  // RESOURCE_EXHAUSTED when the backend cannot give the memory. `block_ids`: at most in a step.
  static absl::StatusOr<std::unique_ptr<ActivationMemory>> Create(const ModelConfig& config,
                                                                  const BatchLimits& limits,
                                                                  int64_t block_ids,
                                                                  kernels::Ops* ops);

  // REQUIRES 0 <= rows <= limits.max_rows.
  Activations ForRows(int64_t rows) const;
  // REQUIRES 0 <= rows <= limits.max_segments.
  HeadActivations ForHead(int64_t rows) const;

  // What Create allocates, for the start-up log and the memory budget.
  static size_t BytesNeeded(const ModelConfig& config, const BatchLimits& limits, int64_t block_ids,
                            kernels::DType activation_dtype);

 private:
  ActivationMemory() = default;

  std::vector<std::unique_ptr<kernels::Buffer>> buffers_;
  Activations largest_;
  HeadActivations largest_head_;
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_ACTIVATIONS_H_
