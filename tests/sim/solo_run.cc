#include "tests/sim/solo_run.h"

#include <algorithm>
#include <limits>

#include "kernels/check.h"

namespace resa::sim {
namespace {

using engine::AttentionMode;

testing::ReferenceMode ReferenceModeOf(AttentionMode mode) {
  switch (mode) {
    case AttentionMode::kDense:
      return testing::ReferenceMode::kDense;
    case AttentionMode::kSparse:
      return testing::ReferenceMode::kSparse;
    case AttentionMode::kRectified:
      return testing::ReferenceMode::kRectified;
  }
  RESA_CHECK(false);
  return testing::ReferenceMode::kDense;
}

testing::ScheduleRules RulesOf(const engine::AttentionPolicy& policy,
                               const engine::SchedulerLimits& limits) {
  testing::ScheduleRules rules;
  rules.mode = ReferenceModeOf(policy.mode);
  rules.keep_ratio = policy.keep_ratio;
  rules.min_tokens = policy.min_tokens;
  rules.local_tokens = policy.local_tokens;
  rules.sink_tokens = policy.sink_tokens;
  rules.interval = policy.rectify_interval;
  rules.block_tokens = limits.selector.block_tokens;
  rules.sparse_from = limits.sparse_from;
  return rules;
}

int32_t MaxOutput(const engine::Request& request, const engine::ModelLimits& limits) {
  const int64_t room = std::min<int64_t>(limits.max_context, limits.pool_tokens) -
                       static_cast<int64_t>(request.prompt.size());
  return static_cast<int32_t>(std::min<int64_t>(room, request.stop.max_tokens.value_or(room)));
}

Cell Difference(Cell a, const Cell& b) {
  a -= b;
  return a;
}

}  // namespace

SoloRun::SoloRun(const engine::Request& request, int32_t index,
                 const engine::EngineOptions& options)
    : request_(request),
      options_(options),
      index_(index),
      prompt_len_(static_cast<int32_t>(request.prompt.size())),
      max_output_(MaxOutput(request, options.limits)),
      tokens_(request.prompt),
      schedule_(testing::MakeSchedule(prompt_len_, max_output_,
                                      RulesOf(request.attention, options.scheduler))) {
  const size_t most = static_cast<size_t>(prompt_len_) + max_output_ + 1;
  tokens_.reserve(most);
  cells_.reserve(most);
  exact_cells_.reserve(most);
  cells_.emplace_back();
  exact_cells_.emplace_back();
  for (int32_t position = 0; position < prompt_len_; ++position) {
    AppendCell(position, std::nullopt);
    if (request.sampling.repetition_penalty != 1.0f) Count(tokens_[position], /*in_prompt=*/true);
  }
  exact_len_ = prompt_len_;
}

// The cell of `position` as the next one, and, when it is new, its exact form.
void SoloRun::AppendCell(int32_t position, const std::optional<engine::SparseBudget>& sparse) {
  RESA_CHECK_EQ(position, kv_len());
  const int32_t token = tokens_[position];
  if (position + 1 == static_cast<int32_t>(exact_cells_.size())) {
    last_prefix_ = ExtendPrefix(last_prefix_, token);
    Cell exact{Content(token, position, std::nullopt, exact_cells_.back().content), last_prefix_};
    exact += exact_cells_.back();
    exact_cells_.push_back(exact);
  }
  last_content_ = Content(token, position, sparse, cells_.back().content);
  Cell cell{last_content_, ExactCells(position, position + 1).prefix};
  cell += cells_.back();
  cells_.push_back(cell);
}

void SoloRun::TakeStep(const testing::ScheduleStep& step) {
  using Kind = testing::ScheduleStep::Kind;
  RESA_CHECK_EQ(step.end, static_cast<int32_t>(tokens_.size()));
  switch (step.kind) {
    case Kind::kSparse:
      AppendCell(step.begin,
                 engine::SparseBudget{step.budget.keep, step.budget.local, step.budget.sink});
      ++attention_.sparse_steps;
      break;
    case Kind::kDense:
      AppendCell(step.begin, std::nullopt);
      ++attention_.dense_steps;
      break;
    case Kind::kWindow:
      cells_.resize(step.begin + 1);
      for (int32_t position = step.begin; position < step.end; ++position) {
        AppendCell(position, std::nullopt);
      }
      ++attention_.rectifications;
      attention_.rectified_rows += step.end - step.begin;
      break;
  }
  exact_len_ = step.exact_len;
}

SoloRun::Token SoloRun::Next() {
  RESA_CHECK_LT(output_len(), max_output_);
  if (output_len() > 0) TakeStep(schedule_[output_len() - 1]);
  Token token;
  token.sample = Draw(MakeRow(), last_content_, options_.limits.vocab_size);
  if (!token.sample.finite) return token;
  const bool forced = output_len() < static_cast<int32_t>(request_.forced_tokens.size());
  tokens_.push_back(token.sample.token);
  Count(token.sample.token, /*in_prompt=*/false);
  if (!forced && IsEndToken(token.sample.token)) {
    token.ends = true;
    token.stop_token = token.sample.token;
  } else if (output_len() == max_output_) {
    token.ends = true;
    token.reason = engine::FinishReason::kLength;
  }
  return token;
}

void SoloRun::MakeExact() {
  RESA_CHECK(request_.attention.mode == AttentionMode::kSparse);
  std::copy(exact_cells_.begin(), exact_cells_.begin() + static_cast<int64_t>(cells_.size()),
            cells_.begin());
}

Cell SoloRun::Cells(int32_t begin, int32_t end) const {
  return Difference(cells_[end], cells_[begin]);
}

Cell SoloRun::ExactCells(int32_t begin, int32_t end) const {
  return Difference(exact_cells_[end], exact_cells_[begin]);
}

kernels::SampleRow SoloRun::MakeRow() {
  const engine::SamplingParams& sampling = request_.sampling;
  const size_t drawn = static_cast<size_t>(output_len());
  kernels::SampleRow row;
  row.seed = sampling.seed + static_cast<uint64_t>(index_);
  row.draw_index = drawn;
  row.temperature = sampling.temperature;
  row.min_p = sampling.min_p;
  row.repetition_penalty = sampling.repetition_penalty;
  row.presence_penalty = sampling.presence_penalty;
  row.frequency_penalty = sampling.frequency_penalty;
  row.top_logprobs = request_.output.top_logprobs;
  if (drawn < request_.forced_tokens.size()) row.forced_token = request_.forced_tokens[drawn];
  row.counts = counts_.data();
  row.num_counts = static_cast<int64_t>(counts_.size());

  const bool too_early = static_cast<int32_t>(drawn) < request_.stop.min_tokens;
  bias_.clear();
  for (const auto& [id, bias] : sampling.logit_bias) {
    if (!too_early || !IsEndToken(id)) bias_.push_back({id, bias});
  }
  if (too_early) {
    for (int32_t id = 0; id < options_.limits.vocab_size; ++id) {
      if (IsEndToken(id)) bias_.push_back({id, -std::numeric_limits<float>::infinity()});
    }
  }
  row.bias = bias_.data();
  row.num_bias = static_cast<int64_t>(bias_.size());
  return row;
}

bool SoloRun::IsEndToken(int32_t token) const {
  const auto is_in = [token](const std::vector<int32_t>& ids) {
    return std::find(ids.begin(), ids.end(), token) != ids.end();
  };
  return is_in(request_.stop.token_ids) || (!request_.stop.ignore_eos && is_in(options_.eos_ids));
}

void SoloRun::Count(int32_t token, bool in_prompt) {
  const engine::SamplingParams& sampling = request_.sampling;
  if (sampling.repetition_penalty == 1.0f && sampling.presence_penalty == 0.0f &&
      sampling.frequency_penalty == 0.0f) {
    return;
  }
  auto found =
      std::find_if(counts_.begin(), counts_.end(),
                   [token](const kernels::TokenCount& count) { return count.id == token; });
  if (found == counts_.end()) found = counts_.insert(counts_.end(), {token, 0, false});
  if (in_prompt) {
    found->in_prompt = true;
  } else {
    ++found->output_count;
  }
}

}  // namespace resa::sim
