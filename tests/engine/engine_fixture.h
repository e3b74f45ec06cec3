#ifndef RESA_TESTS_ENGINE_ENGINE_FIXTURE_H_
#define RESA_TESTS_ENGINE_ENGINE_FIXTURE_H_

// A sink that keeps what it is told, and an executor that says what the test wants said.

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "engine/executor.h"
#include "engine/request.h"

namespace resa::engine {

class RecordingSink final : public OutputSink {
 public:
  void OnAccepted(int32_t prompt_tokens, int32_t) override {
    ++accepted;
    accepted_tokens = prompt_tokens;
  }
  bool OnDelta(Delta delta) override {
    deltas.push_back(std::move(delta));
    return static_cast<int>(deltas.size()) <= buffer;
  }
  void OnFinished(Finished end) override { finished.push_back(std::move(end)); }
  void OnError(const absl::Status& status) override { errors.push_back(status); }

  // Of one output, in the order they came.
  std::vector<int32_t> Tokens(int32_t index = 0) const {
    std::vector<int32_t> tokens;
    for (const Delta& delta : deltas) {
      if (delta.index != index) continue;
      tokens.insert(tokens.end(), delta.token_ids.begin(), delta.token_ids.end());
    }
    return tokens;
  }
  std::string Text(int32_t index = 0) const {
    std::string text;
    for (const Delta& delta : deltas) {
      if (delta.index == index) text += delta.text;
    }
    return text;
  }
  bool ended() const { return !finished.empty() || !errors.empty(); }

  int buffer = 1 << 30;  // OnDelta refuses when more deltas have come.
  int accepted = 0;
  int32_t accepted_tokens = 0;
  std::vector<Delta> deltas;
  std::vector<Finished> finished;
  std::vector<absl::Status> errors;
};

// Keeps a copy of every step and samples what `draw` says.
class ScriptedExecutor final : public Executor {
 public:
  struct Segment {
    std::vector<int32_t> tokens;
    int32_t position = 0;
    std::vector<int32_t> pages;
    bool sparse = false;
    bool samples = false;
  };
  struct Step {
    std::vector<PageCopy> copies;
    std::vector<Segment> segments;
  };

  absl::Status Execute(const StepInput& input, StepOutput* output) override {
    Step step;
    step.copies.assign(input.copies.begin(), input.copies.end());
    for (const SegmentInput& segment : input.segments) {
      step.segments.push_back({{segment.tokens.begin(), segment.tokens.end()},
                               segment.position,
                               {segment.pages.begin(), segment.pages.end()},
                               segment.sparse.has_value(),
                               segment.sample.has_value()});
      if (segment.sample.has_value() && status.ok()) {
        output->samples.push_back(draw(*segment.sample));
      }
    }
    steps.push_back(std::move(step));
    return status;
  }

  // The n-th output token is 100 + n, unless it is forced.
  static kernels::SampleResult CountUp(const kernels::SampleRow& row) {
    kernels::SampleResult result;
    result.token =
        row.forced_token >= 0 ? row.forced_token : 100 + static_cast<int32_t>(row.draw_index);
    result.logprob = -0.5f;
    return result;
  }

  std::function<kernels::SampleResult(const kernels::SampleRow&)> draw = CountUp;
  absl::Status status;
  std::vector<Step> steps;
};

}  // namespace resa::engine

#endif  // RESA_TESTS_ENGINE_ENGINE_FIXTURE_H_
