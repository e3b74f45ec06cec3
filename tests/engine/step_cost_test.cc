#include "engine/step_cost.h"

#include <memory>
#include <vector>

#include "engine/kv_memory.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_ops.h"
#include "tests/support/model_runner.h"
#include "tests/support/observing_ops.h"
#include "tests/support/tiny_model.h"

namespace resa::engine {
namespace {

using ::resa::kernels::Ceilings;
using ::resa::kernels::KvLayout;
using ::resa::kernels::Roofline;
using ::resa::kernels::SelectorKind;
using ::resa::kernels::SelectorSpec;

// Qwen2.5-0.5B.
ModelConfig HalfBillion() {
  ModelConfig config;
  config.vocab_size = 151936;
  config.hidden_size = 896;
  config.intermediate_size = 4864;
  config.num_layers = 24;
  config.num_heads = 14;
  config.num_kv_heads = 2;
  config.head_dim = 64;
  config.max_position = 131072;
  return config;
}

KvLayout LayoutOf(const ModelConfig& config, const SelectorSpec& selector = {}) {
  return LayoutFor(config, selector, kernels::DType::kBF16, 1);
}

// Two cores with AVX2, roughly.
constexpr Ceilings kLaptop = {.read_bytes_per_s = 36e9, .flops_per_s = 200e9};

AttentionPolicy Policy() { return AttentionPolicy(); }

// ---- what the steps of the real transformer ask for ----

// Adds up the rooflines of what a step runs.
class SummingOps final : public resa::testing::ObservingOps {
 public:
  explicit SummingOps(kernels::Ops* inner) : ObservingOps(inner), real_(*inner) {}

  StepCost cost;

 private:
  void DoLinear(const kernels::LinearParams& p) override {
    Count(p);
    real_.Linear(p);
  }
  void DoLinears(const kernels::LinearsParams& p) override {
    for (const kernels::LinearParams& product : p.products) Count(product);
    real_.Linears(p);
  }
  void Count(const kernels::LinearParams& p) {
    // Only the logits have as many columns as there are tokens.
    (p.weight.rows == 131 ? cost.head : cost.linear) += RooflineOf(p);
  }
  void DoSelect(const kernels::SelectParams& p) override {
    cost.select += RooflineOf(p);
    ++cost.sparse_layers;
    real_.Select(p);
  }
  void DoSparseAttend(const kernels::SparseAttendParams& p) override {
    cost.sparse_attend += RooflineOf(p);
    real_.SparseAttend(p);
  }
  void DoChunkAttend(const kernels::ChunkAttendParams& p) override {
    cost.dense_attend += RooflineOf(p);
    real_.ChunkAttend(p);
  }

  kernels::Ops& real_;
};

void ExpectSame(const Roofline& forecast, const Roofline& run, const char* stage) {
  // Sums of the same numbers in another order.
  EXPECT_NEAR(forecast.bytes, run.bytes, 1e-9 * run.bytes) << stage;
  EXPECT_NEAR(forecast.flops, run.flops, 1e-9 * run.flops) << stage;
}

// The forecast of a step is what the transformer then runs, stage by stage.
class RealStepTest : public ::testing::TestWithParam<SelectorSpec> {
 protected:
  RealStepTest()
      : model_(resa::testing::MakeTinyModel({.num_layers = 3, .num_kv_heads = 2, .group = 3}, 1)),
        cpu_(kernels::CreateCpuOps({.threads = 1})),
        ops_(cpu_.get()),
        runner_(model_, &ops_,
                {.selector = GetParam(), .kv_dtype = kernels::DType::kBF16, .max_tokens = 512}) {
    // The logits of all rows are asked for in a test, of one in a step.
    runner_.Prefill(resa::testing::RandomTokens(300, 131, 1), 100);
    ops_.cost = {};
  }

  void ExpectCost(const StepCost& forecast) {
    ExpectSame(forecast.linear, ops_.cost.linear, "linear");
    ExpectSame(forecast.select, ops_.cost.select, "select");
    ExpectSame(forecast.sparse_attend, ops_.cost.sparse_attend, "sparse attend");
    ExpectSame(forecast.dense_attend, ops_.cost.dense_attend, "dense attend");
    EXPECT_EQ(forecast.sparse_layers, ops_.cost.sparse_layers);
  }
  KvLayout layout() const { return LayoutOf(model_.config, GetParam()); }

  const LoadedModel model_;
  const std::unique_ptr<kernels::Ops> cpu_;
  SummingOps ops_;
  resa::testing::ModelRunner runner_;
};

TEST_P(RealStepTest, Dense) {
  runner_.Feed({5});
  const StepCost forecast = DenseStepCost(model_.config, layout(), 301);
  ExpectCost(forecast);
  ExpectSame(forecast.head, ops_.cost.head, "head");
}

TEST_P(RealStepTest, Sparse) {
  const SparseBudget budget = {.keep_blocks = 8, .local_blocks = 2, .sink_blocks = 1};
  runner_.Feed({5}, budget);
  const StepCost forecast = SparseStepCost(model_.config, layout(), 301, budget);
  ExpectCost(forecast);
  ExpectSame(forecast.head, ops_.cost.head, "head");
}

TEST_P(RealStepTest, Window) {
  runner_.Rewind(280);
  runner_.Feed(resa::testing::RandomTokens(32, 131, 2));
  ExpectCost(WindowStepCost(model_.config, layout(), 312, 32));
}

INSTANTIATE_TEST_SUITE_P(Selectors, RealStepTest,
                         ::testing::Values(SelectorSpec{SelectorKind::kSketch, 8, 3, {1, 1}},
                                           SelectorSpec{SelectorKind::kMinMax, 16, 0, {1, 1}}));

// ---- seconds ----

TEST(StepCostTest, AStageTakesTheLargerOfBytesAndFlops) {
  StepCost cost;
  cost.linear = {.bytes = 36e9, .flops = 100e9};
  EXPECT_DOUBLE_EQ(SecondsOf(cost, kLaptop), 1 / kLinearShare.bytes);
  cost.linear.flops = 400e9;
  EXPECT_DOUBLE_EQ(SecondsOf(cost, kLaptop), 2 / kLinearShare.flops);
  cost.select = {.bytes = 3.6e9, .flops = 0};
  EXPECT_DOUBLE_EQ(SecondsOf(cost, kLaptop), 2 / kLinearShare.flops + 0.1 / kSelectShare.bytes);
  cost.sparse_layers = 3;
  EXPECT_DOUBLE_EQ(SecondsOf(cost, kLaptop),
                   2 / kLinearShare.flops + 0.1 / kSelectShare.bytes + 3 * kLaptop.sketch_seconds);
}

TEST(StepCostTest, HalfABillionParametersByHand) {
  const ModelConfig config = HalfBillion();
  const StepCost cost = DenseStepCost(config, LayoutOf(config), 32768);
  // 24 layers of 896 x (896 + 2 x 128) and 896 x 896, 3 x 896 x 4864; activations are below 0.5 %.
  const double weights = 24.0 * (896 * (896 + 256) + 896 * 896 + 3 * 896 * 4864);
  EXPECT_NEAR(cost.linear.bytes, 2 * weights, 0.005 * 2 * weights);
  EXPECT_DOUBLE_EQ(cost.linear.flops, 2 * weights);
  // K and V of two heads of 64 in bf16, and a few kilobytes of queries.
  const double kv = 24.0 * 32768 * 2 * 2 * 64 * 2;
  EXPECT_NEAR(cost.dense_attend.bytes, kv, 0.001 * kv);
  EXPECT_DOUBLE_EQ(cost.dense_attend.flops, 24.0 * 32768 * 14 * 64 * 4);
}

TEST(ForecastTest, RectificationIsTheWindowOverItsInterval) {
  const ModelConfig config = HalfBillion();
  const KvLayout layout = LayoutOf(config);
  const AttentionForecast forecast = Forecast(config, layout, Policy(), 16384, kLaptop);
  const double window = SecondsOf(WindowStepCost(config, layout, 16384, 32), kLaptop);
  const double cycle = 31 * forecast.sparse_seconds + window;
  EXPECT_NEAR(forecast.sparse_seconds + forecast.rectification_seconds, cycle / 32, 1e-9 * cycle);
  EXPECT_LT(forecast.sparse_seconds, forecast.dense_seconds);
}

TEST(ForecastTest, ABudgetThatCoversAllIsADenseStep) {
  const ModelConfig config = HalfBillion();
  AttentionPolicy policy;
  policy.keep_ratio = 1;
  const AttentionForecast forecast = Forecast(config, LayoutOf(config), policy, 16384, kLaptop);
  EXPECT_EQ(forecast.sparse_seconds, forecast.dense_seconds);
  EXPECT_GT(Forecast(config, LayoutOf(config), Policy(), 1, kLaptop).dense_seconds, 0);
}

// ---- decisions ----

TEST(ModeForTest, FollowsTheMachine) {
  const ModelConfig config = HalfBillion();
  const auto mode = [&](const Ceilings& ceilings) {
    return ModeFor(Forecast(config, LayoutOf(config), Policy(), kReferenceContext, ceilings));
  };
  // Memory reads 36 GB/s while 200 GFLOP/s are done: attending again for the window is dear.
  EXPECT_EQ(mode(kLaptop), AttentionMode::kSparse);
  // With matrix units arithmetic is nearly free.
  EXPECT_EQ(mode({.read_bytes_per_s = 200e9, .flops_per_s = 40e12}), AttentionMode::kRectified);
}

TEST(ModeForTest, TheLimitIsAQuarterOfADenseStep) {
  EXPECT_EQ(ModeFor({.dense_seconds = 4, .sparse_seconds = 1, .rectification_seconds = 0.99}),
            AttentionMode::kRectified);
  EXPECT_EQ(ModeFor({.dense_seconds = 4, .sparse_seconds = 1, .rectification_seconds = 1}),
            AttentionMode::kSparse);
}

TEST(SparseFromTest, EveryLongerContextPaysAndTheAnswerIsSteady) {
  const ModelConfig config = HalfBillion();
  for (const SelectorSpec& selector : {SelectorSpec{SelectorKind::kSketch, 8, 3, {1, 1}},
                                       SelectorSpec{SelectorKind::kMinMax, 16, 0, {1, 1}}}) {
    const KvLayout layout = LayoutOf(config, selector);
    const int32_t from = SparseFromFor(config, layout, Policy(), 131072, kLaptop);
    EXPECT_GE(from, kLeastSparseFrom);
    EXPECT_LE(from, 16384);
    EXPECT_EQ(from & (from - 1), 0) << from << " is not a power of two";
    for (int64_t context = from; context <= 131072; context += 77) {
      const AttentionForecast forecast =
          Forecast(config, layout, Policy(), static_cast<int32_t>(context), kLaptop);
      ASSERT_LT(forecast.sparse_seconds, forecast.dense_seconds) << context;
    }
    // Below, somewhere, it does not.
    bool ever_slower = from == kLeastSparseFrom;
    for (int32_t context = from / 2; context < from; ++context) {
      const AttentionForecast forecast = Forecast(config, layout, Policy(), context, kLaptop);
      ever_slower |= forecast.sparse_seconds >= forecast.dense_seconds;
    }
    EXPECT_TRUE(ever_slower) << from;
  }
}

TEST(SparseFromTest, ABatchPaysForSelectionTogether) {
  const ModelConfig config = HalfBillion();
  const Ceilings gpu = {.read_bytes_per_s = 4.5e12,
                        .flops_per_s = 790e12,
                        .minmax_seconds = 7e-6,
                        .sketch_seconds = 20e-6};
  AttentionPolicy rectified = Policy(), sparse = Policy();
  rectified.mode = AttentionMode::kRectified;
  sparse.mode = AttentionMode::kSparse;
  for (const SelectorSpec& selector : {SelectorSpec{SelectorKind::kSketch, 8, 2, {1, 1}},
                                       SelectorSpec{SelectorKind::kMinMax, 16, 0, {1, 1}}}) {
    const KvLayout layout = LayoutOf(config, selector);
    const SparseFromBatch from = SparseFromForBatch(config, layout, sparse, 131072, gpu);
    EXPECT_EQ(from.sequence_tokens, kLeastBatchSparseFrom);
    EXPECT_EQ(from.step_tokens % kLeastBatchSparseFrom, 0);
    // Beyond fixed budgets, one sequence of so many tokens gains and one of a step less does not.
    const auto gain = [&](int64_t tokens) {
      const AttentionForecast forecast =
          Forecast(config, layout, sparse, static_cast<int32_t>(tokens), gpu);
      return forecast.dense_seconds - forecast.sparse_seconds;
    };
    EXPECT_GT(gain(from.step_tokens + kLeastBatchSparseFrom), 0);
    EXPECT_LT(gain(from.step_tokens - kLeastBatchSparseFrom), 0);
    // Rectification has to be earned too.
    EXPECT_GE(SparseFromForBatch(config, layout, rectified, 131072, gpu).step_tokens,
              from.step_tokens);
  }
  AttentionPolicy all = sparse;
  all.keep_ratio = 1;
  EXPECT_EQ(SparseFromForBatch(config, LayoutOf(config), all, 131072, gpu).sequence_tokens, 131073);
}

TEST(SparseFromTest, NeverWhereItCannotPay) {
  const ModelConfig config = HalfBillion();
  AttentionPolicy all;
  all.keep_ratio = 1;
  EXPECT_EQ(SparseFromFor(config, LayoutOf(config), all, 131072, kLaptop), 131073);
  EXPECT_EQ(SparseFromFor(config, LayoutOf(config), Policy(), 200, kLaptop), 201);
  // No such memory exists: every context is read at once, and only overhead is left.
  EXPECT_EQ(SparseFromFor(config, LayoutOf(config), Policy(), 131072,
                          {.read_bytes_per_s = 1e18, .flops_per_s = 1e21}),
            131073);
}

}  // namespace
}  // namespace resa::engine
