#include "tests/sim/toy_model.h"

#include <bit>
#include <cmath>

#include "kernels/check.h"
#include "tests/sim/random.h"

namespace resa::sim {
namespace {

// One draw in this many of a fickle row is not finite.
constexpr uint64_t kFickleness = 64;

// What the penalties would see: the same for equal counts, however they are listed.
uint64_t HashPenalties(const kernels::SampleRow& row) {
  const bool repetition = row.repetition_penalty != 1.0f;
  const bool frequency = row.presence_penalty != 0.0f || row.frequency_penalty != 0.0f;
  uint64_t sum = 0;
  for (int64_t i = 0; i < row.num_counts; ++i) {
    const kernels::TokenCount& count = row.counts[i];
    const uint64_t effect = (repetition && (count.in_prompt || count.output_count > 0) ? 1 : 0) +
                            (frequency ? 2 * static_cast<uint64_t>(count.output_count) : 0);
    if (effect != 0) sum += Mix(static_cast<uint64_t>(count.id), effect);
  }
  return sum;
}

uint64_t HashBiases(const kernels::SampleRow& row) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < row.num_bias; ++i) {
    sum += Mix(static_cast<uint64_t>(row.bias[i].id), std::bit_cast<uint32_t>(row.bias[i].bias));
  }
  return sum;
}

bool IsBanned(const kernels::SampleRow& row, int32_t token) {
  for (int64_t i = 0; i < row.num_bias; ++i) {
    if (row.bias[i].id == token && std::isinf(row.bias[i].bias)) return true;
  }
  return false;
}

}  // namespace

uint64_t Content(int32_t token, int32_t position, const std::optional<engine::SparseBudget>& sparse,
                 uint64_t history) {
  uint64_t hash = Mix(static_cast<uint64_t>(token), static_cast<uint64_t>(position));
  if (sparse.has_value()) {
    hash = Mix(hash, static_cast<uint64_t>(sparse->keep_blocks));
    hash = Mix(hash, static_cast<uint64_t>(sparse->local_blocks));
    hash = Mix(hash, static_cast<uint64_t>(sparse->sink_blocks));
  }
  return Mix(hash, history);
}

uint64_t ExtendPrefix(uint64_t prefix, int32_t token) {
  return Mix(prefix, static_cast<uint64_t>(token));
}

kernels::SampleResult Draw(const kernels::SampleRow& row, uint64_t content, int32_t vocab_size) {
  uint64_t hash = Mix(content, row.seed);
  hash = Mix(hash, row.draw_index);
  hash = Mix(hash, std::bit_cast<uint32_t>(row.temperature));
  hash = Mix(hash, HashPenalties(row));
  hash = Mix(hash, HashBiases(row));

  kernels::SampleResult result;
  if (row.min_p >= kFickleMinP && (hash >> 32) % kFickleness == 0) {
    result.finite = false;
    return result;
  }
  result.token = static_cast<int32_t>(hash % static_cast<uint64_t>(vocab_size));
  for (int32_t tried = 0; IsBanned(row, result.token); ++tried) {
    RESA_CHECK_LT(tried, vocab_size);
    result.token = (result.token + 1) % vocab_size;
  }
  if (row.forced_token >= 0) result.token = row.forced_token;
  result.logprob = -static_cast<float>(hash >> 40) / 1e6f;
  result.num_top = row.top_logprobs;
  for (int32_t i = 0; i < result.num_top; ++i) {
    result.top_ids[i] = (result.token + i) % vocab_size;
    result.top_logprobs[i] = result.logprob - static_cast<float>(i);
  }
  return result;
}

}  // namespace resa::sim
