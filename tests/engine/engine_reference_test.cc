// The whole engine, inbox to tokens, against the reference: concurrent requests of mixed lengths
// and policies over a pool too small for them, so that some are preempted and replayed. Each must
// emit the tokens of its own run beside the reference, which judges every one of them.

#include <cstdint>
#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/clock.h"
#include "engine/engine.h"
#include "engine/model_executor.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_ops.h"
#include "tests/support/lockstep.h"
#include "tests/support/reference_schedule.h"
#include "tests/support/test_seed.h"
#include "tests/support/tiny_model.h"

namespace resa::testing {
namespace {

constexpr int kNewTokens = 100;
constexpr int kPages = 64;  // Enough for the four prompts (60), but at the end they need 85.

struct Stream {
  std::vector<int32_t> prompt;
  ScheduleRules rules;
  std::vector<int32_t> expected;
};

class CollectingSink : public engine::OutputSink {
 public:
  void OnAccepted(int32_t, int32_t) override {}
  bool OnDelta(const engine::Delta& delta) override {
    tokens.insert(tokens.end(), delta.token_ids.begin(), delta.token_ids.end());
    return true;
  }
  void OnFinished(engine::Finished end) override {
    finished = true;
    preemptions = end.usage.preemptions;
  }
  void OnError(const absl::Status& status) override { error = status; }

  std::vector<int32_t> tokens;
  bool finished = false;
  int preemptions = 0;
  absl::Status error;
};

std::vector<Stream> MakeStreams(int vocab_size, int block_tokens, uint64_t seed) {
  std::vector<Stream> streams;
  const auto add = [&](int prompt, ReferenceMode mode, double keep, int interval) {
    Stream stream;
    stream.prompt = RandomTokens(prompt, vocab_size, seed + streams.size());
    stream.rules = {mode, keep, 32, 16, 8, interval, block_tokens, 0};
    streams.push_back(std::move(stream));
  };
  add(260, ReferenceMode::kRectified, 0.1, 32);
  add(201, ReferenceMode::kRectified, 0.2, 16);
  add(150, ReferenceMode::kDense, 1.0, 32);
  add(317, ReferenceMode::kRectified, 0.15, 24);
  return streams;
}

std::unique_ptr<engine::Request> MakeRequest(const Stream& stream,
                                             std::shared_ptr<CollectingSink> sink) {
  auto request = std::make_unique<engine::Request>();
  request->prompt = stream.prompt;
  request->sampling.temperature = 0;
  request->stop.max_tokens = kNewTokens;
  request->attention.mode = stream.rules.mode == ReferenceMode::kDense
                                ? engine::AttentionMode::kDense
                                : engine::AttentionMode::kRectified;
  request->attention.keep_ratio = stream.rules.keep_ratio;
  request->attention.min_tokens = stream.rules.min_tokens;
  request->attention.local_tokens = stream.rules.local_tokens;
  request->attention.sink_tokens = stream.rules.sink_tokens;
  request->attention.rectify_interval = stream.rules.interval;
  request->sink = std::move(sink);
  return request;
}

TEST(EngineReferenceTest, ConcurrentPreemptedRequestsEmitTheReferencesTokens) {
  const uint64_t seed = TestSeed();
  SCOPED_TRACE(::testing::Message() << "RESA_TEST_SEED=" << seed);
  const TinyModelOptions shape = {.num_layers = 3, .group = 3, .attention_sharpness = 3.0};
  const kernels::SelectorSpec selector = {kernels::SelectorKind::kSketch, 8, 2, {0.4f, 0.4f}};
  const engine::LoadedModel model = MakeTinyModel(shape, seed);
  const std::unique_ptr<kernels::Ops> ops = kernels::CreateCpuOps({.threads = 2});

  LockstepTolerance tolerance;
  tolerance.selection = {1e-5, 4e-6};  // As in reference_test.cc, with room for any seed.
  tolerance.logit = 5e-5;
  std::vector<Stream> streams = MakeStreams(shape.vocab_size, selector.block_tokens, seed + 1);
  for (Stream& stream : streams) {
    const int length = static_cast<int>(stream.prompt.size());
    Lockstep lockstep(model,
                      {.selector = selector,
                       .kv_dtype = kernels::DType::kF32,
                       .tolerance = tolerance,
                       .max_context = length + kNewTokens,
                       .plant = nullptr},
                      ops.get());
    LockstepReport report =
        lockstep.Run(stream.prompt, MakeSchedule(length, kNewTokens, stream.rules), /*chunk=*/64);
    for (const std::string& failure : report.failures) FAIL() << failure;
    stream.expected = std::move(report.output);
  }

  engine::EngineOptions options;
  options.num_pages = kPages;
  options.limits = {shape.vocab_size, shape.max_position, int64_t{kPages} * kernels::kPageTokens};
  options.scheduler.max_step_tokens = 300;
  options.scheduler.max_sequences = 4;
  options.scheduler.selector = selector;
  auto executor = engine::ModelExecutor::Create(
      model.config, model.weights,
      engine::LayoutFor(model.config, selector, kernels::DType::kF32, kPages),
      {.max_rows = 300, .max_segments = 4, .max_pages_per_sequence = kPages}, ops.get());
  ASSERT_TRUE(executor.ok()) << executor.status();
  engine::RealClock clock;
  engine::Engine engine(options, /*tokenizer=*/nullptr, executor->get(), &clock,
                        /*observer=*/nullptr);
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  for (const Stream& stream : streams) {
    sinks.push_back(std::make_shared<CollectingSink>());
    const auto id = engine.Submit(MakeRequest(stream, sinks.back()));
    ASSERT_TRUE(id.ok()) << id.status();
  }
  while (engine.Step()) engine.CheckInvariants();

  int preemptions = 0;
  for (size_t i = 0; i < streams.size(); ++i) {
    EXPECT_TRUE(sinks[i]->finished) << sinks[i]->error;
    EXPECT_EQ(sinks[i]->tokens, streams[i].expected) << "request " << i;
    preemptions += sinks[i]->preemptions;
  }
  EXPECT_GT(preemptions, 0) << "the pool was meant to be too small";
  std::cout << preemptions << " preemptions\n";
}

}  // namespace
}  // namespace resa::testing
