#include "tests/bench/bench_run.h"

#include <algorithm>
#include <chrono>

#include "absl/strings/str_cat.h"
#include "engine/status_macros.h"
#include "kernels/check.h"

namespace resa::bench {
namespace {

using engine::AttentionMode;
using engine::Sequence;
using engine::Work;
using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Any token will do.
int32_t TokenAt(int64_t position, int32_t vocab_size) {
  return static_cast<int32_t>((position * 7919 + 17) % vocab_size);
}

// Position of the s-th of B sequences at the start of a round.
int32_t StartOf(const RunSpec& spec, int32_t interval, int32_t index) {
  return spec.context - 1 + index * interval / spec.batch;
}

}  // namespace

kernels::OpCounters AddScaled(const kernels::OpCounters& a, const kernels::OpCounters& b,
                              int64_t factor) {
  kernels::OpCounters sum = a;
  sum.linear_rows += factor * b.linear_rows;
  sum.linear_flops += factor * b.linear_flops;
  sum.weight_bytes += factor * b.weight_bytes;
  sum.dense_rows += factor * b.dense_rows;
  sum.dense_tokens_attended += factor * b.dense_tokens_attended;
  sum.sparse_rows += factor * b.sparse_rows;
  sum.sparse_blocks_read += factor * b.sparse_blocks_read;
  sum.blocks_scored += factor * b.blocks_scored;
  sum.descriptor_bytes += factor * b.descriptor_bytes;
  sum.steps_recorded += factor * b.steps_recorded;
  sum.steps_replayed += factor * b.steps_replayed;
  sum.linears_fused += factor * b.linears_fused;
  sum.page_ids_staged += factor * b.page_ids_staged;
  return sum;
}

std::string RunSpec::Name() const {
  if (prefill) return absl::StrCat("prefill ", rows, " after ", context);
  return absl::StrCat(NameOf(mode), ", ", context, " x ", batch);
}

int64_t BenchRun::TokensNeeded(const RunSpec& spec, int32_t interval) {
  return spec.prefill ? int64_t{spec.context} + spec.rows : int64_t{spec.context} + 2 * interval;
}

int32_t BenchRun::MaxRows(const RunSpec& spec, int32_t interval) {
  if (spec.prefill) return spec.rows;
  return spec.mode == AttentionMode::kRectified ? spec.batch * interval : spec.batch;
}

BenchRun::BenchRun(const RunSpec& spec, const BenchOptions& options, int32_t vocab_size,
                   const PageDeal& deal, TimedOps* ops, engine::Executor* executor)
    : spec_(spec),
      interval_(options.policy.rectify_interval),
      sparse_from_(options.sparse_from),
      selector_(options.selector),
      vocab_size_(vocab_size),
      deal_(deal),
      ops_(*ops),
      executor_(*executor),
      request_(std::make_unique<engine::Request>()) {
  request_->attention = options.policy;
  request_->attention.mode = spec.mode;
  request_->sampling.temperature = 0;
  request_->n = spec.batch;
  for (int32_t s = 0; s < spec.batch; ++s) {
    sequences_.push_back(std::make_unique<Sequence>(*request_, s, static_cast<uint64_t>(s),
                                                    absl::Span<const int32_t>()));
  }
  work_.resize(sequences_.size());
  Reset();
}

int32_t BenchRun::round_steps() const {
  return !spec_.prefill && spec_.mode == AttentionMode::kRectified ? interval_ : 1;
}

void BenchRun::Reset() {
  next_step_ = 0;
  records_.clear();
}

void BenchRun::KeepStages() {
  stage_records_ = records_;
  TimeStages(false);
  Reset();
}

// To the start of a round, in the state that a sequence has after hours of decoding: everything up
// to the last due position is exact, the open window behind it is not, unless it ran densely.
void BenchRun::Rewind(int32_t index) {
  Sequence& sequence = *sequences_[index];
  const int32_t end =
      spec_.prefill ? spec_.context + spec_.rows : StartOf(spec_, interval_, index) + 1;
  const int32_t kv_len = spec_.prefill ? spec_.context : end - 1;
  const size_t before = sequence.tokens.size();
  sequence.tokens.resize(static_cast<size_t>(end));
  for (size_t i = before; i < sequence.tokens.size(); ++i) {
    sequence.tokens[i] = TokenAt(static_cast<int64_t>(i), vocab_size_);
  }
  sequence.kv_len = kv_len;
  sequence.dense_target = spec_.prefill ? end : 0;
  sequence.prompt_len = sequence.dense_target;
  const bool open = !spec_.prefill && spec_.mode == AttentionMode::kRectified && kv_len > 0 &&
                    BudgetFor(request_->attention, selector_, kv_len, sparse_from_).has_value();
  sequence.rectified_len = open ? kv_len / interval_ * interval_ : kv_len;
}

void BenchRun::AddSegment(int32_t index, StepRecord* record) {
  const Sequence& sequence = *sequences_[index];
  const Work work = NextWork(sequence, selector_, sparse_from_);
  work_[index] = work;
  const int32_t rows = work.end - work.begin;
  segments_.push_back({.tokens = absl::MakeConstSpan(sequence.tokens).subspan(work.begin, rows),
                       .position = work.begin,
                       .pages = deal_.pages(index),
                       .pages_id = deal_.pages_id(index),
                       .sparse = work.sparse,
                       .sample = sequence.sampler.Next()});
  record->rows += rows;
  record->tokens += spec_.prefill ? rows : 1;
  if (work.kind == engine::SegmentKind::kRectification) {
    record->windows += 1;
    record->rectified_rows += rows;
  }
}

absl::Status BenchRun::Step() {
  if (next_step_ == 0) {
    for (int32_t s = 0; s < spec_.batch; ++s) Rewind(s);
  }
  StepRecord record;
  segments_.clear();
  for (int32_t s = 0; s < spec_.batch; ++s) AddSegment(s, &record);

  engine::StepOutput output;
  (void)ops_.Take();
  const kernels::OpCounters before = ops_.inner_counters();
  const Clock::time_point start = Clock::now();
  RESA_RETURN_IF_ERROR(executor_.Execute({.copies = {}, .segments = segments_}, &output));
  record.seconds = SecondsSince(start);
  record.stages = ops_.Take();
  record.counters = AddScaled(ops_.inner_counters(), before, -1);
  RESA_CHECK_EQ(output.samples.size(), sequences_.size());
  for (size_t s = 0; s < sequences_.size(); ++s) {
    if (!output.samples[s].finite) {
      return absl::InternalError(absl::StrCat(
          spec_.Name(), ": the logits are not finite; the model's weights are broken"));
    }
    Advance(sequences_[s].get(), work_[s]);
    sequences_[s]->tokens.push_back(output.samples[s].token);
  }
  next_step_ = spec_.prefill ? 0 : (next_step_ + 1) % interval_;
  records_.push_back(record);
  return absl::OkStatus();
}

namespace {

absl::Status StepAll(const std::vector<std::unique_ptr<BenchRun>>& runs, size_t steps) {
  for (size_t i = 0; i < steps; ++i) {
    for (const auto& run : runs) RESA_RETURN_IF_ERROR(run->Step());
  }
  return absl::OkStatus();
}

void ResetAll(const std::vector<std::unique_ptr<BenchRun>>& runs) {
  for (const auto& run : runs) run->Reset();
}

}  // namespace

absl::Status MeasureRuns(const std::vector<std::unique_ptr<BenchRun>>& runs, double seconds,
                         bool stages_apart) {
  constexpr size_t kWarmUpSteps = 2, kMinSteps = 3;
  size_t round = 1;
  for (const auto& run : runs) round = std::max<size_t>(round, run->round_steps());
  RESA_RETURN_IF_ERROR(StepAll(runs, kWarmUpSteps));
  ResetAll(runs);
  if (stages_apart) {
    for (const auto& run : runs) run->TimeStages(true);
    RESA_RETURN_IF_ERROR(StepAll(runs, (kMinSteps + round - 1) / round * round));
    for (const auto& run : runs) run->KeepStages();
    // A step of other counts is another recording: all of a round's.
    RESA_RETURN_IF_ERROR(StepAll(runs, std::max(kWarmUpSteps, round)));
    ResetAll(runs);
  }
  const Clock::time_point start = Clock::now();
  for (size_t steps = 0; SecondsSince(start) < seconds || steps < kMinSteps || steps % round != 0;
       ++steps) {
    RESA_RETURN_IF_ERROR(StepAll(runs, 1));
  }
  return absl::OkStatus();
}

}  // namespace resa::bench
