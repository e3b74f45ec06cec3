#include "engine/sampler.h"

#include <limits>

#include "absl/container/flat_hash_set.h"
#include "kernels/check.h"

namespace resa::engine {
namespace {

bool UsesPenalties(const SamplingParams& sampling) {
  return sampling.repetition_penalty != 1.0f || sampling.presence_penalty != 0.0f ||
         sampling.frequency_penalty != 0.0f;
}

// The tokens that would end the output.
absl::flat_hash_set<int32_t> EndTokens(const StopCriteria& stop,
                                       absl::Span<const int32_t> eos_ids) {
  absl::flat_hash_set<int32_t> ends(stop.token_ids.begin(), stop.token_ids.end());
  if (!stop.ignore_eos) ends.insert(eos_ids.begin(), eos_ids.end());
  return ends;
}

}  // namespace

SamplerState::SamplerState(const Request& request, int output_index,
                           absl::Span<const int32_t> eos_ids)
    : request_(&request),
      seed_(request.sampling.seed + static_cast<uint64_t>(output_index)),
      counts_tokens_(UsesPenalties(request.sampling)) {
  RESA_CHECK(output_index >= 0 && output_index < request.n) << output_index;
  bias_.reserve(request.sampling.logit_bias.size());
  for (const auto& [id, bias] : request.sampling.logit_bias) bias_.push_back({id, bias});
  if (request.stop.min_tokens > 0) {
    const absl::flat_hash_set<int32_t> banned = EndTokens(request.stop, eos_ids);
    for (const int32_t id : banned) {
      bias_before_end_.push_back({id, -std::numeric_limits<float>::infinity()});
    }
    for (const kernels::TokenBias& entry : bias_) {
      if (!banned.contains(entry.id)) bias_before_end_.push_back(entry);
    }
  }
  // Presence and frequency look at the output alone.
  if (request.sampling.repetition_penalty != 1.0f) CountPrompt();
}

void SamplerState::CountPrompt() {
  for (const int32_t id : request_->prompt) {
    const auto [it, is_new] = count_of_.try_emplace(id, static_cast<int32_t>(counts_.size()));
    if (is_new) counts_.push_back({id, 0, true});
  }
}

kernels::SampleRow SamplerState::Next() const {
  const SamplingParams& sampling = request_->sampling;
  kernels::SampleRow row;
  const auto& forced = request_->forced_tokens;
  if (static_cast<size_t>(output_count_) < forced.size()) row.forced_token = forced[output_count_];
  row.temperature = sampling.temperature;
  row.top_k = sampling.top_k;
  row.top_p = sampling.top_p;
  row.min_p = sampling.min_p;
  row.repetition_penalty = sampling.repetition_penalty;
  row.presence_penalty = sampling.presence_penalty;
  row.frequency_penalty = sampling.frequency_penalty;
  row.seed = seed_;
  row.draw_index = static_cast<uint64_t>(output_count_);
  row.top_logprobs = request_->output.top_logprobs;
  row.counts = counts_.data();
  row.num_counts = static_cast<int64_t>(counts_.size());
  const auto& bias = EndIsBanned() ? bias_before_end_ : bias_;
  row.bias = bias.data();
  row.num_bias = static_cast<int64_t>(bias.size());
  return row;
}

void SamplerState::Accept(int32_t token) {
  ++output_count_;
  if (!counts_tokens_) return;
  const auto [it, is_new] = count_of_.try_emplace(token, static_cast<int32_t>(counts_.size()));
  if (is_new) counts_.push_back({token, 0, false});
  ++counts_[it->second].output_count;
}

}  // namespace resa::engine
