#include "tests/support/sequence_driver.h"

#include <algorithm>
#include <utility>

#include "kernels/check.h"

namespace resa::testing {

SequenceDriver::SequenceDriver(const engine::Request& request, std::vector<int32_t> pages,
                               const kernels::SelectorSpec& selector, int32_t sparse_from)
    : selector_(selector),
      sparse_from_(sparse_from),
      sequence_(std::make_unique<engine::Sequence>(request, 0, 0, absl::Span<const int32_t>())),
      pages_(std::move(pages)) {
  RESA_CHECK(request.stop.max_tokens.has_value());
}

bool SequenceDriver::done() const {
  return sequence_->output_len() >= *sequence_->request->stop.max_tokens;
}

engine::SegmentInput SequenceDriver::Next(int32_t max_rows) {
  RESA_CHECK(!done());
  work_ = engine::NextWork(*sequence_, selector_, sparse_from_);
  if (work_.kind == engine::SegmentKind::kPrefill && work_.end - work_.begin > max_rows) {
    work_.end = work_.begin + max_rows;
    work_.emits = false;
  }
  engine::SegmentInput segment;
  segment.tokens =
      absl::MakeConstSpan(sequence_->tokens).subspan(work_.begin, work_.end - work_.begin);
  segment.position = work_.begin;
  segment.pages = pages_;
  segment.sparse = work_.sparse;
  if (work_.emits) segment.sample = sequence_->sampler.Next();
  return segment;
}

void SequenceDriver::Finish(const kernels::SampleResult* sample) {
  sparse_steps_ += work_.sparse.has_value();
  rectifications_ += work_.kind == engine::SegmentKind::kRectification;
  engine::Advance(sequence_.get(), work_);
  RESA_CHECK_EQ(sample != nullptr, work_.emits);
  if (sample == nullptr) return;
  RESA_CHECK(sample->finite);
  sequence_->tokens.push_back(sample->token);
  sequence_->sampler.Accept(sample->token);
  logprobs_.push_back(sample->logprob);
}

void SequenceDriver::Preempt(std::vector<int32_t> pages) {
  engine::ForgetPages(sequence_.get());
  pages_ = std::move(pages);
}

absl::Span<const int32_t> SequenceDriver::output() const {
  return absl::MakeConstSpan(sequence_->tokens).subspan(sequence_->prompt_len);
}

void RunTogether(absl::Span<SequenceDriver* const> sequences, engine::Executor* executor,
                 int32_t chunk) {
  std::vector<SequenceDriver*> running;
  std::vector<engine::SegmentInput> segments;
  engine::StepOutput output;
  for (;;) {
    running.clear();
    segments.clear();
    for (SequenceDriver* sequence : sequences) {
      if (sequence->done()) continue;
      running.push_back(sequence);
      segments.push_back(sequence->Next(chunk));
    }
    if (running.empty()) return;
    const absl::Status status = executor->Execute({{}, segments}, &output);
    RESA_CHECK(status.ok()) << status.message();
    size_t sample = 0;
    for (size_t i = 0; i < running.size(); ++i) {
      const bool sampled = segments[i].sample.has_value();
      running[i]->Finish(sampled ? &output.samples[sample++] : nullptr);
    }
  }
}

}  // namespace resa::testing
