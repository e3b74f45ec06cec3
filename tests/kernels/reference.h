#ifndef RESA_TESTS_KERNELS_REFERENCE_H_
#define RESA_TESTS_KERNELS_REFERENCE_H_

// The ops in float64, one loop per formula of kernels/params.h, sharing nothing with a backend.
// Selection has its reference in tests/support/reference_selection.h.

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/params.h"

namespace resa::testing {

using Doubles = std::vector<double>;

// [rows, out] = x [rows, in] weight [out, in]^T + bias (may be empty).
Doubles ReferenceLinear(std::span<const float> x, std::span<const kernels::bf16> weight,
                        std::span<const float> bias, int64_t rows, int64_t out, int64_t in);

Doubles ReferenceRmsNorm(std::span<const float> x, std::span<const float> weight, float eps,
                         int64_t rows);

// One head after optional norm (empty: none) and rotation by cos/sin of its position.
Doubles ReferenceNormAndRope(std::span<const float> head, std::span<const float> norm, float eps,
                             std::span<const float> cos, std::span<const float> sin);

// Attention of one query head over the given tokens' keys and values [token][d].
Doubles ReferenceAttention(std::span<const float> query, const std::vector<Doubles>& keys,
                           const std::vector<Doubles>& values);

// What Sample() may answer for a row: the kept tokens with their probabilities, in the order the
// draw runs through them, and the log-probabilities of the raw logits.
struct ReferenceSample {
  struct Token {
    int32_t id;
    double probability;
  };
  std::vector<Token> kept;  // By rising id, probabilities adding up to 1
  Doubles logprobs;         // [V]
  // The token that a uniform draw picks.
  int32_t Pick(double u) const;
  // How far u is from the next boundary between two tokens.
  double DistanceToBoundary(double u) const;
};
ReferenceSample SampleReference(std::span<const float> logits, const kernels::SampleRow& row);

}  // namespace resa::testing

#endif  // RESA_TESTS_KERNELS_REFERENCE_H_
