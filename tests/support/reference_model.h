#ifndef RESA_TESTS_SUPPORT_REFERENCE_MODEL_H_
#define RESA_TESTS_SUPPORT_REFERENCE_MODEL_H_

// The bridge between the engine's model and the reference's: the same weights, in float64.

#include "engine/model_config.h"
#include "engine/weights.h"
#include "tests/support/resa_reference.h"

namespace resa::testing {

// A copy of the weights. REQUIRES no biases beyond those of q, k and v.
ReferenceModel ReferenceModelOf(const engine::ModelConfig& config,
                                const engine::ModelWeights& weights);

}  // namespace resa::testing

#endif  // RESA_TESTS_SUPPORT_REFERENCE_MODEL_H_
