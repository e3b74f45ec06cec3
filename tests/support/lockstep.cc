#include "tests/support/lockstep.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <random>
#include <set>
#include <sstream>
#include <utility>

#include "kernels/bf16.h"
#include "kernels/check.h"
#include "kernels/sketch.h"
#include "tests/support/kv_snapshot.h"
#include "tests/support/reference_model.h"

namespace resa::testing {
namespace {

constexpr size_t kMaxFailures = 8;

double RelativeError(const Vector& expected, std::span<const double> actual) {
  double error = 0, norm = 0;
  for (size_t j = 0; j < expected.size(); ++j) {
    error += (expected[j] - actual[j]) * (expected[j] - actual[j]);
    norm += expected[j] * expected[j];
  }
  return std::sqrt(error / norm);
}

// Keeps the maximum, and NaN once seen.
void KeepMax(double* max, double x) {
  if (!(x <= *max)) *max = x;
}

}  // namespace

Lockstep::Lockstep(const engine::LoadedModel& model, const LockstepOptions& options,
                   kernels::Ops* ops)
    : config_(model.config),
      tolerance_(options.tolerance),
      kv_dtype_(options.kv_dtype),
      ops_(ops),
      model_(ReferenceModelOf(model.config, model.weights)) {
  ReferenceOptions reference;
  reference.selector = options.selector;
  reference.kv_in_bf16 = options.kv_dtype == kernels::DType::kBF16;
  reference.angles_in_f32 = true;
  reference.tolerance = tolerance_.selection;
  for (int j = 0; j < config_.head_dim; ++j) {
    reference.signs.push_back(static_cast<int>(kernels::SketchSign(j)));
  }
  if (options.plant) options.plant(&reference);
  reference_ = std::make_unique<ReferenceDecoder>(&model_, reference);

  const int pages = (options.max_context + kernels::kPageTokens - 1) / kernels::kPageTokens;
  Pages all(2 * pages);
  std::iota(all.begin(), all.end(), 0);
  std::shuffle(all.begin(), all.end(), std::mt19937(7));
  pages_.assign(all.begin(), all.begin() + pages);
  other_pages_.assign(all.begin() + pages, all.end());
  auto executor = engine::ModelExecutor::Create(
      config_, model.weights, engine::LayoutFor(config_, options.selector, kv_dtype_, 2 * pages),
      {.max_rows = 512, .max_segments = 1, .max_pages_per_sequence = pages}, &ops_);
  RESA_CHECK(executor.ok()) << executor.status();
  executor_ = *std::move(executor);

  ops_.after_select = [this](const kernels::SelectParams& p) {
    RESA_CHECK_EQ(p.num_rows, 1);
    const float* q = p.q.f32() + p.rows[0].row * p.q.cols;
    queries_.emplace_back(q, q + p.q.cols);
    const int32_t* ids = p.ids + p.rows[0].ids_begin;
    selected_.emplace_back(ids, ids + int64_t{p.layout.num_kv_heads} * p.rows[0].keep_blocks);
  };
  ops_.before_sample = [this](const kernels::SampleParams& p) {
    RESA_CHECK_EQ(p.num_rows, 1);
    const float* row = p.logits.f32() + p.rows[0].row * p.logits.cols;
    logits_.assign(row, row + p.logits.cols);
  };
}

LockstepReport Lockstep::Run(const std::vector<int32_t>& prompt,
                             const std::vector<ScheduleStep>& schedule, int chunk) {
  tokens_ = prompt;
  const int length = static_cast<int>(prompt.size());
  Prefill(length, chunk, pages_, /*sample=*/true);
  const std::vector<int> copy(prompt.begin(), prompt.end());
  CompareLogits(reference_->Dense(copy, 0), tokens_.back());
  CompareKv(0, length);
  for (const ScheduleStep& step : schedule) {
    RESA_CHECK_EQ(step.end, static_cast<int>(tokens_.size()));
    TakeStep(step);
    if (!report_.failures.empty()) break;  // What follows would only repeat the first one.
  }
  report_.output.assign(tokens_.begin() + length, tokens_.end());
  report_.distinct_tokens =
      static_cast<int>(std::set<int32_t>(report_.output.begin(), report_.output.end()).size());
  return report_;
}

std::string Lockstep::DifferenceFromPrefill(int length, int chunk) {
  Prefill(length, chunk, other_pages_, /*sample=*/false);
  const KvSnapshot ours = SnapshotKv(executor_->kv(), &ops_, pages_, length);
  const KvSnapshot prefilled = SnapshotKv(executor_->kv(), &ops_, other_pages_, length);
  return ours == prefilled ? "" : DescribeDifference(ours, prefilled);
}

int32_t Lockstep::Execute(int begin, int end, const Pages& pages,
                          const std::optional<engine::SparseBudget>& sparse, bool sample) {
  engine::SegmentInput segment;
  segment.tokens = absl::MakeConstSpan(tokens_).subspan(begin, end - begin);
  segment.position = begin;
  segment.pages = pages;
  segment.sparse = sparse;
  if (sample) {
    segment.sample.emplace();
    segment.sample->temperature = 0;
  }
  engine::StepOutput output;
  selected_.clear();
  queries_.clear();
  const absl::Status status =
      executor_->Execute({.copies = {}, .segments = absl::MakeConstSpan(&segment, 1)}, &output);
  RESA_CHECK(status.ok()) << status;
  if (!sample) return -1;
  RESA_CHECK_EQ(output.samples.size(), 1u);
  RESA_CHECK(output.samples[0].finite);
  return output.samples[0].token;
}

void Lockstep::Prefill(int length, int chunk, const Pages& pages, bool sample) {
  for (int begin = 0; begin < length; begin += chunk) {
    const int end = std::min(length, begin + chunk);
    const bool last = end == length;
    const int32_t token = Execute(begin, end, pages, std::nullopt, sample && last);
    if (sample && last) tokens_.push_back(token);
  }
}

void Lockstep::TakeStep(const ScheduleStep& step) {
  const bool sparse = step.kind == ScheduleStep::Kind::kSparse;
  std::optional<engine::SparseBudget> budget;
  if (sparse) budget = {step.budget.keep, step.budget.local, step.budget.sink};
  const int32_t token = Execute(step.begin, step.end, pages_, budget, /*sample=*/true);
  if (sparse != !selected_.empty()) return Fail("a step took the wrong path");

  Vector logits;
  if (sparse) {
    ++report_.sparse_rows;
    logits = reference_->Sparse(tokens_[step.begin], step.budget,
                                [&](int layer, int kv_head, std::span<const Interval> scores) {
                                  return JudgeChoice(layer, kv_head, scores, step.budget);
                                });
    CompareQueries();
  } else {
    const Vector stale = reference_->value(config_.num_layers - 1, 0, std::max(0, step.end - 2));
    const std::vector<int> fed(tokens_.begin() + step.begin, tokens_.begin() + step.end);
    logits = reference_->Dense(fed, step.begin);
    if (step.kind == ScheduleStep::Kind::kWindow) {
      ++report_.windows;
      const Vector& exact = reference_->value(config_.num_layers - 1, 0, step.end - 2);
      KeepMax(&report_.repaired, RelativeError(exact, stale));
    }
  }
  CompareKv(step.begin, step.end);
  tokens_.push_back(token);
  CompareLogits(logits, token);
}

std::vector<int> Lockstep::JudgeChoice(int layer, int kv_head, std::span<const Interval> scores,
                                       const Budget& budget) {
  const auto begin = selected_.at(layer).begin() + int64_t{kv_head} * budget.keep;
  const std::vector<int> ids(begin, begin + budget.keep);
  const std::string wrong = ExplainChoice(scores, budget, ids);
  const std::vector<int> ours = TopBlocks(scores, budget);
  if (!wrong.empty()) {
    std::ostringstream out;
    out << "position " << tokens_.size() - 1 << ", layer " << layer << ", KV head " << kv_head
        << ": " << wrong;
    Fail(out.str());
    return ours;
  }
  std::vector<int> differing;
  std::set_difference(ids.begin(), ids.end(), ours.begin(), ours.end(),
                      std::back_inserter(differing));
  report_.kept_ids += budget.keep;
  report_.differing_ids += static_cast<int64_t>(differing.size());
  return ids;
}

void Lockstep::CompareQueries() {
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    for (int head = 0; head < config_.num_heads; ++head) {
      const double error = RelativeError(
          reference_->last_queries()[layer][head],
          std::span(queries_[layer]).subspan(int64_t{head} * config_.head_dim, config_.head_dim));
      KeepMax(&report_.query_error, error);
      if (!(error <= tolerance_.selection.vector)) {
        Fail("query of layer " + std::to_string(layer) + ", head " + std::to_string(head) +
             " at position " + std::to_string(reference_->length() - 1) + " is off by " +
             std::to_string(error));
      }
    }
  }
}

void Lockstep::CompareKv(int begin, int end) {
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    for (int head = 0; head < config_.num_kv_heads; ++head) {
      for (int p = begin; p < end; ++p) {
        const double error = std::max(
            RelativeError(reference_->key(layer, head, p), Pooled(true, layer, head, p)),
            RelativeError(reference_->value(layer, head, p), Pooled(false, layer, head, p)));
        KeepMax(&report_.kv_error, error);
        if (!(error <= tolerance_.selection.vector)) {
          Fail("K or V of layer " + std::to_string(layer) + ", head " + std::to_string(head) +
               ", position " + std::to_string(p) + " after feeding [" + std::to_string(begin) +
               ", " + std::to_string(end) + ") is off by " + std::to_string(error));
        }
      }
    }
  }
}

void Lockstep::CompareLogits(const Vector& expected, int32_t token) {
  RESA_CHECK_EQ(expected.size(), logits_.size());
  double error = 0;
  for (size_t i = 0; i < expected.size(); ++i) KeepMax(&error, std::abs(expected[i] - logits_[i]));
  KeepMax(&report_.logit_error, error);
  const std::string where = " after position " + std::to_string(reference_->length() - 1);
  if (!(error <= tolerance_.logit)) {
    Fail("logits" + where + " are off by " + std::to_string(error));
  }
  const int best = ArgMax(expected);
  if (best == token) return;
  const double gap = expected[best] - expected[token];
  ++report_.near_tie_tokens;
  if (gap > 2 * tolerance_.logit) {
    Fail("token" + where + ": " + std::to_string(token) + " in place of " + std::to_string(best) +
         ", whose logit is higher by " + std::to_string(gap));
  }
}

Vector Lockstep::Pooled(bool key, int layer, int kv_head, int position) const {
  const kernels::KvLayer& pool = executor_->kv().layer(layer);
  const std::byte* data = key ? pool.k : pool.v;
  const int64_t page = pages_.at(position / kernels::kPageTokens);
  const int64_t row = (page * config_.num_kv_heads + kv_head) * kernels::kPageTokens +
                      position % kernels::kPageTokens;
  const int64_t begin = row * config_.head_dim;
  const int64_t end = begin + config_.head_dim;
  if (kv_dtype_ == kernels::DType::kF32) {
    const auto* values = reinterpret_cast<const float*>(data);
    return Vector(values + begin, values + end);
  }
  Vector out;
  for (int64_t i = begin; i < end; ++i) {
    out.push_back(kernels::ToFloat(reinterpret_cast<const kernels::bf16*>(data)[i]));
  }
  return out;
}

void Lockstep::Fail(const std::string& what) {
  if (report_.failures.size() < kMaxFailures) report_.failures.push_back(what);
}

}  // namespace resa::testing
