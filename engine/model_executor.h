#ifndef RESA_ENGINE_MODEL_EXECUTOR_H_
#define RESA_ENGINE_MODEL_EXECUTOR_H_

// The real executor: a step's segments become a ragged batch, go through the transformer, and the
// rows that sample are sampled.

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/executor.h"
#include "engine/kv_memory.h"
#include "engine/model_config.h"
#include "engine/ragged_batch.h"
#include "engine/transformer.h"
#include "engine/weights.h"
#include "kernels/ops.h"

namespace resa::engine {

// Thread: the engine's. `weights` and `ops` must outlive it.
class ModelExecutor : public Executor {
 public:
  // Imports the weights and allocates pool and workspaces: everything that a step will need.
  // REQUIRES a layout made for this model (LayoutFor). RESOURCE_EXHAUSTED or INVALID_ARGUMENT when
  // the backend has no room or cannot hold K and V in the layout's type.
  static absl::StatusOr<std::unique_ptr<ModelExecutor>> Create(const ModelConfig& config,
                                                               const ModelWeights& weights,
                                                               const kernels::KvLayout& layout,
                                                               const BatchLimits& limits,
                                                               kernels::Ops* ops);

  // Execute REQUIRES segments as RaggedBatch::Build wants them. Always OK: what a model can do
  // wrong, logits that are not finite, is told per sample.
  const KvMemory& kv() const { return *kv_; }

 private:
  absl::Status DoExecute(const StepInput& input, StepOutput* output,
                         absl::FunctionRef<void()> meanwhile) override;

  ModelExecutor(const ModelConfig& config, const BatchLimits& limits,
                const kernels::KvLayout& layout, kernels::Ops* ops)
      : num_heads_(config.num_heads), ops_(ops), batch_(limits, layout) {}

  const int num_heads_;
  kernels::Ops* const ops_;
  RaggedBatch batch_;
  std::unique_ptr<KvMemory> kv_;
  std::unique_ptr<Transformer> transformer_;
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_MODEL_EXECUTOR_H_
