// The paper's selector: exact on integers, explained elsewhere, the same bits in every batch.

#include "tests/kernels/select_fixture.h"

namespace resa::testing {
namespace {

using kernels::SelectorKind;
using kernels::SelectorSpec;
using kernels::SparseRow;

constexpr SelectorSpec kMinMax = {SelectorKind::kMinMax, 16, 0, {1.0f, 1.0f}};

class SelectMinMaxTest : public SelectTest {
 protected:
  // Small integers are exact in bf16 and their sums in f32, so every score is exact and ties
  // abound.
  std::vector<float> Integers(size_t n, int limit) {
    std::vector<float> out;
    for (size_t i = 0; i < n; ++i) out.push_back(static_cast<float>(Uniform(-limit, limit)));
    return out;
  }
};

TEST_P(SelectMinMaxTest, IntegersGiveTheExactIdsTiesIncluded) {
  auto ops = MakeOps(2);
  for (const HeadCase& heads : HeadCases()) {
    if (heads.group == 3 || heads.group == 7) continue;  // The mean would not be exact.
    const std::vector<int>& lengths = kLengths;
    const auto tokens = static_cast<size_t>(std::accumulate(lengths.begin(), lengths.end(), 0));
    // Few distinct keys: whole blocks tie.
    World world = MakeWorld(
        *ops, heads, kMinMax, lengths,
        Integers(tokens * static_cast<size_t>(heads.kv_heads * heads.head_dim), 1),
        Integers(lengths.size() * static_cast<size_t>(heads.heads() * heads.head_dim), 2));
    for (double share : {0.0, 0.1, 0.5, 1.0}) {
      const std::vector<SparseRow> rows = Rows(world, share, Uniform(0, 2), Uniform(0, 1));
      const std::vector<int32_t> ids = Select(*ops, world, rows);
      for (const SparseRow& row : rows) {
        for (int h = 0; h < heads.kv_heads; ++h) {
          const auto scores =
              ScoreMinMax(QueriesOf(world, row.row, h), KeysOf(world, row.row, h), 16, {});
          EXPECT_EQ(IdsOf(ids, row, h), TopBlocks(scores, BudgetOf(row)))
              << heads.Name() << ", length " << row.position + 1 << ", head " << h;
        }
      }
    }
  }
}

TEST_P(SelectMinMaxTest, RandomIdsAreExplainedByTheScores) {
  auto ops = MakeOps(2);
  for (const HeadCase& heads : HeadCases()) {
    World world = MakeRandomWorld(*ops, heads, kMinMax, {513, 777, 1537});
    const std::vector<SparseRow> rows = Rows(world, 0.2, 1, 0);
    const std::vector<int32_t> ids = Select(*ops, world, rows);
    for (const SparseRow& row : rows) {
      for (int h = 0; h < heads.kv_heads; ++h) {
        // The keys are those of the pool, bit for bit; 2 d multiply-adds of 2^-24 each.
        const auto scores = ScoreMinMax(QueriesOf(world, row.row, h), KeysOf(world, row.row, h), 16,
                                        {.vector = 0, .score = 2e-6});
        EXPECT_EQ(ExplainChoice(scores, BudgetOf(row), IdsOf(ids, row, h)), "") << heads.Name();
      }
    }
  }
}

TEST_P(SelectMinMaxTest, LongContextsAreExplainedByTheScores) {
  if (!RunsLongTests()) GTEST_SKIP() << "another target or build runs it";
  auto ops = MakeOps(2);
  for (const auto& [heads, length] :
       {std::pair{HeadCase{1, 4, 64, kernels::DType::kBF16}, 131077},
        std::pair{HeadCase{1, 7, 128, kernels::DType::kBF16}, 40001}}) {
    World world = MakeRandomWorld(*ops, heads, kMinMax, {length, 1000});
    for (double share : {0.05, 0.1, 0.6}) {
      const std::vector<SparseRow> rows = Rows(world, share, 2, 1);
      const std::vector<int32_t> ids = Select(*ops, world, rows);
      const auto scores = ScoreMinMax(QueriesOf(world, 0, 0), KeysOf(world, 0, 0), 16,
                                      {.vector = 0, .score = 2e-6});
      EXPECT_EQ(ExplainChoice(scores, BudgetOf(rows[0]), IdsOf(ids, rows[0], 0)), "")
          << heads.Name() << ", keep " << share;
    }
  }
}

TEST_P(SelectMinMaxTest, BatchAndThreadsDoNotChangeTheChoice) {
  const HeadCase heads = {2, 7, 128, kernels::DType::kBF16};
  auto one = MakeOps(1);
  World world = MakeRandomWorld(*one, heads, kMinMax, {300, 777, 5000});
  const std::vector<SparseRow> rows = Rows(world, 0.1, 1, 1);
  const std::vector<int32_t> want = Select(*one, world, rows);
  for (int threads : {1, 2, 5}) {
    auto ops = MakeOps(threads);
    EXPECT_EQ(Select(*ops, world, rows), want);
    for (const SparseRow& row : rows) {
      const std::vector<int32_t> alone = Select(*ops, world, {row});
      for (int h = 0; h < heads.kv_heads; ++h) {
        EXPECT_EQ(IdsOf(alone, row, h), IdsOf(want, row, h));
      }
    }
  }
}

TEST_P(SelectMinMaxTest, ANaNBlockIsTheLastToBeKept) {
  auto ops = MakeOps(1);
  const HeadCase heads = Supported({1, 2, 64, kernels::DType::kF32});
  std::vector<float> keys = Normal(160 * 64);
  std::fill_n(keys.begin() + 35 * 64, 64, std::numeric_limits<float>::quiet_NaN());  // Block 2.
  World world = MakeWorld(*ops, heads, kMinMax, {160}, keys, Normal(128));
  const std::vector<int32_t> ids =
      Select(*ops, world, {{.row = 0, .position = 159, .table = 0, .keep_blocks = 9}});
  EXPECT_EQ(ids, (std::vector<int32_t>{0, 1, 3, 4, 5, 6, 7, 8, 9}));
}

TEST_P(SelectMinMaxTest, CountsBlocksAndBytes) {
  auto ops = MakeOps(2);
  const HeadCase heads = {2, 4, 128, kernels::DType::kBF16};
  World world = MakeRandomWorld(*ops, heads, kMinMax, {1000, 40});
  // 63 blocks, and 3 of 3: the second row has nothing to choose.
  Select(*ops, world,
         {{.row = 0, .position = 999, .table = 0, .keep_blocks = 10},
          {.row = 1, .position = 39, .table = 1, .keep_blocks = 3, .ids_begin = 20}});
  EXPECT_EQ(ops->counters().blocks_scored, 2 * 63);
  EXPECT_EQ(ops->counters().descriptor_bytes, 2 * 63 * 2 * 2 * 128);
}

RESA_INSTANTIATE_OPS_TEST(SelectMinMaxTest);

}  // namespace
}  // namespace resa::testing
