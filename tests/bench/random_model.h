#ifndef RESA_TESTS_BENCH_RANDOM_MODEL_H_
#define RESA_TESTS_BENCH_RANDOM_MODEL_H_

// Models of well-known shapes with random weights: speed depends on the shape alone, and a few
// gigabytes of weights are made in a second, by all cores.

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "engine/model_config.h"
#include "engine/model_files.h"

namespace resa::bench {

// Names that ConfigOfShape takes.
std::vector<std::string> ShapeNames();

// The configuration of a named shape; "NAME-4l" cuts it to its first 4 layers. INVALID_ARGUMENT
// with the known names for any other, and for a cut to nothing or beyond the shape's own depth.
absl::StatusOr<engine::ModelConfig> ConfigOfShape(absl::string_view name);

// Weights from `seed` alone, in memory of their own. Matrices are bf16 of variance 1 / in, so that
// activations keep their size and logits stay finite; norms are 1, biases small. Their values are
// cut from one short bank of normal numbers and repeat, which no kernel notices. They do not depend
// on the number of cores.
// RESOURCE_EXHAUSTED when the memory cannot be had.
absl::StatusOr<engine::LoadedModel> MakeRandomModel(const engine::ModelConfig& config,
                                                    uint64_t seed);

}  // namespace resa::bench

#endif  // RESA_TESTS_BENCH_RANDOM_MODEL_H_
