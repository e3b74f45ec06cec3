// What the bench times is what the engine does: the segments of each mode, proved from the
// backend's counters.

#include "tests/bench/bench_run.h"

#include <gmock/gmock.h>

#include <cmath>
#include <memory>
#include <vector>

#include "kernels/cpu/cpu_ops.h"
#include "tests/bench/bench_fixture.h"
#include "tests/bench/bench_results.h"
#include "tests/bench/random_model.h"

namespace resa::bench {
namespace {

using engine::AttentionMode;

constexpr int kBatch = 3;
constexpr int kInterval = 16;
constexpr int kContext = 1000;

class BenchRunTest : public ::testing::Test {
 protected:
  void SetUp() override {
    options_.policy.rectify_interval = kInterval;
    auto model = MakeRandomModel(config_, 1);
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
    const int64_t tokens =
        BenchRun::TokensNeeded({.context = kContext, .batch = kBatch}, kInterval);
    deal_ = std::make_unique<PageDeal>(kBatch, tokens, 1);
    const engine::BatchLimits limits = {.max_rows = kBatch * kInterval,
                                        .max_segments = kBatch,
                                        .max_pages_per_sequence = deal_->pages_per_sequence()};
    auto executor = engine::ModelExecutor::Create(
        config_, model_.weights,
        engine::LayoutFor(config_, options_.selector, kernels::DType::kBF16, deal_->num_pages()),
        limits, &timed_);
    ASSERT_TRUE(executor.ok()) << executor.status();
    executor_ = *std::move(executor);
    const std::vector<int64_t> lengths(kBatch, tokens);
    ASSERT_TRUE(FillPool(config_, executor_->kv(), *deal_, lengths, 1, cpu_.get()).ok());
  }

  std::unique_ptr<BenchRun> MakeRun(const RunSpec& spec) {
    return std::make_unique<BenchRun>(spec, options_, config_.vocab_size, *deal_, &timed_,
                                      executor_.get());
  }
  // `steps` steps of a run of its own.
  RunResult Measure(const RunSpec& spec, int steps) {
    const auto run = MakeRun(spec);
    for (int i = 0; i < steps; ++i) {
      const absl::Status status = run->Step();
      EXPECT_TRUE(status.ok()) << status;
    }
    return ResultOf(*run);
  }

  const engine::ModelConfig config_ = SmallConfig();
  const int layers_ = config_.num_layers;
  BenchOptions options_;
  engine::LoadedModel model_;
  const std::unique_ptr<kernels::Ops> cpu_ = kernels::CreateCpuOps({.threads = 2});
  TimedOps timed_{cpu_.get(), {.read_bytes_per_s = 1e9, .flops_per_s = 1e9}, false};
  std::unique_ptr<PageDeal> deal_;
  std::unique_ptr<engine::ModelExecutor> executor_;
};

TEST_F(BenchRunTest, DenseStepsAttendToTheWholeContext) {
  const RunResult r = Measure({.mode = AttentionMode::kDense, .context = kContext}, 1);
  EXPECT_EQ(r.counters.dense_rows, layers_);
  EXPECT_EQ(r.counters.dense_tokens_attended, layers_ * config_.num_kv_heads * kContext);
  EXPECT_EQ(r.counters.sparse_rows, 0);
  EXPECT_EQ(r.rectifications, 0);
}

TEST_F(BenchRunTest, SparseStepsReadTheBudget) {
  const RunResult r =
      Measure({.mode = AttentionMode::kSparse, .context = kContext, .batch = kBatch}, 5);
  EXPECT_EQ(r.tokens, 5 * kBatch);
  EXPECT_EQ(r.counters.sparse_rows, 5 * kBatch * layers_);
  EXPECT_EQ(r.counters.dense_rows, 0);
  // A tenth of 125 to 128 blocks, rounded up.
  EXPECT_EQ(r.counters.sparse_blocks_read, r.counters.sparse_rows * config_.num_kv_heads * 13);
}

TEST_F(BenchRunTest, SparseBelowItsBudgetIsDense) {
  const RunResult r = Measure({.mode = AttentionMode::kSparse, .context = 40}, 3);
  EXPECT_EQ(r.counters.sparse_rows, 0);
  EXPECT_EQ(r.counters.dense_rows, 3 * layers_);
}

// In one round each sequence decodes f tokens and rectifies f once, in steps of its own.
TEST_F(BenchRunTest, RectifiedRoundsHoldOneWindowOfEachSequence) {
  const RunSpec spec = {.mode = AttentionMode::kRectified, .context = kContext, .batch = kBatch};
  const RunResult round = Measure(spec, kInterval);
  EXPECT_EQ(round.round_steps, kInterval);
  EXPECT_EQ(round.tokens, kBatch * kInterval);
  EXPECT_EQ(round.rectifications, kBatch);
  EXPECT_EQ(round.rectified_rows, kBatch * kInterval);
  EXPECT_EQ(round.windows.units, kBatch);
  EXPECT_EQ(round.plain.units, kInterval - kBatch);
  EXPECT_EQ(round.counters.dense_rows, layers_ * kBatch * kInterval);
  EXPECT_EQ(round.counters.sparse_rows, layers_ * kBatch * (kInterval - 1));
  // The next round repeats it.
  const RunResult two = Measure(spec, 2 * kInterval);
  EXPECT_EQ(two.counters.dense_tokens_attended, 2 * round.counters.dense_tokens_attended);
  EXPECT_EQ(two.counters.sparse_blocks_read, 2 * round.counters.sparse_blocks_read);
}

// Where decoding is dense anyway nothing is left to rectify.
TEST_F(BenchRunTest, RectifiedBelowItsBudgetHasNoWindows) {
  const RunResult r = Measure({.mode = AttentionMode::kRectified, .context = 30}, kInterval);
  EXPECT_EQ(r.rectifications, 0);
  EXPECT_EQ(r.counters.dense_rows, kInterval * layers_);
}

TEST_F(BenchRunTest, PrefillRepeatsOneChunk) {
  const RunResult r = Measure({.prefill = true, .context = 900, .rows = 20}, 2);
  EXPECT_EQ(r.tokens, 40);
  EXPECT_EQ(r.counters.dense_rows, 40 * layers_);
  // 901 + ... + 920 tokens, twice.
  EXPECT_EQ(r.counters.dense_tokens_attended,
            2 * layers_ * config_.num_kv_heads * (20 * 901 + 190));
}

TEST_F(BenchRunTest, RunsTakeTurnsUntilRoundsAreComplete) {
  std::vector<std::unique_ptr<BenchRun>> runs;
  for (const AttentionMode mode :
       {AttentionMode::kDense, AttentionMode::kSparse, AttentionMode::kRectified}) {
    runs.push_back(MakeRun({.mode = mode, .context = 200}));
  }
  ASSERT_TRUE(MeasureRuns(runs, 0, /*stages_apart=*/false).ok());
  std::vector<RunResult> results;
  for (const auto& run : runs) {
    EXPECT_EQ(run->records().size(), static_cast<size_t>(kInterval));
    results.push_back(ResultOf(*run));
  }
  EXPECT_EQ(RatiosOf(results).size(), 4u);
  for (const Ratio& ratio : RatiosOf(results)) EXPECT_GT(ratio.value, 0) << ratio.name;
}

// As for a device, where waiting for each op would make the steps slower.
TEST_F(BenchRunTest, StagesTimedApartAreOfStepsOfTheirOwn) {
  std::vector<std::unique_ptr<BenchRun>> runs;
  for (const AttentionMode mode : {AttentionMode::kDense, AttentionMode::kRectified}) {
    runs.push_back(MakeRun({.mode = mode, .context = 200}));
  }
  ASSERT_TRUE(MeasureRuns(runs, 0, /*stages_apart=*/true).ok());
  std::vector<RunResult> results;
  for (const auto& run : runs) {
    EXPECT_EQ(run->records().size(), static_cast<size_t>(kInterval));
    EXPECT_EQ(run->stage_records().size(), static_cast<size_t>(kInterval));
    constexpr auto kAttend = static_cast<size_t>(Stage::kChunkAttend);
    EXPECT_EQ(run->records()[0].stages[kAttend].seconds, 0);
    EXPECT_EQ(run->records()[0].stages[kAttend].bytes,
              run->stage_records()[0].stages[kAttend].bytes);
    results.push_back(ResultOf(*run));
    EXPECT_GT(results.back().whole.stages[static_cast<size_t>(Stage::kSample)].seconds, 0);
    EXPECT_GT(results.back().whole.bytes, 0);
  }
  for (const Ratio& ratio : RatiosOf(results)) EXPECT_GT(ratio.value, 0) << ratio.name;
}

TEST_F(BenchRunTest, LogitsThatAreNotFiniteEndIt) {
  auto* const norm =
      reinterpret_cast<float*>(const_cast<std::byte*>(model_.weights.final_norm.data));
  norm[0] = INFINITY;
  const auto run = MakeRun({.mode = AttentionMode::kDense, .context = 10});
  EXPECT_THAT(run->Step().message(), ::testing::HasSubstr("not finite"));
}

}  // namespace
}  // namespace resa::bench
