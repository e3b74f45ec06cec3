// What Rectified Sparse Attention promises whatever the model's quality, on random models through
// the real executor and the CPU backend: keeping everything is dense attention; a rectified window
// leaves exactly what dense prefill would have left; no result depends on what runs beside it, on
// chunks or on threads; a preempted sequence goes on as if nothing had happened; a sparse step
// reads what it keeps and nothing else.
//
// "Exactly" is bit for bit: the CPU backend promises that a row's bits depend on that row alone.
// The pool is full of NaN before every run, so whatever is read before it was written shows.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "absl/strings/str_cat.h"
#include "engine/model_executor.h"
#include "kernels/cpu/cpu_ops.h"
#include "tests/support/kv_snapshot.h"
#include "tests/support/model_runner.h"
#include "tests/support/sequence_driver.h"
#include "tests/support/test_seed.h"
#include "tests/support/tiny_model.h"

namespace resa::engine {
namespace {

using resa::testing::DescribeDifference;
using resa::testing::KvSnapshot;
using resa::testing::ModelRunner;
using resa::testing::RandomTokens;
using resa::testing::RunnerOptions;
using resa::testing::RunTogether;
using resa::testing::SequenceDriver;
using resa::testing::TestSeed;
using resa::testing::TinyModelOptions;

struct Case {
  const char* name;
  TinyModelOptions model;
  kernels::SelectorSpec selector;
  kernels::DType kv_dtype = kernels::DType::kBF16;
};

constexpr kernels::SelectorSpec kMinMax = {kernels::SelectorKind::kMinMax, 16, 0, {1, 1}};
constexpr kernels::SelectorSpec Sketch(int block, int planes, float first = 1, float second = 1) {
  return {kernels::SelectorKind::kSketch, block, planes, {first, second}};
}

const Case kCases[] = {
    {"MinMaxGroup1", {.group = 1}, kMinMax},
    {"MinMaxGroup7Dim128F32",
     {.num_layers = 3, .num_kv_heads = 1, .group = 7, .head_dim = 128, .qkv_bias = true},
     kMinMax,
     kernels::DType::kF32},
    {"SketchDefaultGroup3", {.num_layers = 3, .num_kv_heads = 3, .group = 3}, Sketch(8, 2)},
    {"SketchDefaultGroup4F32", {.group = 4}, Sketch(8, 2), kernels::DType::kF32},
    {"Sketch1PlaneBlock4", {.group = 2, .qk_norm = true}, Sketch(4, 1)},
    {"Sketch3PlanesBlock16Dim128", {.group = 4, .head_dim = 128}, Sketch(16, 3)},
    {"SketchProgressiveGroup7", {.num_kv_heads = 1, .group = 7}, Sketch(8, 3, 0.4f, 0.2f)},
    {"SketchProgressive2PlanesF32",
     {.group = 3, .head_dim = 128, .tie_embeddings = true},
     Sketch(8, 2, 0.25f, 0.25f),
     kernels::DType::kF32},
};

// Pages of 16 tokens, so that the sequences of these tests (at most 16 pages) get their own.
constexpr int kPagesPerSequence = 16;
constexpr int kSequences = 6;
constexpr BatchLimits kLimits = {
    .max_rows = 300, .max_segments = kSequences, .max_pages_per_sequence = kPagesPerSequence};

void Fill(const KvMemory& memory, kernels::Ops* ops, std::byte value) {
  const kernels::KvLayout& layout = memory.layout();
  const std::vector<std::byte> kv(layout.LayerKvBytes(), value);
  const std::vector<std::byte> descriptors(layout.LayerDescriptorBytes(), value);
  for (const kernels::KvLayer& layer : memory.layers()) {
    ops->Upload(layer.k, kv.data(), kv.size());
    ops->Upload(layer.v, kv.data(), kv.size());
    ops->Upload(layer.descriptors, descriptors.data(), descriptors.size());
  }
}

constexpr std::byte kNanByte{0xff};  // 0xffff is NaN in bf16, 0xffffffff in f32.

// A backend and a model on it, with a pool for kSequences sequences.
struct Machine {
  Machine(const LoadedModel& model, const Case& which, int threads)
      : ops(kernels::CreateCpuOps({.threads = threads})) {
    const kernels::KvLayout layout =
        LayoutFor(model.config, which.selector, which.kv_dtype, kSequences * kPagesPerSequence);
    executor =
        ModelExecutor::Create(model.config, model.weights, layout, kLimits, ops.get()).value();
    Fill(executor->kv(), ops.get(), kNanByte);
  }
  KvSnapshot Snapshot(const SequenceDriver& driver, int length) const {
    return resa::testing::SnapshotKv(executor->kv(), ops.get(), driver.pages(), length);
  }

  std::unique_ptr<kernels::Ops> ops;
  std::unique_ptr<ModelExecutor> executor;
};

// Everything one sequence leaves behind that must not depend on anything else.
struct Trace {
  std::vector<int32_t> output;
  std::vector<float> logprobs;
  KvSnapshot kv;
  int sparse_steps = 0;
  int rectifications = 0;

  friend bool operator==(const Trace&, const Trace&) = default;
};

Trace TraceOf(const Machine& machine, const SequenceDriver& driver) {
  return {{driver.output().begin(), driver.output().end()},
          driver.logprobs(),
          machine.Snapshot(driver, driver.sequence().kv_len),
          driver.sparse_steps(),
          driver.rectifications()};
}

class ExactnessTest : public ::testing::TestWithParam<Case> {
 protected:
  ExactnessTest()
      : seed_(TestSeed()),
        trace_(__FILE__, __LINE__, ::testing::Message() << "RESA_TEST_SEED=" << seed_),
        random_(seed_),
        model_(resa::testing::MakeTinyModel(GetParam().model, seed_)) {}

  int Draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }

  // Distinct pages in random order.
  std::vector<std::vector<int32_t>> DealPages() {
    std::vector<int32_t> all(kSequences * kPagesPerSequence);
    std::iota(all.begin(), all.end(), 0);
    std::shuffle(all.begin(), all.end(), random_);
    std::vector<std::vector<int32_t>> dealt;
    for (int i = 0; i < kSequences; ++i) {
      const auto begin = all.begin() + i * kPagesPerSequence;
      dealt.emplace_back(begin, begin + kPagesPerSequence);
    }
    return dealt;
  }

  // A policy whose steps are sparse from about 40 tokens on, and keep a small part.
  static AttentionPolicy TightPolicy(AttentionMode mode, int interval) {
    AttentionPolicy policy;
    policy.mode = mode;
    policy.keep_ratio = 0.1;
    policy.min_tokens = 32;
    policy.local_tokens = 8;
    policy.sink_tokens = 4;
    policy.rectify_interval = interval;
    return policy;
  }

  Request MakeRequest(AttentionMode mode, int prompt, int output, int interval) {
    Request request;
    request.prompt = RandomTokens(prompt, model_.config.vocab_size, random_());
    request.sampling.temperature = Draw(0, 1) ? 0.8f : 0.0f;
    request.sampling.repetition_penalty = 1.1f;
    request.sampling.seed = random_();
    request.stop.max_tokens = output;
    request.attention = TightPolicy(mode, interval);
    return request;
  }

  // Sequences of every mode, short and long.
  std::vector<Request> MixedRequests() {
    std::vector<Request> requests;
    const AttentionMode modes[] = {AttentionMode::kRectified, AttentionMode::kRectified,
                                   AttentionMode::kSparse, AttentionMode::kDense,
                                   AttentionMode::kRectified};
    const int intervals[] = {8, 16, 32, 8, 64};
    for (int i = 0; i < 5; ++i) {
      requests.push_back(MakeRequest(modes[i], Draw(1, 150), Draw(50, 80), intervals[i]));
    }
    return requests;
  }

  Trace RunAlone(const Request& request, int threads = 1) {
    Machine machine(model_, GetParam(), threads);
    SequenceDriver driver(request, DealPages()[0], GetParam().selector);
    SequenceDriver* const all[] = {&driver};
    RunTogether(all, machine.executor.get());
    return TraceOf(machine, driver);
  }

  // What dense prefill of these tokens leaves in the pool, in chunks of random size.
  KvSnapshot DenseKv(absl::Span<const int32_t> tokens) {
    Machine machine(model_, GetParam(), 1);
    const std::vector<int32_t> pages = DealPages()[0];
    StepOutput output;
    for (size_t begin = 0; begin < tokens.size();) {
      const SegmentInput segment = {.tokens = tokens.subspan(begin, Draw(1, 100)),
                                    .position = static_cast<int32_t>(begin),
                                    .pages = pages};
      EXPECT_TRUE(machine.executor->Execute({{}, {segment}}, &output).ok());
      begin += segment.tokens.size();
    }
    return resa::testing::SnapshotKv(machine.executor->kv(), machine.ops.get(), pages,
                                     static_cast<int>(tokens.size()));
  }

  const uint64_t seed_;
  const ::testing::ScopedTrace trace_;
  std::mt19937_64 random_;
  const LoadedModel model_;
};

// A sparse step that keeps all blocks sums the same terms as a dense one, in another order.
//
// Tolerance. f32: every sum has at most a few hundred terms of size about 1, so two orders differ
// by about 300 * 2^-24 = 2e-5 per layer at the worst; logits are of size about 1; 1e-3 leaves room
// for layers amplifying it. bf16: a key or value of the new token may in addition round the other
// way, which moves it by 2^-8 of its size; its weight in attention is at most 1, so 3e-2 after some
// layers.
TEST_P(ExactnessTest, KeepingEveryBlockEqualsDense) {
  const float tolerance = GetParam().kv_dtype == kernels::DType::kF32 ? 1e-3f : 3e-2f;
  const auto ops = kernels::CreateCpuOps({.threads = 1});
  ModelRunner runner(model_, ops.get(),
                     {.selector = GetParam().selector, .kv_dtype = GetParam().kv_dtype});
  const std::vector<int32_t> tokens = RandomTokens(140, model_.config.vocab_size, random_());
  const int prompt = Draw(1, 80);
  runner.Prefill(absl::MakeConstSpan(tokens).subspan(0, prompt), 32);
  const int block = GetParam().selector.block_tokens;
  float worst = 0;
  for (int position = prompt; position < 140; ++position) {
    const int blocks = position / block + 1;
    const std::vector<float> sparse =
        runner.Feed({tokens[position]}, SparseBudget{blocks, std::min(blocks, 1), 0});
    runner.Rewind(position);
    const std::vector<float> dense = runner.Feed({tokens[position]});
    for (size_t i = 0; i < dense.size(); ++i) {
      worst = std::max(worst, std::abs(sparse[i] - dense[i]));
      ASSERT_NEAR(sparse[i], dense[i], tolerance) << "position " << position << ", logit " << i;
    }
    // The greedy token is the same, unless two logits tie within the tolerance.
    const auto best = std::max_element(dense.begin(), dense.end());
    const auto sparse_best = std::max_element(sparse.begin(), sparse.end());
    EXPECT_GE(dense[sparse_best - sparse.begin()] + 2 * tolerance, *best);
  }
  EXPECT_EQ(ops->counters().sparse_rows, int64_t{140 - prompt} * model_.config.num_layers);
  RecordProperty("worst_logit_difference", absl::StrCat(worst));
}

TEST_P(ExactnessTest, KeepRatioOneGeneratesTheDenseTokens) {
  const Request rectified = MakeRequest(AttentionMode::kRectified, 60, 70, 16);
  Request keep_all = rectified;
  keep_all.attention.keep_ratio = 1.0;
  Request dense = rectified;
  dense.attention.mode = AttentionMode::kDense;
  const Trace kept = RunAlone(keep_all);
  const Trace densely = RunAlone(dense);
  EXPECT_EQ(kept.output, densely.output);
  EXPECT_EQ(kept.logprobs, densely.logprobs);
  EXPECT_EQ(DescribeDifference(kept.kv, densely.kv), "");
}

TEST_P(ExactnessTest, ARectifiedWindowLeavesWhatDensePrefillLeaves) {
  for (const int interval : {8, 32}) {
    const Request request =
        MakeRequest(AttentionMode::kRectified, Draw(40, 90), 3 * interval + 7, interval);
    Machine machine(model_, GetParam(), 2);
    SequenceDriver driver(request, DealPages()[0], GetParam().selector);
    StepOutput output;
    int drifted = 0;  // Windows that differed from dense prefill before they were rectified.
    while (!driver.done()) {
      const int before = driver.rectifications();
      const int kv_len = driver.sequence().kv_len;
      const SegmentInput segment = driver.Next();
      const KvSnapshot stale = machine.Snapshot(driver, kv_len);
      ASSERT_TRUE(machine.executor->Execute({{}, {segment}}, &output).ok());
      driver.Finish(segment.sample.has_value() ? &output.samples[0] : nullptr);
      if (driver.rectifications() == before) continue;
      const int exact = driver.sequence().rectified_len;
      ASSERT_EQ(exact % interval, 0);
      ASSERT_EQ(exact, driver.sequence().kv_len);
      const absl::Span<const int32_t> tokens = driver.sequence().tokens;
      EXPECT_EQ(DescribeDifference(machine.Snapshot(driver, exact), DenseKv(tokens.first(exact))),
                "")
          << "window up to " << exact;
      drifted += stale != DenseKv(tokens.first(kv_len));
    }
    EXPECT_GE(driver.rectifications(), 3);
    EXPECT_GT(driver.sparse_steps(), 2 * interval);
    EXPECT_GE(drifted, 2) << "nothing was left to repair: this test proves nothing";
  }
}

TEST_P(ExactnessTest, NoResultDependsOnBatchChunksOrThreads) {
  const std::vector<Request> requests = MixedRequests();
  std::vector<Trace> alone;
  for (const Request& request : requests) alone.push_back(RunAlone(request));
  EXPECT_GT(alone[0].rectifications + alone[1].rectifications, 0);
  EXPECT_GT(alone[2].sparse_steps, 0);
  struct Setting {
    int threads;
    int chunk;
  };
  for (const Setting& setting : {Setting{1, 7}, Setting{2, 1}, Setting{3, 50}}) {
    Machine machine(model_, GetParam(), setting.threads);
    const std::vector<std::vector<int32_t>> pages = DealPages();
    std::vector<std::unique_ptr<SequenceDriver>> drivers;
    std::vector<SequenceDriver*> all;
    for (size_t i = 0; i < requests.size(); ++i) {
      drivers.push_back(
          std::make_unique<SequenceDriver>(requests[i], pages[i], GetParam().selector));
      all.push_back(drivers.back().get());
    }
    std::shuffle(all.begin(), all.end(), random_);
    RunTogether(all, machine.executor.get(), setting.chunk);
    for (size_t i = 0; i < requests.size(); ++i) {
      const Trace trace = TraceOf(machine, *drivers[i]);
      EXPECT_EQ(trace.output, alone[i].output) << "request " << i;
      EXPECT_EQ(DescribeDifference(trace.kv, alone[i].kv), "") << "request " << i;
      EXPECT_TRUE(trace == alone[i])
          << "request " << i << ", " << setting.threads << " threads, chunk " << setting.chunk;
    }
  }
}

TEST_P(ExactnessTest, APreemptedSequenceGoesOnAsIfNothingHadHappened) {
  for (const AttentionMode mode : {AttentionMode::kRectified, AttentionMode::kDense}) {
    const Request request = MakeRequest(mode, Draw(30, 90), 60, 16);
    const Trace undisturbed = RunAlone(request);
    Machine machine(model_, GetParam(), 2);
    const std::vector<std::vector<int32_t>> pages = DealPages();
    SequenceDriver driver(request, pages[0], GetParam().selector);
    // In the prefill, in the open window, and again before the replay of that is over.
    const int first = Draw(1, 2);
    const int second = first + Draw(20, 40);
    const int third = second + Draw(2, 12);
    StepOutput output;
    int preemptions = 0;
    for (int step = 0; !driver.done(); ++step) {
      const SegmentInput segment = driver.Next(Draw(5, 25));
      ASSERT_TRUE(machine.executor->Execute({{}, {segment}}, &output).ok());
      driver.Finish(segment.sample.has_value() ? &output.samples[0] : nullptr);
      if (step != first && step != second && step != third) continue;
      // Its memory goes to others, who leave NaN.
      Fill(machine.executor->kv(), machine.ops.get(), kNanByte);
      driver.Preempt(pages[++preemptions]);
    }
    EXPECT_EQ(preemptions, 3);
    EXPECT_EQ(std::vector<int32_t>(driver.output().begin(), driver.output().end()),
              undisturbed.output);
    EXPECT_EQ(driver.logprobs(), undisturbed.logprobs);
    EXPECT_EQ(
        DescribeDifference(machine.Snapshot(driver, driver.sequence().kv_len), undisturbed.kv), "");
  }
}

// n > 1: the second output starts on the first one's prompt, with its own copy of the page that
// both would write.
TEST_P(ExactnessTest, ACopiedPageContinuesLikeTheOriginal) {
  constexpr int kOutput = 40;
  const int prompt = 16 * Draw(2, 4) + Draw(1, 15);  // Ends inside a page.
  const Request request = MakeRequest(AttentionMode::kDense, prompt, kOutput, 16);
  const Trace alone = RunAlone(request);

  Machine machine(model_, GetParam(), 1);
  ModelExecutor* const executor = machine.executor.get();
  const std::vector<std::vector<int32_t>> pages = DealPages();
  Request prefill = request;
  prefill.stop.max_tokens = 1;
  SequenceDriver owner(prefill, pages[0], GetParam().selector);
  SequenceDriver* const first[] = {&owner};
  RunTogether(first, executor);

  // Shares the full pages and copies the last; then the original's last page is overwritten.
  const int shared = prompt / kernels::kPageTokens;
  std::vector<int32_t> forked = pages[1];
  std::copy(pages[0].begin(), pages[0].begin() + shared, forked.begin());
  const KvSnapshot original = machine.Snapshot(owner, prompt);
  StepOutput output;
  const PageCopy fork = {pages[0][shared], forked[shared]};
  const PageCopy overwrite = {pages[2][0], pages[0][shared]};
  ASSERT_TRUE(executor->Execute({{fork}, {}}, &output).ok());
  ASSERT_TRUE(executor->Execute({{overwrite}, {}}, &output).ok());
  const auto snapshot = [&](int length) {
    return resa::testing::SnapshotKv(executor->kv(), machine.ops.get(), forked, length);
  };
  EXPECT_EQ(DescribeDifference(original, snapshot(prompt)), "");
  EXPECT_NE(machine.Snapshot(owner, prompt), original);

  std::vector<int32_t> tokens = request.prompt;
  SamplerState sampler(request, 0, {});
  const auto accept = [&](int32_t token) {
    tokens.push_back(token);
    sampler.Accept(token);
  };
  accept(owner.output()[0]);
  while (sampler.output_count() < kOutput) {
    const SegmentInput segment = {.tokens = absl::MakeConstSpan(tokens).last(1),
                                  .position = static_cast<int32_t>(tokens.size()) - 1,
                                  .pages = forked,
                                  .sample = sampler.Next()};
    ASSERT_TRUE(executor->Execute({{}, {segment}}, &output).ok());
    accept(output.samples[0].token);
  }
  EXPECT_EQ(std::vector<int32_t>(tokens.begin() + prompt, tokens.end()), alone.output);
  EXPECT_EQ(DescribeDifference(snapshot(alone.kv.length), alone.kv), "");
}

TEST_P(ExactnessTest, ASparseStepReadsOnlyWhatItKeeps) {
  Machine machine(model_, GetParam(), 1);
  const kernels::KvLayout& layout = machine.executor->kv().layout();
  const std::vector<int32_t> tokens = RandomTokens(200, model_.config.vocab_size, random_());
  const std::vector<int32_t> pages = DealPages()[0];
  const SegmentInput prefill = {
      .tokens = absl::MakeConstSpan(tokens).first(199), .position = 0, .pages = pages};
  StepOutput output;
  ASSERT_TRUE(machine.executor->Execute({{}, {prefill}}, &output).ok());

  // A budget of whole pages at both ends and nothing in between, so that the choice is known.
  const int per_page = layout.BlocksPerPage();
  const SparseBudget budget = {
      .keep_blocks = 3 * per_page, .local_blocks = 2 * per_page, .sink_blocks = per_page};
  kernels::SampleRow sample;
  sample.top_logprobs = kernels::kMaxTopLogprobs;
  const SegmentInput step = {.tokens = absl::MakeConstSpan(tokens).last(1),
                             .position = 199,
                             .pages = pages,
                             .sparse = budget,
                             .sample = sample};
  const kernels::OpCounters before = machine.ops->counters();
  ASSERT_TRUE(machine.executor->Execute({{}, {step}}, &output).ok());
  const kernels::OpCounters after = machine.ops->counters();
  const int64_t rows = layout.num_layers;
  const int64_t heads = layout.num_kv_heads;
  EXPECT_EQ(after.sparse_rows - before.sparse_rows, rows);
  EXPECT_EQ(after.sparse_blocks_read - before.sparse_blocks_read,
            rows * heads * budget.keep_blocks);
  EXPECT_EQ(after.dense_rows, before.dense_rows);
  EXPECT_EQ(after.dense_tokens_attended, before.dense_tokens_attended);
  const kernels::SampleResult clean = output.samples[0];
  ASSERT_TRUE(clean.finite);

  // 200 tokens are 12.5 pages. NaN in the K and V of the pages that are certainly not kept must not
  // be seen; the local blocks end inside page 12 and so begin inside page 10.
  const std::vector<std::byte> nan(heads * layout.RunBytes(), kNanByte);
  for (const kernels::KvLayer& layer : machine.executor->kv().layers()) {
    for (int page = 1; page < 10; ++page) {
      machine.ops->Upload(layer.k + pages[page] * nan.size(), nan.data(), nan.size());
      machine.ops->Upload(layer.v + pages[page] * nan.size(), nan.data(), nan.size());
    }
  }
  ASSERT_TRUE(machine.executor->Execute({{}, {step}}, &output).ok());
  EXPECT_TRUE(output.samples[0].finite);
  EXPECT_EQ(output.samples[0].logprob, clean.logprob);
  EXPECT_EQ(output.samples[0].top_logprobs, clean.top_logprobs);

  // And the poison works: one more block at the front than the sinks reaches it.
  SegmentInput wider = step;
  wider.sparse->sink_blocks += 1;
  wider.sparse->keep_blocks += 1;
  ASSERT_TRUE(machine.executor->Execute({{}, {wider}}, &output).ok());
  EXPECT_FALSE(output.samples[0].finite);
}

INSTANTIATE_TEST_SUITE_P(Models, ExactnessTest, ::testing::ValuesIn(kCases),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace resa::engine
