#ifndef RESA_TESTS_SIM_TOY_MODEL_H_
#define RESA_TESTS_SIM_TOY_MODEL_H_

// A language model made of hashes. What a real model computes from a token and the K/V before it,
// this one hashes, so any wrong byte in any earlier position changes everything after it: a stale
// page, a missed rectification or a repeated draw shows in the very next token.
//
// The K/V of a token at position p are one number,
//   content(p) = H(token, p, how it attended, sum of content(0 .. p - 1)).
// "How" is dense, or the budget of the sparse step. Call it exact when the whole history was
// attended densely; it then follows from the tokens alone. Beside it lies a hash of the tokens
// 0 .. p, which says for which prefix the content was made.

#include <cstdint>
#include <optional>

#include "engine/attention_policy.h"
#include "kernels/params.h"

namespace resa::sim {

// One token's K/V in the pool.
struct Cell {
  uint64_t content = 0;
  uint64_t prefix = 0;

  friend bool operator==(const Cell&, const Cell&) = default;
  Cell& operator+=(const Cell& other) {
    content += other.content;
    prefix += other.prefix;
    return *this;
  }
  Cell& operator-=(const Cell& other) {
    content -= other.content;
    prefix -= other.prefix;
    return *this;
  }
};

// `history`: the sum of the contents of all positions before.
uint64_t Content(int32_t token, int32_t position, const std::optional<engine::SparseBudget>& sparse,
                 uint64_t history);

// The hash of a prefix that is one token longer; 0 is the empty one.
uint64_t ExtendPrefix(uint64_t prefix, int32_t token);

// What `row` draws after a token with this content: a hash of the content, the seed, the draw's
// index, the temperature, the biases and the penalties' counts. Banned tokens are not drawn, a
// forced one is taken. A row with min_p >= kFickleMinP now and then has logits that are not finite.
inline constexpr float kFickleMinP = 0.99f;
kernels::SampleResult Draw(const kernels::SampleRow& row, uint64_t content, int32_t vocab_size);

}  // namespace resa::sim

#endif  // RESA_TESTS_SIM_TOY_MODEL_H_
