#ifndef RESA_ENGINE_TRANSFORMER_H_
#define RESA_ENGINE_TRANSFORMER_H_

// The decoder: embedding, layers of attention and gated MLP, output head. The same for every
// architecture we serve; what differs (biases, q/k norms, rotary scaling) is data.

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/activations.h"
#include "engine/imported_weights.h"
#include "engine/kv_memory.h"
#include "engine/model_config.h"
#include "engine/ragged_batch.h"
#include "engine/weights.h"
#include "kernels/ops.h"

namespace resa::engine {

// Thread: the engine's. A row's result depends on its own sequence alone, bit for bit where the
// backend promises so, however the rows are batched.
class Transformer {
 public:
  // Imports the weights and allocates all workspaces; Forward and Logits allocate nothing.
  // RESOURCE_EXHAUSTED when the backend has no room. `weights` and `ops` must outlive it.
  // `max_block_ids`: RaggedBatch::max_block_ids().
  static absl::StatusOr<std::unique_ptr<Transformer>> Create(const ModelConfig& config,
                                                             const ModelWeights& weights,
                                                             const BatchLimits& limits,
                                                             int64_t max_block_ids,
                                                             kernels::Ops* ops);

  // Runs every layer over the batch. Each row's K, V and descriptors enter `kv` before any row
  // attends, so the rows of a segment see each other.
  void Forward(const RaggedBatch& batch, const KvMemory& kv);

  // Logits [rows.size(), V] of some rows of the last Forward, which may be asked for repeatedly.
  // Overwrites what the last call returned. REQUIRES at most limits.max_segments rows.
  kernels::Matrix Logits(absl::Span<const int32_t> rows);

 private:
  Transformer(const ModelConfig& config, kernels::Ops* ops);

  void RunLayer(int index, const RaggedBatch& batch, const KvMemory& kv,
                const Activations& a) const;
  void Attend(const RaggedBatch& batch, const kernels::KvLayer& kv, const Activations& a) const;

  // Constant after Create.
  const ModelConfig config_;
  kernels::Ops* const ops_;
  ImportedWeights weights_;
  std::unique_ptr<ActivationMemory> memory_;
  std::unique_ptr<kernels::Buffer> inv_freq_;  // [d / 2] f32

  int32_t rows_ = 0;  // Of the last Forward.
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_TRANSFORMER_H_
