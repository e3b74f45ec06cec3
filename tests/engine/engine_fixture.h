#ifndef RESA_TESTS_ENGINE_ENGINE_FIXTURE_H_
#define RESA_TESTS_ENGINE_ENGINE_FIXTURE_H_

// An engine in a test's hands: a sink that keeps what it is told, an executor that samples what the
// test wants, a clock that stands still.

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "engine/clock.h"
#include "engine/engine.h"
#include "engine/executor.h"
#include "engine/request.h"
#include "gtest/gtest.h"

namespace resa::engine {

class RecordingSink final : public OutputSink {
 public:
  void OnAccepted(int32_t prompt_tokens, int32_t) override {
    ++accepted;
    accepted_tokens = prompt_tokens;
  }
  bool OnDelta(const Delta& delta) override {
    deltas.push_back(delta);
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

  absl::Status DoExecute(const StepInput& input, StepOutput* output,
                         absl::FunctionRef<void()> meanwhile) override {
    meanwhile();
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

inline constexpr int32_t kPage = kernels::kPageTokens;
inline constexpr int32_t kEos = 2;

// Counts the calls.
class CountingObserver final : public EngineObserver {
 public:
  void OnStep(const StepReport& report) override {
    ++steps;
    last = report;
  }
  void OnRectification(int32_t rows, int32_t delay_steps) override {
    ++rectifications;
    rectified_rows += rows;
    delay += delay_steps;
  }
  void OnSparseRow(int32_t kept, int32_t total) override {
    ++sparse_rows;
    EXPECT_LT(kept, total);
  }
  void OnPromptTokens(int32_t count) override { prompt_tokens += count; }
  void OnFirstToken(absl::Duration) override { ++first_tokens; }
  void OnNextToken(absl::Duration) override { ++next_tokens; }
  void OnFinished(const Finished&) override { ++finished; }
  void OnRequestFinished(const Finished&) override { ++requests_finished; }
  void OnError(const absl::Status&) override { ++errors; }

  int steps = 0;
  StepReport last;
  int rectifications = 0;
  int rectified_rows = 0;
  int delay = 0;
  int sparse_rows = 0;
  int prompt_tokens = 0;
  int first_tokens = 0;
  int next_tokens = 0;
  int finished = 0;
  int requests_finished = 0;
  int errors = 0;
};

class EngineTest : public ::testing::Test {
 protected:
  EngineTest() {
    options_.num_pages = 64;
    options_.limits.vocab_size = 1000;
    options_.limits.max_context = 512;
    options_.limits.pool_tokens = 64 * kPage;
    options_.eos_ids = {kEos};
    options_.scheduler.max_sequences = 4;
    options_.scheduler.min_chunk_tokens = 32;
    options_.scheduler.max_step_tokens = 4 + 256 + 32;
    options_.max_waiting = 4;
  }
  ~EngineTest() override {
    if (engine_ != nullptr) engine_->CheckInvariants();
  }

  Engine& engine() {
    if (engine_ == nullptr) {
      engine_ = std::make_unique<Engine>(options_, nullptr, &executor_, &clock_, &observer_);
    }
    return *engine_;
  }

  static std::unique_ptr<Request> MakeRequest(int32_t prompt, int32_t max_tokens) {
    auto request = std::make_unique<Request>();
    for (int32_t i = 0; i < prompt; ++i) request->prompt.push_back(10 + i % 80);
    request->stop.max_tokens = max_tokens;
    request->attention.mode = AttentionMode::kDense;
    return request;
  }

  std::shared_ptr<RecordingSink> Submit(std::unique_ptr<Request> request) {
    auto sink = std::make_shared<RecordingSink>();
    request->sink = sink;
    const absl::StatusOr<RequestId> id = engine().Submit(std::move(request));
    EXPECT_TRUE(id.ok()) << id.status();
    last_id_ = id.value_or(RequestId{});
    return sink;
  }
  absl::Status SubmitStatus(std::unique_ptr<Request> request) {
    request->sink = std::make_shared<RecordingSink>();
    return engine().Submit(std::move(request)).status();
  }

  // Steps until nothing is left to do.
  void RunDry() {
    for (int step = 0; step < 10000; ++step) {
      engine().CheckInvariants();
      if (!engine().Step()) return;
    }
    FAIL() << "the engine does not come to an end";
  }
  void Steps(int count) {
    for (int i = 0; i < count; ++i) {
      EXPECT_TRUE(engine().Step());
      engine().CheckInvariants();
    }
  }
  int32_t PagesUsed() { return options_.num_pages - engine().pool().free_pages(); }

  EngineOptions options_;
  ScriptedExecutor executor_;
  ManualClock clock_{absl::FromUnixSeconds(1000)};
  CountingObserver observer_;
  std::unique_ptr<Engine> engine_;
  RequestId last_id_;
};

}  // namespace resa::engine

#endif  // RESA_TESTS_ENGINE_ENGINE_FIXTURE_H_
