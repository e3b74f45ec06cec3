#ifndef RESA_ENGINE_IMPORTED_WEIGHTS_H_
#define RESA_ENGINE_IMPORTED_WEIGHTS_H_

// A model's weights where the backend wants them: ModelWeights after Ops::ImportWeights.

#include <vector>

#include "absl/status/statusor.h"
#include "engine/model_config.h"
#include "engine/weights.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"

namespace resa::engine {

// Views into the backend's memory. Matrices are bf16 [out, in], vectors f32; an absent one is null.
// D hidden size, F intermediate size, d head size, V vocabulary.
struct ImportedLayer {
  const float* attn_norm = nullptr;        // [D]
  kernels::Matrix q_proj, k_proj, v_proj;  // [Hq d, D], [Hk d, D] twice
  const float *q_bias = nullptr, *k_bias = nullptr, *v_bias = nullptr;  // or null
  const float *q_norm = nullptr, *k_norm = nullptr;                     // [d] or null
  kernels::Matrix o_proj;                                               // [D, Hq d]
  const float* o_bias = nullptr;                                        // or null
  const float* mlp_norm = nullptr;                                      // [D]
  kernels::Matrix gate_proj, up_proj, down_proj;                        // [F, D] twice, [D, F]
  const float *gate_bias = nullptr, *up_bias = nullptr, *down_bias = nullptr;  // or null
};

struct ImportedWeights {
  kernels::Matrix embed;  // [V, D]
  std::vector<ImportedLayer> layers;
  const float* final_norm = nullptr;  // [D]
  kernels::Matrix lm_head;            // [V, D]; the same memory as embed when tied.
};

// RESOURCE_EXHAUSTED when the backend has no room. REQUIRES weights loaded for `config`; they must
// outlive `ops`, since the CPU backend reads them in place.
absl::StatusOr<ImportedWeights> ImportWeights(const ModelConfig& config,
                                              const ModelWeights& weights, kernels::Ops* ops);

}  // namespace resa::engine

#endif  // RESA_ENGINE_IMPORTED_WEIGHTS_H_
