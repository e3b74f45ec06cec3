// After warm-up deciding a step allocates nothing, nor does handing out its tokens, too. This
// binary counts every operator new.

#include <cstdint>
#include <memory>
#include <utility>

#include "engine/engine.h"
#include "engine/scheduler.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/sequence_set.h"
#include "tests/support/count_allocations.h"
#include "tests/support/test_tokenizers.h"

namespace resa::engine {
namespace {

constexpr int32_t kPage = kernels::kPageTokens;

class SilentSink final : public OutputSink {
 public:
  void OnAccepted(int32_t, int32_t) override {}
  bool OnDelta(const Delta&) override {
    ++tokens;
    return true;
  }
  void OnFinished(Finished) override {}
  void OnError(const absl::Status&) override {}

  int64_t tokens = 0;
};

class ZeroExecutor final : public Executor {
 public:
  absl::Status DoExecute(const StepInput& input, StepOutput* output,
                         absl::FunctionRef<void()> meanwhile) override {
    meanwhile();
    for (const SegmentInput& segment : input.segments) {
      if (segment.sample.has_value()) output->samples.emplace_back();
    }
    return absl::OkStatus();
  }
};

// A plan with everything in it: decode rows, windows of which some stall, a chunk, an admission;
// and, in the smaller pool, preemptions of sequences with hundreds of pages.
TEST(EngineAllocationTest, PlanningAllocatesNothing) {
  for (const int32_t spare_pages : {100, 0}) {
    SequenceSet set(4 * 4 + 2 * 300 + 2 * 32 + spare_pages);
    SequenceState state;
    state.prompt = 8;
    state.kv_len = 4 * kPage;
    state.output = state.kv_len + 1 - state.prompt;
    state.policy.mode = AttentionMode::kDense;
    for (int i = 0; i < 4; ++i) set.Add(state);
    state.kv_len = 300 * kPage;
    state.output = state.kv_len + 1 - state.prompt;
    state.priority = -1;
    for (int i = 0; i < 2; ++i) set.Add(state);
    SequenceState due;
    due.prompt = 256;
    due.output = 257;
    due.kv_len = 511;
    due.rectified_len = 256;
    due.policy.rectify_interval = 256;
    for (int i = 0; i < 2; ++i) set.Add(due);
    SequenceState prompt;
    prompt.prompt = 100;
    set.Add(prompt);
    prompt.running = false;
    set.Add(prompt);

    Scheduler scheduler(SchedulerLimits{});
    StepPlan plan;
    scheduler.Plan(set.view(), set.pool(), &plan);
    EXPECT_EQ(plan.preempt.empty(), spare_pages > 0);
    EXPECT_FALSE(plan.stalled.empty());
    EXPECT_EQ(plan.admit.empty(), spare_pages == 0);
    const int64_t before = resa::testing::CountAllocations();
    EXPECT_GT(before, 0) << "nothing is counted";
    for (int i = 0; i < 100; ++i) scheduler.Plan(set.view(), set.pool(), &plan);
    EXPECT_EQ(resa::testing::CountAllocations() - before, 0) << spare_pages << " spare pages";
  }
}

// Allocations per token of six outputs in the middle of their way, two of each mode.
double AllocationsPerToken(const Tokenizer* tokenizer, bool logprobs) {
  EngineOptions options;
  options.num_pages = 1000;
  options.limits = {.vocab_size = 1000, .max_context = 4000, .pool_tokens = 1000 * kPage};
  ZeroExecutor executor;
  ManualClock clock(absl::UnixEpoch());
  Engine engine(options, tokenizer, &executor, &clock, /*observer=*/nullptr);
  auto sink = std::make_shared<SilentSink>();
  for (const AttentionMode mode :
       {AttentionMode::kDense, AttentionMode::kSparse, AttentionMode::kRectified}) {
    auto request = std::make_unique<Request>();
    request->prompt.assign(600, 1);
    request->n = 2;
    request->attention.mode = mode;
    request->stop.max_tokens = 1000;
    request->stop.ignore_eos = true;
    request->output.logprobs = logprobs;
    request->sink = sink;
    RESA_CHECK(engine.Submit(std::move(request)).ok());
  }
  // Long enough that every vector has its room: a sequence's tokens and pages double seldom.
  while (sink->tokens < 6 * 80) engine.Step();
  const int64_t tokens_before = sink->tokens;
  const int64_t before = resa::testing::CountAllocations();
  for (int step = 0; step < 300; ++step) engine.Step();
  const int64_t tokens = sink->tokens - tokens_before;
  RESA_CHECK_GE(tokens, 6 * 290);
  return static_cast<double>(resa::testing::CountAllocations() - before) / tokens;
}

// Handing out a token allocates nothing either: what the sink is shown is the engine's to reuse.
TEST(EngineAllocationTest, StepAllocatesNothing) {
  EXPECT_EQ(AllocationsPerToken(nullptr, /*logprobs=*/false), 0);
  EXPECT_EQ(AllocationsPerToken(nullptr, /*logprobs=*/true), 0);
  const auto tokenizer = resa::testing::LoadTestTokenizer("gpt2");
  EXPECT_EQ(AllocationsPerToken(tokenizer.get(), /*logprobs=*/false), 0);
}

}  // namespace
}  // namespace resa::engine
