#include "server/attention_choice.h"

#include <memory>

#include "engine/kv_memory.h"
#include "engine/step_cost.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_ops.h"
#include "tests/support/observing_ops.h"

namespace resa::server {
namespace {

using ::testing::HasSubstr;

// A backend on a machine of the test's choice.
class MachineOps final : public resa::testing::ObservingOps {
 public:
  MachineOps(kernels::Ops* inner, const kernels::Ceilings& ceilings)
      : ObservingOps(inner), ceilings_(ceilings) {}
  kernels::Ceilings MeasureCeilings() override {
    ++measured;
    return ceilings_;
  }

  int measured = 0;

 private:
  const kernels::Ceilings ceilings_;
};

constexpr kernels::Ceilings kSlowArithmetic = {.read_bytes_per_s = 36e9, .flops_per_s = 200e9};
constexpr kernels::Ceilings kMatrixUnits = {.read_bytes_per_s = 200e9, .flops_per_s = 40e12};

class AttentionChoiceTest : public ::testing::Test {
 protected:
  AttentionChoiceTest() : cpu_(kernels::CreateCpuOps({.threads = 1})) {
    // Qwen2.5-0.5B.
    model_.vocab_size = 151936;
    model_.hidden_size = 896;
    model_.intermediate_size = 4864;
    model_.num_layers = 24;
    model_.num_heads = 14;
    model_.num_kv_heads = 2;
    model_.head_dim = 64;
    layout_ = engine::LayoutFor(model_, {}, kernels::DType::kBF16, 1);
    options_.auto_mode = true;
  }

  AttentionChoice Choose(const kernels::Ceilings& ceilings, int32_t longest_context = 131072) {
    MachineOps ops(cpu_.get(), ceilings);
    AttentionChoice choice =
        ChooseAttention(options_, device_, model_, layout_, longest_context, &ops);
    measured_ = ops.measured;
    return choice;
  }

  const std::unique_ptr<kernels::Ops> cpu_;
  engine::ModelConfig model_;
  kernels::KvLayout layout_;
  AttentionOptions options_;
  AttentionDevice device_;
  int measured_ = 0;
};

TEST_F(AttentionChoiceTest, WhatIsSetIsTakenAndNothingMeasured) {
  options_.auto_mode = false;
  options_.default_policy.mode = engine::AttentionMode::kDense;
  options_.sparse_from = 77;
  const AttentionChoice choice = Choose(kSlowArithmetic);
  EXPECT_EQ(measured_, 0);
  EXPECT_EQ(choice.default_policy, options_.default_policy);
  EXPECT_EQ(choice.sparse_from, 77);
  EXPECT_FALSE(choice.description.mode_is_auto());
  EXPECT_FALSE(choice.description.sparse_from_is_auto());
  EXPECT_EQ(choice.description.reason(), "as set");
}

TEST_F(AttentionChoiceTest, AutoFollowsTheMachineAndTellsWhy) {
  const AttentionChoice sparse = Choose(kSlowArithmetic);
  EXPECT_EQ(measured_, 1);
  EXPECT_EQ(sparse.default_policy.mode, engine::AttentionMode::kSparse);
  EXPECT_THAT(sparse.description.reason(), HasSubstr("at 36 GB/s and 200 GFLOP/s: mode sparse"));
  EXPECT_THAT(sparse.description.reason(), HasSubstr("not below the limit of 25%"));
  EXPECT_EQ(sparse.description.context_tokens(), engine::kReferenceContext);
  EXPECT_EQ(sparse.description.read_bytes_per_second(), 36e9);
  EXPECT_EQ(sparse.description.flops_per_second(), 200e9);
  EXPECT_GE(sparse.description.rectification_seconds(),
            0.25 * sparse.description.dense_step_seconds());
  EXPECT_LT(sparse.description.sparse_step_seconds(), sparse.description.dense_step_seconds());

  const AttentionChoice rectified = Choose(kMatrixUnits);
  EXPECT_EQ(rectified.default_policy.mode, engine::AttentionMode::kRectified);
  EXPECT_THAT(rectified.description.reason(), HasSubstr("mode rectified"));
  EXPECT_LT(rectified.description.rectification_seconds(),
            0.25 * rectified.description.dense_step_seconds());
  // Only the mode is chosen; the budget stays.
  options_.default_policy.keep_ratio = 0.2;
  EXPECT_EQ(Choose(kMatrixUnits).default_policy.keep_ratio, 0.2);
}

TEST_F(AttentionChoiceTest, EachSettingIsAutoForItself) {
  options_.sparse_from = 5;
  EXPECT_EQ(Choose(kSlowArithmetic).sparse_from, 5);
  EXPECT_EQ(measured_, 1);
  options_.sparse_from.reset();
  options_.auto_mode = false;
  options_.default_policy.mode = engine::AttentionMode::kRectified;
  const AttentionChoice choice = Choose(kSlowArithmetic);
  EXPECT_EQ(choice.default_policy.mode, engine::AttentionMode::kRectified);
  EXPECT_EQ(choice.sparse_from, engine::SparseFromFor(model_, layout_, options_.default_policy,
                                                      131072, kSlowArithmetic));
  EXPECT_THAT(choice.description.reason(), HasSubstr("where that begins to pay"));
}

TEST_F(AttentionChoiceTest, OnAGpuAStepsTokensDecide) {
  device_ = {.on_gpu = true, .deterministic = false};
  const AttentionChoice choice = Choose(kMatrixUnits);
  const engine::SparseFromBatch expected =
      engine::SparseFromForBatch(model_, layout_, choice.default_policy, 131072, kMatrixUnits);
  EXPECT_EQ(choice.sparse_from, engine::kLeastBatchSparseFrom);
  EXPECT_EQ(choice.sparse_step_tokens, expected.step_tokens);
  EXPECT_GT(choice.sparse_step_tokens, 0);
  EXPECT_THAT(choice.description.reason(), HasSubstr("tokens beyond the 4096th"));
  // Whatever the forecast says of the mode.
  const AttentionChoice slow = Choose(kSlowArithmetic);
  EXPECT_EQ(slow.default_policy.mode, engine::AttentionMode::kRectified);
  EXPECT_THAT(slow.description.reason(), HasSubstr("mode rectified, since matrix units"));
  // Where the result may not depend on the batch, neither may the path.
  device_.deterministic = true;
  EXPECT_EQ(Choose(kMatrixUnits).sparse_step_tokens, 0);
  // What is set is taken as it is.
  device_.deterministic = false;
  options_.sparse_from = 5;
  EXPECT_EQ(Choose(kMatrixUnits).sparse_from, 5);
  EXPECT_EQ(Choose(kMatrixUnits).sparse_step_tokens, 0);
}

TEST_F(AttentionChoiceTest, ShortContextsAreAllDense) {
  const AttentionChoice choice = Choose(kSlowArithmetic, 200);
  EXPECT_GT(choice.sparse_from, 200);
  EXPECT_EQ(choice.description.context_tokens(), 200);
  EXPECT_THAT(choice.description.reason(), HasSubstr("every step dense"));
}

}  // namespace
}  // namespace resa::server
