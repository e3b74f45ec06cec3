#include "engine/model_executor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/recording_ops.h"
#include "tests/support/tiny_model.h"

namespace resa::engine {
namespace {

using resa::testing::MakeTinyModel;
using resa::testing::RecordingOps;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr BatchLimits kLimits = {.max_rows = 8, .max_segments = 3, .max_pages_per_sequence = 4};

class ModelExecutorTest : public ::testing::Test {
 protected:
  ModelExecutorTest() : model_(MakeTinyModel({.num_layers = 1}, 1)) {
    layout_ = LayoutFor(model_.config, kernels::SelectorSpec{}, kernels::DType::kBF16, 12);
  }
  absl::StatusOr<std::unique_ptr<ModelExecutor>> Create() {
    return ModelExecutor::Create(model_.config, model_.weights, layout_, kLimits, &ops_);
  }
  SegmentInput Segment(int32_t count, bool samples) {
    SegmentInput segment;
    segment.tokens = absl::MakeConstSpan(tokens_).subspan(0, count);
    segment.pages = pages_;
    if (samples) segment.sample = kernels::SampleRow{.row = 99, .seed = 5};
    return segment;
  }

  const std::vector<int32_t> tokens_ = {1, 2, 3};
  const std::vector<int32_t> pages_ = {3};
  LoadedModel model_;
  kernels::KvLayout layout_;
  RecordingOps ops_;
};

TEST_F(ModelExecutorTest, SamplesTheLastRowOfEachSegmentThatAsks) {
  const auto executor = Create().value();
  const std::vector<SegmentInput> segments = {Segment(3, true), Segment(2, false),
                                              Segment(1, true)};
  StepOutput output;
  output.samples.resize(7);  // What an earlier step left.
  ASSERT_TRUE(executor->Execute({{}, segments}, &output).ok());
  ASSERT_EQ(output.samples.size(), 2u);
  EXPECT_EQ(output.samples[0].token, 0);  // The recording backend returns the row's place.
  EXPECT_EQ(output.samples[1].token, 1);
  EXPECT_THAT(ops_.gathered_rows, ElementsAre(2, 5));
  ASSERT_EQ(ops_.sample_rows.size(), 2u);
  EXPECT_EQ(ops_.sample_rows[0].row, 0);
  EXPECT_EQ(ops_.sample_rows[1].row, 1);
  EXPECT_EQ(ops_.sample_rows[1].seed, 5u);
}

TEST_F(ModelExecutorTest, SkipsTheHeadWhenNothingSamples) {
  const auto executor = Create().value();
  const std::vector<SegmentInput> segments = {Segment(3, false)};
  StepOutput output;
  output.samples.resize(7);
  ASSERT_TRUE(executor->Execute({{}, segments}, &output).ok());
  EXPECT_THAT(output.samples, IsEmpty());
  EXPECT_THAT(ops_.names(), ::testing::Not(::testing::Contains("GatherRows")));
  EXPECT_THAT(ops_.names(), ::testing::Not(::testing::Contains("Sample")));
}

TEST_F(ModelExecutorTest, CopiesPagesBeforeAnythingIsWritten) {
  const auto executor = Create().value();
  const std::vector<PageCopy> copies = {{3, 5}};
  const std::vector<SegmentInput> segments = {Segment(1, false)};
  StepOutput output;
  ASSERT_TRUE(executor->Execute({copies, segments}, &output).ok());
  EXPECT_EQ(ops_.names().front(), "CopyPages");
}

TEST_F(ModelExecutorTest, AStepWithoutSegmentsOnlyCopies) {
  const auto executor = Create().value();
  const std::vector<PageCopy> copies = {{3, 5}};
  StepOutput output;
  ASSERT_TRUE(executor->Execute({copies, {}}, &output).ok());
  EXPECT_THAT(ops_.names(), ElementsAre("CopyPages"));
}

TEST_F(ModelExecutorTest, RefusesAKvTypeThatTheBackendLacks) {
  layout_.kv_dtype = kernels::DType::kF32;
  const absl::Status status = Create().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("f32"));
}

TEST_F(ModelExecutorTest, SaysHowLargeThePoolIsWhenItDoesNotFit) {
  ops_.allocations_left = 2;
  const absl::Status status = Create().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()),
              ::testing::AllOf(HasSubstr("12 pages"),
                               HasSubstr(std::to_string(12 * layout_.PageBytes()) + " bytes")));
}

TEST_F(ModelExecutorTest, TheLayoutHoldsWhatTheModelHas) {
  EXPECT_EQ(layout_.num_layers, 1);
  EXPECT_EQ(layout_.num_kv_heads, 2);
  EXPECT_EQ(layout_.head_dim, 64);
  EXPECT_EQ(layout_.num_pages, 12);
  layout_.num_layers = 2;
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH((void)Create(), "another model");
}

}  // namespace
}  // namespace resa::engine
