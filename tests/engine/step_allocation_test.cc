// After warm-up a step allocates nothing: neither the engine's computing half nor the CPU backend.

#include <gtest/gtest.h>

#include <numeric>

#include "engine/model_executor.h"
#include "kernels/cpu/cpu_ops.h"
#include "tests/support/count_allocations.h"
#include "tests/support/tiny_model.h"

namespace resa::engine {
namespace {

constexpr BatchLimits kLimits = {.max_rows = 128, .max_segments = 4, .max_pages_per_sequence = 16};

class StepAllocationTest : public ::testing::TestWithParam<kernels::SelectorSpec> {};

TEST_P(StepAllocationTest, AStepAllocatesNothingAfterWarmUp) {
  const LoadedModel model = resa::testing::MakeTinyModel({.group = 3}, 1);
  const auto ops = kernels::CreateCpuOps({.threads = 2});
  const auto executor =
      ModelExecutor::Create(model.config, model.weights,
                            LayoutFor(model.config, GetParam(), kernels::DType::kBF16, 64), kLimits,
                            ops.get())
          .value();
  const std::vector<int32_t> tokens =
      resa::testing::RandomTokens(256, model.config.vocab_size, /*seed=*/1);
  std::vector<int32_t> pages(64);
  std::iota(pages.begin(), pages.end(), 0);
  kernels::SampleRow sample;
  sample.top_k = 20;
  sample.top_p = 0.9f;
  sample.min_p = 0.01f;
  sample.top_logprobs = 5;

  // Four sequences: a prefill chunk, two sparse rows, a window; one token further each step.
  StepOutput output;
  std::vector<SegmentInput> segments(4);
  const auto run = [&](int step) {
    for (int i = 0; i < 4; ++i) {
      SegmentInput& segment = segments[i];
      const int rows = i == 0 ? 60 : i == 3 ? 16 : 1;
      segment.position = 120 + step - rows + 1;
      segment.tokens = absl::MakeConstSpan(tokens).subspan(segment.position, rows);
      segment.pages = absl::MakeConstSpan(pages).subspan(16 * i, 16);
      if (rows == 1) segment.sparse = SparseBudget{5, 1, 1};
      segment.sample = sample;
      segment.sample->temperature = i == 1 ? 0.0f : 0.8f;
      segment.sample->draw_index = static_cast<uint64_t>(step);
    }
    const absl::Status status = executor->Execute({{}, segments}, &output);
    RESA_CHECK(status.ok());
  };
  // All four sequences are prefilled first, so that the sparse rows have something to read.
  for (int i = 0; i < 4; ++i) {
    SegmentInput segment;
    segment.tokens = absl::MakeConstSpan(tokens).subspan(0, 121);
    segment.pages = absl::MakeConstSpan(pages).subspan(16 * i, 16);
    ASSERT_TRUE(executor->Execute({{}, {segment}}, &output).ok());
  }
  // The longest step comes first: a workspace may have to grow once.
  run(100);
  run(0);
  const int64_t before = resa::testing::CountAllocations();
  for (int step = 1; step < 100; ++step) run(step);
  EXPECT_EQ(resa::testing::CountAllocations() - before, 0);
  EXPECT_GT(before, 0) << "nothing is counted";
}

INSTANTIATE_TEST_SUITE_P(
    Selectors, StepAllocationTest,
    ::testing::Values(kernels::SelectorSpec{kernels::SelectorKind::kMinMax, 16, 0, {1, 1}},
                      kernels::SelectorSpec{kernels::SelectorKind::kSketch, 8, 2, {1, 1}},
                      kernels::SelectorSpec{kernels::SelectorKind::kSketch, 8, 3, {0.4f, 0.2f}}));

}  // namespace
}  // namespace resa::engine
