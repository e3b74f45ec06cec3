// The books of TimedOps: every op once, under its stage, with its own time, bytes and FLOPs.

#include "tests/bench/timed_ops.h"

#include <gmock/gmock.h>

#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "kernels/cpu/cpu_ops.h"
#include "tests/bench/bench_fixture.h"
#include "tests/bench/bench_run.h"
#include "tests/bench/random_model.h"
#include "tests/support/observing_ops.h"

namespace resa::bench {
namespace {

constexpr kernels::Ceilings kCeilings = {.read_bytes_per_s = 1e3, .flops_per_s = 1e6};

// Hands out copies of weights, as a device does.
class CopyingOps : public testing::ObservingOps {
 public:
  using ObservingOps::ObservingOps;
  const std::byte* ImportWeights(const std::byte* host, size_t bytes) override {
    copies_.push_back(std::make_unique<std::vector<std::byte>>(host, host + bytes));
    return copies_.back()->data();
  }

 private:
  std::vector<std::unique_ptr<std::vector<std::byte>>> copies_;
};

class TimedOpsTest : public ::testing::Test {
 protected:
  const StageTotals& At(const Stages& stages, Stage stage) {
    return stages[static_cast<size_t>(stage)];
  }
  const std::unique_ptr<kernels::Ops> cpu_ = kernels::CreateCpuOps({.threads = 1});
  testing::ObservingOps inner_{cpu_.get()};
  TimedOps timed_{&inner_, kCeilings, /*runs_ahead=*/false};
};

TEST_F(TimedOpsTest, BooksBytesFlopsAndTheLongerOfBoth) {
  const int64_t rows = 4, in = 64, out = 32;
  std::vector<float> x(rows * in, 1.0f), y(rows * out);
  std::vector<kernels::bf16> weight(static_cast<size_t>(in * out), kernels::RoundToBf16(0.5f));
  const kernels::LinearParams p = {.x = {x.data(), kernels::DType::kF32, rows, in},
                                   .weight = {weight.data(), kernels::DType::kBF16, out, in},
                                   .out = {y.data(), kernels::DType::kF32, rows, out}};
  timed_.Linear(p);
  timed_.Linear(p);
  EXPECT_EQ(y[5], 32.0f);
  const kernels::Roofline one = kernels::RooflineOf(p);
  const Stages stages = timed_.Take();
  const StageTotals& linear = At(stages, Stage::kLinear);
  EXPECT_EQ(linear.calls, 2);
  EXPECT_EQ(linear.bytes, 2 * one.bytes);
  EXPECT_EQ(linear.flops, 2 * one.flops);
  EXPECT_EQ(linear.seconds_at_ceiling, 2 * one.bytes / 1e3);
  EXPECT_GT(linear.seconds, 0);
  EXPECT_EQ(At(timed_.Take(), Stage::kLinear).calls, 0);  // Taken once.
}

TEST_F(TimedOpsTest, AnOpsTimeIsItsOwn) {
  static constexpr double kPause = 0.02;
  inner_.before_sample = [](const kernels::SampleParams&) {
    std::this_thread::sleep_for(std::chrono::duration<double>(kPause));
  };
  std::vector<float> logits(8, 0.0f), x(8, 1.0f), norm(8, 1.0f);
  const kernels::SampleRow row = {.temperature = 0};
  kernels::SampleResult result;
  timed_.RmsNorm({.x = {x.data(), kernels::DType::kF32, 1, 8},
                  .weight = norm.data(),
                  .eps = 1e-6f,
                  .out = {x.data(), kernels::DType::kF32, 1, 8}});
  timed_.Sample({.logits = {logits.data(), kernels::DType::kF32, 1, 8},
                 .rows = &row,
                 .num_rows = 1,
                 .out = &result});
  const Stages stages = timed_.Take();
  EXPECT_GE(At(stages, Stage::kSample).seconds, kPause);
  EXPECT_EQ(At(stages, Stage::kPointwise).calls, 1);
  EXPECT_GT(At(stages, Stage::kPointwise).seconds, 0);
}

TEST_F(TimedOpsTest, WeightsAreToldApartWhereverTheBackendPutsThem) {
  CopyingOps copying(cpu_.get());
  TimedOps timed(&copying, kCeilings, /*runs_ahead=*/true);
  std::vector<kernels::bf16> up(64), other(64);
  const auto* const host = reinterpret_cast<const std::byte*>(up.data());
  timed.Label(host, Stage::kGateUp);
  const std::byte* const imported = timed.ImportWeights(host, 128);
  const std::byte* const unknown =
      timed.ImportWeights(reinterpret_cast<const std::byte*>(other.data()), 128);
  ASSERT_NE(imported, host);
  std::vector<float> x(8), y(8);
  for (const std::byte* weight : {imported, unknown, imported}) {
    timed.Linear({.x = {x.data(), kernels::DType::kF32, 1, 8},
                  .weight = {const_cast<std::byte*>(weight), kernels::DType::kBF16, 8, 8},
                  .out = {y.data(), kernels::DType::kF32, 1, 8}});
  }
  const Stages stages = timed.Take();
  EXPECT_EQ(At(stages, Stage::kGateUp).calls, 2);
  EXPECT_EQ(At(stages, Stage::kLinear).calls, 1);
}

// Selection that reads further planes of the best blocks alone moves fewer bytes than its
// parameters say; the books have what was counted.
TEST_F(TimedOpsTest, ProgressiveSelectionIsBookedAsCounted) {
  const engine::ModelConfig config = SmallConfig();
  const auto model = MakeRandomModel(config, 1);
  ASSERT_TRUE(model.ok());
  TimedOps timed(cpu_.get(), kCeilings, /*runs_ahead=*/false);
  testing::ObservingOps observed(&timed);
  BenchOptions options;
  options.selector = {kernels::SelectorKind::kSketch, 8, 3, {0.25f, 0.12f}};
  const RunSpec spec = {.mode = engine::AttentionMode::kSparse, .context = 2000};
  const PageDeal deal(1, BenchRun::TokensNeeded(spec, 32), 1);
  auto executor = engine::ModelExecutor::Create(
      config, model->weights,
      engine::LayoutFor(config, options.selector, kernels::DType::kBF16, deal.num_pages()),
      {.max_rows = 1, .max_segments = 1, .max_pages_per_sequence = deal.pages_per_sequence()},
      &observed);
  ASSERT_TRUE(executor.ok()) << executor.status();
  ASSERT_TRUE(
      FillPool(config, (*executor)->kv(), deal, {BenchRun::TokensNeeded(spec, 32)}, 1, cpu_.get())
          .ok());
  kernels::Roofline whole;
  observed.after_select = [&](const kernels::SelectParams& p) { whole += kernels::RooflineOf(p); };
  BenchRun run(spec, options, config.vocab_size, deal, &timed, executor->get());
  ASSERT_TRUE(run.Step().ok());
  const StepRecord& record = run.records().front();
  EXPECT_EQ(At(record.stages, Stage::kSelect).calls, config.num_layers);
  EXPECT_EQ(At(record.stages, Stage::kSelect).bytes,
            static_cast<double>(record.counters.descriptor_bytes));
  EXPECT_GT(record.counters.descriptor_bytes, 0);
  EXPECT_LT(At(record.stages, Stage::kSelect).bytes, 0.7 * whole.bytes);
  EXPECT_EQ(At(record.stages, Stage::kSparseAttend).calls, config.num_layers);
  EXPECT_EQ(At(record.stages, Stage::kChunkAttend).calls, 0);
}

}  // namespace
}  // namespace resa::bench
