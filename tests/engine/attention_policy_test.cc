#include "engine/attention_policy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

namespace resa::engine {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

kernels::SelectorSpec Blocks(int block_tokens) {
  kernels::SelectorSpec spec;
  spec.block_tokens = block_tokens;
  return spec;
}

AttentionPolicy Policy(double keep, int32_t min_tokens, int32_t local, int32_t sink) {
  AttentionPolicy policy;
  policy.mode = AttentionMode::kSparse;
  policy.keep_ratio = keep;
  policy.min_tokens = min_tokens;
  policy.local_tokens = local;
  policy.sink_tokens = sink;
  return policy;
}

TEST(AttentionPolicyTest, DefaultAndPaperPoliciesAreValid) {
  EXPECT_TRUE(ValidatePolicy(AttentionPolicy{}).ok());
  EXPECT_TRUE(ValidatePolicy(PaperPolicy()).ok());
}

TEST(AttentionPolicyTest, PaperBudgetIsSixteenBlocksUntilATenthIsMore) {
  const kernels::SelectorSpec spec = Blocks(16);
  // n = max(ceil(0.1 N), min(N, 16)), arXiv 2506.04108: N = 17 keeps 16, N = 161 keeps 17.
  EXPECT_EQ(BudgetFor(PaperPolicy(), spec, 16 * 16, 0), std::nullopt);
  EXPECT_EQ(BudgetFor(PaperPolicy(), spec, 16 * 16 + 1, 0), (SparseBudget{16, 1, 0}));
  EXPECT_EQ(BudgetFor(PaperPolicy(), spec, 160 * 16, 0), (SparseBudget{16, 1, 0}));
  EXPECT_EQ(BudgetFor(PaperPolicy(), spec, 160 * 16 + 1, 0), (SparseBudget{17, 1, 0}));
}

TEST(AttentionPolicyTest, RoundsTokensUpToBlocks) {
  EXPECT_EQ(BudgetFor(Policy(0.01, 9, 9, 1), Blocks(8), 8000, 0), (SparseBudget{10, 2, 1}));
  EXPECT_EQ(BudgetFor(Policy(0.01, 100, 9, 1), Blocks(8), 8000, 0), (SparseBudget{13, 2, 1}));
}

TEST(AttentionPolicyTest, LocalAndSinkRaiseTheBudget) {
  EXPECT_EQ(BudgetFor(Policy(0.01, 1, 64, 32), Blocks(8), 800, 0), (SparseBudget{12, 8, 4}));
}

TEST(AttentionPolicyTest, KeepRatioIsADecimalNotItsNearestDouble) {
  // In binary 0.07 * 100 = 7.000000000000001.
  ASSERT_GT(0.07 * 100, 7.0);
  EXPECT_EQ(BudgetFor(Policy(0.07, 1, 1, 0), Blocks(8), 800, 0)->keep_blocks, 7);
  // The same through the float of a wire format: 0.1f is 0.100000001490116.
  EXPECT_EQ(BudgetFor(Policy(0.1f, 1, 1, 0), Blocks(8), 8000, 0)->keep_blocks, 100);
  // A real excess still rounds up.
  EXPECT_EQ(BudgetFor(Policy(0.0701, 1, 1, 0), Blocks(8), 800, 0)->keep_blocks, 8);
}

TEST(AttentionPolicyTest, TakesTheDensePathWhenNothingIsSaved) {
  AttentionPolicy dense = Policy(0.1, 64, 32, 16);
  dense.mode = AttentionMode::kDense;
  EXPECT_EQ(BudgetFor(dense, Blocks(8), 100000, 0), std::nullopt);
  EXPECT_EQ(BudgetFor(Policy(1.0, 1, 1, 0), Blocks(8), 100000, 0), std::nullopt);
  EXPECT_EQ(BudgetFor(Policy(0.1, 1, 1, 0), Blocks(8), 8, 0), std::nullopt);
  EXPECT_EQ(BudgetFor(Policy(0.1, 1, 1, 0), Blocks(8), 9, 0), (SparseBudget{1, 1, 0}));
  const int32_t most = std::numeric_limits<int32_t>::max();
  EXPECT_EQ(BudgetFor(Policy(0.1, most, most, most), Blocks(4), 100000, 0), std::nullopt);
}

TEST(AttentionPolicyTest, SparseFromIsTheFirstSparseLength) {
  EXPECT_EQ(BudgetFor(Policy(0.1, 1, 1, 0), Blocks(8), 4095, 4096), std::nullopt);
  EXPECT_NE(BudgetFor(Policy(0.1, 1, 1, 0), Blocks(8), 4096, 4096), std::nullopt);
}

// Whatever the policy, a budget is one that the kernels accept, and never below what was asked.
TEST(AttentionPolicyTest, EveryBudgetIsInsideTheSequence) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  const auto draw = [&](int32_t low, int32_t high) {
    return std::uniform_int_distribution<int32_t>(low, high)(random);
  };
  for (int i = 0; i < 20000; ++i) {
    const int block = 4 << draw(0, 2);
    const double ratio = draw(1, 1000) / 1000.0;
    const AttentionPolicy policy = Policy(ratio, draw(1, 500), draw(1, 200), draw(0, 100));
    const int32_t kv_len = draw(1, 20000);
    const int32_t blocks = (kv_len + block - 1) / block;
    const std::optional<SparseBudget> budget = BudgetFor(policy, Blocks(block), kv_len, 0);
    if (!budget.has_value()) {
      EXPECT_TRUE(blocks * block <=
                      std::max(policy.min_tokens + block,
                               policy.local_tokens + policy.sink_tokens + 2 * block) ||
                  std::ceil(ratio * blocks) >= blocks)
          << blocks << " blocks at " << ratio;
      continue;
    }
    EXPECT_LT(budget->keep_blocks, blocks);
    EXPECT_GE(budget->keep_blocks, budget->local_blocks + budget->sink_blocks);
    EXPECT_GE(budget->keep_blocks * block, std::min(policy.min_tokens, kv_len));
    EXPECT_GE(budget->keep_blocks + 1e-3, ratio * blocks);
    EXPECT_GE(budget->local_blocks * block, policy.local_tokens);
    EXPECT_GE(budget->sink_blocks * block, policy.sink_tokens);
  }
}

TEST(AttentionPolicyTest, OverridesLieOverDefaults) {
  AttentionOverrides overrides;
  overrides.keep_ratio = 0.25;
  overrides.rectify_interval = 64;
  AttentionPolicy expected = PaperPolicy();
  expected.keep_ratio = 0.25;
  expected.rectify_interval = 64;
  EXPECT_EQ(ResolvePolicy(PaperPolicy(), overrides).value(), expected);
  EXPECT_EQ(ResolvePolicy(PaperPolicy(), {}).value(), PaperPolicy());

  overrides = {};
  overrides.mode = AttentionMode::kDense;
  overrides.min_tokens = 1;
  overrides.local_tokens = 2;
  overrides.sink_tokens = 3;
  const AttentionPolicy policy = ResolvePolicy(PaperPolicy(), overrides).value();
  EXPECT_EQ(policy.mode, AttentionMode::kDense);
  EXPECT_EQ(policy.min_tokens, 1);
  EXPECT_EQ(policy.local_tokens, 2);
  EXPECT_EQ(policy.sink_tokens, 3);
}

TEST(AttentionPolicyTest, RefusesWhatIsOutOfRangeByName) {
  const auto message = [](auto change) {
    AttentionPolicy policy;
    change(&policy);
    const absl::Status status = ValidatePolicy(policy);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  for (const double ratio : {0.0, -0.1, 1.0001, std::nan("")}) {
    EXPECT_THAT(message([&](AttentionPolicy* p) { p->keep_ratio = ratio; }),
                StartsWith("keep_ratio: "));
  }
  EXPECT_THAT(message([](AttentionPolicy* p) { p->min_tokens = 0; }), StartsWith("min_tokens: "));
  EXPECT_THAT(message([](AttentionPolicy* p) { p->local_tokens = 0; }),
              StartsWith("local_tokens: "));
  EXPECT_THAT(message([](AttentionPolicy* p) { p->sink_tokens = -1; }),
              StartsWith("sink_tokens: "));
  for (const int32_t interval : {0, -8, 4, 12, 264}) {
    EXPECT_THAT(message([&](AttentionPolicy* p) { p->rectify_interval = interval; }),
                ::testing::AllOf(StartsWith("rectify_interval: "), HasSubstr("8 to 256")));
  }
  AttentionOverrides overrides;
  overrides.sink_tokens = -4;
  EXPECT_FALSE(ResolvePolicy(AttentionPolicy{}, overrides).ok());
}

TEST(AttentionPolicyTest, NamesModes) {
  EXPECT_STREQ(NameOf(AttentionMode::kDense), "dense");
  EXPECT_STREQ(NameOf(AttentionMode::kSparse), "sparse");
  EXPECT_STREQ(NameOf(AttentionMode::kRectified), "rectified");
}

}  // namespace
}  // namespace resa::engine
