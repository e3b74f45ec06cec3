// The sketch selector: ids explained by a float64 reference, exact ties, counters, the same choice
// in every batch.

#include <cmath>

#include "hwy/targets.h"
#include "kernels/sketch.h"
#include "tests/kernels/select_fixture.h"

namespace resa::testing {
namespace {

using kernels::SelectorKind;
using kernels::SelectorSpec;
using kernels::SparseRow;

std::vector<int> Signs(int d) {
  std::vector<int> signs;
  for (int j = 0; j < d; ++j) signs.push_back(kernels::SketchSign(j) > 0 ? 1 : -1);
  return signs;
}

std::string NameOf(const SelectorSpec& spec) {
  return "block " + std::to_string(spec.block_tokens) + ", planes " + std::to_string(spec.planes) +
         ", shares " + std::to_string(spec.refine_share[0]) + " " +
         std::to_string(spec.refine_share[1]);
}

class SelectSketchTest : public SelectTest {
 protected:
  static std::vector<SelectorSpec> Sketches() {
    std::vector<SelectorSpec> sketches;
    for (const SelectorSpec& spec : kSelectors) {
      if (spec.kind == SelectorKind::kSketch) sketches.push_back(spec);
    }
    return sketches;
  }
};

TEST_P(SelectSketchTest, RandomIdsAreExplainedByTheScores) {
  auto ops = MakeOps(2);
  size_t turn = 0;
  for (const SelectorSpec& spec : Sketches()) {
    for (int i = 0; i < 3; ++i) {
      const HeadCase heads = Supported(kHeadCases[turn++ % kHeadCases.size()]);
      World world = MakeRandomWorld(*ops, heads, spec, {33, 257, 700, 1100});
      // Sixteen times larger logits spread the masses over most of what a float holds.
      const float scale = i == 1 ? 16.0f : 1.0f;
      for (float& x : world.q) x *= scale;
      const std::vector<SparseRow> rows = Rows(world, 0.1, 1, 1);
      const std::vector<int32_t> ids = Select(*ops, world, rows);
      // A rotation is log2(d) rounded additions and two products: 9 * 2^-24 = 5e-7. An estimate
      // of at most about 10 takes three more roundings, its exponential 2e-7.
      const SelectionTolerance tolerance = {.vector = 1e-6, .score = 5e-6 * scale};
      const std::vector<int> signs = Signs(heads.head_dim);
      for (const SparseRow& row : rows) {
        for (int h = 0; h < heads.kv_heads; ++h) {
          std::vector<KeySketch> keys;
          for (const Vector& key : KeysOf(world, row.row, h)) {
            keys.push_back(MakeKeySketch(key, signs, spec.planes, tolerance));
          }
          const auto scores = ScoreSketch(QueriesOf(world, row.row, h), keys, spec, BudgetOf(row),
                                          signs, tolerance);
          EXPECT_EQ(ExplainChoice(scores, BudgetOf(row), IdsOf(ids, row, h)), "")
              << NameOf(spec) << ", " << heads.Name() << ", length " << row.position + 1;
        }
      }
    }
  }
}

TEST_P(SelectSketchTest, LongContextsAreExplainedByTheScores) {
  if (!RunsLongTests()) GTEST_SKIP() << "another target or build runs it";
  auto ops = MakeOps(2);
  struct Case {
    HeadCase heads;
    int length;
    SelectorSpec spec;
  };
  for (const Case& c :
       {Case{{1, 4, 64, kernels::DType::kBF16}, 131077, {SelectorKind::kSketch, 8, 2, {1, 1}}},
        Case{{1, 7, 128, kernels::DType::kBF16},
             40001,
             {SelectorKind::kSketch, 8, 2, {0.25f, 0.25f}}},
        Case{{1, 4, 64, kernels::DType::kBF16},
             65539,
             {SelectorKind::kSketch, 4, 3, {0.4f, 0.2f}}}}) {
    World world = MakeRandomWorld(*ops, c.heads, c.spec, {c.length, 1000});
    const std::vector<SparseRow> rows = Rows(world, 0.1, 2, 1);
    const std::vector<int32_t> ids = Select(*ops, world, rows);
    const SelectionTolerance tolerance = {.vector = 1e-6, .score = 5e-6};
    const std::vector<int> signs = Signs(c.heads.head_dim);
    std::vector<KeySketch> keys;
    for (const Vector& key : KeysOf(world, 0, 0)) {
      keys.push_back(MakeKeySketch(key, signs, c.spec.planes, tolerance));
    }
    const auto scores =
        ScoreSketch(QueriesOf(world, 0, 0), keys, c.spec, BudgetOf(rows[0]), signs, tolerance);
    EXPECT_EQ(ExplainChoice(scores, BudgetOf(rows[0]), IdsOf(ids, rows[0], 0)), "")
        << NameOf(c.spec) << ", " << c.heads.Name() << ", length " << c.length;
  }
}

// The reference allows for rounding by intervals; this shows that they are narrow: ids from the
// exact scores agree nearly everywhere.
TEST_P(SelectSketchTest, NearlyAllIdsAreThoseOfExactArithmetic) {
  auto ops = MakeOps(2);
  const HeadCase heads = {2, 4, 128, kernels::DType::kBF16};
  const SelectorSpec spec = {SelectorKind::kSketch, 8, 2, {1.0f, 1.0f}};
  World world = MakeRandomWorld(*ops, heads, spec, {1537, 1025});
  const std::vector<SparseRow> rows = Rows(world, 0.2, 1, 1);
  const std::vector<int32_t> ids = Select(*ops, world, rows);
  const std::vector<int> signs = Signs(heads.head_dim);
  size_t kept = 0, common = 0;
  for (const SparseRow& row : rows) {
    for (int h = 0; h < heads.kv_heads; ++h) {
      std::vector<KeySketch> keys;
      for (const Vector& key : KeysOf(world, row.row, h)) {
        keys.push_back(MakeKeySketch(key, signs, spec.planes, {}));
      }
      const std::vector<int> want =
          TopBlocks(ScoreSketch(QueriesOf(world, row.row, h), keys, spec, BudgetOf(row), signs, {}),
                    BudgetOf(row));
      const std::vector<int> got = IdsOf(ids, row, h);
      std::vector<int> both;
      std::set_intersection(got.begin(), got.end(), want.begin(), want.end(),
                            std::back_inserter(both));
      kept += want.size();
      common += both.size();
    }
  }
  EXPECT_GE(common + 2, kept) << common << " of " << kept;
}

TEST_P(SelectSketchTest, EqualBlocksTieToTheLowerIds) {
  auto ops = MakeOps(2);
  for (const SelectorSpec& spec : Sketches()) {
    const HeadCase heads = {1, 3, 64, kernels::DType::kBF16};
    const int blocks = 60;
    // Blocks alternate between two contents; those of the higher score come first, in order.
    const std::vector<float> q = Normal(3 * 64);
    std::vector<float> keys;
    for (int i = 0; i < blocks; ++i) {
      for (int t = 0; t < spec.block_tokens; ++t) {
        for (int j = 0; j < 64; ++j) {
          const float mean = q[static_cast<size_t>(j)] + q[static_cast<size_t>(64 + j)] +
                             q[static_cast<size_t>(128 + j)];
          keys.push_back(i % 2 == 0 ? -mean : mean);
        }
      }
    }
    World world = MakeWorld(*ops, heads, spec, {blocks * spec.block_tokens}, keys, q);
    const std::vector<int32_t> ids = Select(
        *ops, world,
        {{.row = 0, .position = blocks * spec.block_tokens - 1, .table = 0, .keep_blocks = 34}});
    std::vector<int32_t> want = {0, 2, 4, 6};  // The first four of the lower ones.
    for (int i = 1; i < blocks; i += 2) want.push_back(i);
    std::sort(want.begin(), want.end());
    EXPECT_EQ(ids, want) << NameOf(spec);
  }
}

TEST_P(SelectSketchTest, BatchAndThreadsDoNotChangeTheChoice) {
  for (const SelectorSpec& spec : Sketches()) {
    const HeadCase heads = {2, 3, 128, kernels::DType::kBF16};
    auto one = MakeOps(1);
    World world = MakeRandomWorld(*one, heads, spec, {90, 777, 6000});
    const std::vector<SparseRow> rows = Rows(world, 0.1, 2, 1);
    const std::vector<int32_t> want = Select(*one, world, rows);
    for (int threads : {1, 2, 5}) {
      auto ops = MakeOps(threads);
      EXPECT_EQ(Select(*ops, world, rows), want) << NameOf(spec);
      for (const SparseRow& row : rows) {
        const std::vector<int32_t> alone = Select(*ops, world, {row});
        for (int h = 0; h < heads.kv_heads; ++h) {
          EXPECT_EQ(IdsOf(alone, row, h), IdsOf(want, row, h)) << NameOf(spec);
        }
      }
    }
  }
}

TEST_P(SelectSketchTest, SinkAndLocalBlocksAreAlwaysKept) {
  auto ops = MakeOps(1);
  const HeadCase heads = Supported({2, 4, 64, kernels::DType::kF32});
  const SelectorSpec spec = {SelectorKind::kSketch, 8, 2, {1.0f, 1.0f}};
  World world = MakeRandomWorld(*ops, heads, spec, {403});  // 51 blocks, the last of 3 tokens.
  const SparseRow row = {
      .row = 0, .position = 402, .table = 0, .keep_blocks = 7, .local_blocks = 4, .sink_blocks = 2};
  const std::vector<int32_t> ids = Select(*ops, world, {row});
  for (int h = 0; h < 2; ++h) {
    const std::vector<int> kept = IdsOf(ids, row, h);
    EXPECT_EQ(std::vector<int>(kept.begin(), kept.begin() + 2), (std::vector<int>{0, 1}));
    EXPECT_EQ(std::vector<int>(kept.begin() + 3, kept.end()), (std::vector<int>{47, 48, 49, 50}));
    EXPECT_TRUE(kept[2] > 1 && kept[2] < 47) << kept[2];
  }
  // A budget that they fill leaves nothing to score.
  const int64_t scored = ops->counters().blocks_scored;
  EXPECT_EQ(Select(*ops, world,
                   {{.row = 0,
                     .position = 402,
                     .table = 0,
                     .keep_blocks = 3,
                     .local_blocks = 2,
                     .sink_blocks = 1}}),
            (std::vector<int32_t>{0, 49, 50, 0, 49, 50}));
  EXPECT_EQ(ops->counters().blocks_scored, scored);
}

TEST_P(SelectSketchTest, ABadKeyHurtsItsOwnBlockOnly) {
  auto ops = MakeOps(1);
  const HeadCase heads = Supported({1, 2, 64, kernels::DType::kF32});
  const SelectorSpec spec = {SelectorKind::kSketch, 4, 2, {1.0f, 1.0f}};
  std::vector<float> keys = Normal(80 * 64);
  std::fill_n(keys.begin() + 20 * 64, 4 * 64, std::numeric_limits<float>::quiet_NaN());
  World world = MakeWorld(*ops, heads, spec, {80}, keys, Normal(128));
  const std::vector<int32_t> ids =
      Select(*ops, world, {{.row = 0, .position = 79, .table = 0, .keep_blocks = 19}});
  std::vector<int32_t> want;
  for (int i = 0; i < 20; ++i) {
    if (i != 5) want.push_back(i);
  }
  EXPECT_EQ(ids, want);
  // A query that is not a number leaves every block alike: the lowest ids.
  std::fill(world.q.begin(), world.q.end(), std::numeric_limits<float>::quiet_NaN());
  EXPECT_EQ(Select(*ops, world, {{.row = 0, .position = 79, .table = 0, .keep_blocks = 3}}),
            (std::vector<int32_t>{0, 1, 2}));
}

TEST_P(SelectSketchTest, CountsBlocksAndBytes) {
  const HeadCase heads = {2, 4, 128, kernels::DType::kBF16};
  const int blocks = 1000 / 8;
  struct Case {
    SelectorSpec spec;
    int64_t scored;  // Per KV head, blocks times planes.
  };
  // Shares of 125 blocks: 32 at 25 %, 15 at 12 %.
  for (const Case& c : {Case{{SelectorKind::kSketch, 8, 2, {1.0f, 1.0f}}, 2 * blocks},
                        Case{{SelectorKind::kSketch, 8, 2, {0.25f, 0.12f}}, blocks + 32},
                        Case{{SelectorKind::kSketch, 8, 3, {0.25f, 0.12f}}, blocks + 32 + 15},
                        Case{{SelectorKind::kSketch, 8, 3, {1.0f, 0.12f}}, 2 * blocks + 15}}) {
    auto ops = MakeOps(2);
    World world = MakeRandomWorld(*ops, heads, c.spec, {1000});
    Select(*ops, world, {{.row = 0, .position = 999, .table = 0, .keep_blocks = 10}});
    EXPECT_EQ(ops->counters().blocks_scored, 2 * c.scored) << NameOf(c.spec);
    EXPECT_EQ(ops->counters().descriptor_bytes, 2 * (c.scored * 8 * 16 + blocks * 8 * 2));
  }
}

// With a peaked query the sketch must find what attention looks at: the block of a planted key.
TEST_P(SelectSketchTest, FindsAPlantedKey) {
  auto ops = MakeOps(2);
  for (const SelectorSpec& spec : Sketches()) {
    const HeadCase heads = {1, 4, 128, kernels::DType::kBF16};
    const int length = 2000;
    std::vector<float> keys = Normal(static_cast<size_t>(length) * 128);
    const std::vector<float> q = Normal(4 * 128);
    const int at = Uniform(100, 1900);
    for (int j = 0; j < 128; ++j) {
      keys[static_cast<size_t>(at * 128 + j)] = 1.5f * q[static_cast<size_t>(2 * 128 + j)];
    }
    World world = MakeWorld(*ops, heads, spec, {length}, keys, q);
    const std::vector<int32_t> ids =
        Select(*ops, world, {{.row = 0, .position = length - 1, .table = 0, .keep_blocks = 2}});
    EXPECT_TRUE(std::count(ids.begin(), ids.end(), at / spec.block_tokens) == 1) << NameOf(spec);
  }
}

// The instruction sets of all ops, and AVX-512 with VNNI, which this one alone uses.
std::vector<TestTarget> SketchTargets() {
  std::vector<TestTarget> targets = TestTargets();
#if defined(__x86_64__)
  constexpr int64_t kVnni = HWY_AVX3 | HWY_AVX3_DL;
  if ((hwy::SupportedTargets() & kVnni) == kVnni) targets.push_back({.instructions = kVnni});
#endif
  return targets;
}
std::string SketchTargetName(const ::testing::TestParamInfo<TestTarget>& info) {
#if defined(__x86_64__)
  if ((info.param.instructions & HWY_AVX3_DL) != 0) return "AVX3_VNNI";
#endif
  return TargetTestName(info);
}
INSTANTIATE_TEST_SUITE_P(Target, SelectSketchTest, ::testing::ValuesIn(SketchTargets()),
                         SketchTargetName);

}  // namespace
}  // namespace resa::testing
