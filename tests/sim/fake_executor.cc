#include "tests/sim/fake_executor.h"

#include <utility>

namespace resa::sim {
namespace {

constexpr int32_t kPageTokens = kernels::kPageTokens;

}  // namespace

absl::Status FakeExecutor::DoExecute(const engine::StepInput& input, engine::StepOutput* output,
                                     absl::FunctionRef<void()> meanwhile) {
  meanwhile();
  clock_->Advance(absl::Milliseconds(1));
  for (const engine::PageCopy& copy : input.copies) memory_->Copy(copy.from, copy.to);
  const bool fails = std::exchange(fail_next_, false);
  if (inspector_ != nullptr) inspector_->Inspect(input, fails);
  if (fails) {
    for (const engine::SegmentInput& segment : input.segments) Scribble(segment);
    return absl::UnknownError("the simulated device failed");
  }
  for (const engine::SegmentInput& segment : input.segments) Run(segment, output);
  return absl::OkStatus();
}

void FakeExecutor::Run(const engine::SegmentInput& segment, engine::StepOutput* output) {
  int32_t position = segment.position;
  uint64_t history = memory_->Sum(segment.pages, position).content;
  uint64_t prefix = 0;
  if (position > 0) {
    const int32_t last = position - 1;
    prefix = memory_->at(segment.pages[last / kPageTokens], last % kPageTokens).prefix;
  }
  uint64_t content = 0;
  for (int32_t token : segment.tokens) {
    content = Content(token, position, segment.sparse, history);
    prefix = ExtendPrefix(prefix, token);
    memory_->Write(segment.pages[position / kPageTokens], position % kPageTokens,
                   Cell{content, prefix});
    history += content;
    ++position;
  }
  if (segment.sample.has_value()) {
    output->samples.push_back(Draw(*segment.sample, content, vocab_size_));
  }
}

void FakeExecutor::Scribble(const engine::SegmentInput& segment) {
  for (size_t i = 0; i < segment.tokens.size(); i += 2) {
    const int32_t position = segment.position + static_cast<int32_t>(i);
    memory_->Write(segment.pages[position / kPageTokens], position % kPageTokens, Cell{});
  }
}

}  // namespace resa::sim
