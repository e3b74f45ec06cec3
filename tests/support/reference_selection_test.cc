// The reference's selection, against numbers worked out by hand and the properties that the method
// promises.

#include "tests/support/reference_selection.h"

#include <algorithm>
#include <cmath>
#include <iostream>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/bf16.h"
#include "kernels/sketch.h"
#include "tests/support/test_random.h"

namespace resa::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

double Dot(const Vector& a, const Vector& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// ---- rounding -----------------------------------------------------------------------------------

TEST(ReferenceRoundingTest, Bf16AgreesWithTheStorageTypeOnEveryDirection) {
  Random random(1);
  for (int i = 0; i < 20000; ++i) {
    const float x = static_cast<float>(random.Normal() * std::pow(2.0, random.Below(40) - 20));
    ASSERT_EQ(RoundToBf16(x), kernels::ToFloat(kernels::RoundToBf16(x))) << x;
    ASSERT_EQ(FloorToBf16(x), kernels::ToFloat(kernels::FloorToBf16(x))) << x;
    ASSERT_EQ(CeilToBf16(x), kernels::ToFloat(kernels::CeilToBf16(x))) << x;
  }
  EXPECT_EQ(RoundToBf16(0), 0);
  EXPECT_EQ(FloorToBf16(1.0), 1.0);
  EXPECT_EQ(CeilToBf16(1.0 + 1e-9), 1.0 + 1.0 / 128);
  EXPECT_EQ(FloorToBf16(-1.0 - 1e-9), -1.0 - 1.0 / 128);
}

// ---- sketch -------------------------------------------------------------------------------------

TEST(ReferenceSketchTest, RotationKeepsDotProducts) {
  Random random(2);
  for (int d : {64, 128}) {
    const std::vector<int> signs = random.Signs(d);
    const Vector a = random.Normals(d), b = random.Normals(d);
    EXPECT_NEAR(Dot(Rotate(a, signs), Rotate(b, signs)), Dot(a, b), 1e-12 * d);
  }
}

TEST(ReferenceSketchTest, RotationOfAUnitVectorSpreadsItEvenly) {
  const std::vector<int> signs = {1, -1, 1, 1};
  EXPECT_THAT(Rotate({0, 1, 0, 0}, signs), ElementsAre(-0.5, 0.5, -0.5, 0.5));
}

TEST(ReferenceSketchTest, LevelsAreOddAndCoarserOnesAreTheUpperBits) {
  std::vector<int> one, two, three;
  for (int code = 0; code < 8; ++code) {
    one.push_back(LevelOf(code, 1));
    two.push_back(LevelOf(code, 2));
    three.push_back(LevelOf(code, 3));
  }
  EXPECT_THAT(one, ElementsAre(-1, -1, -1, -1, 1, 1, 1, 1));
  EXPECT_THAT(two, ElementsAre(-3, -3, -1, -1, 1, 1, 3, 3));
  EXPECT_THAT(three, ElementsAre(-7, -5, -3, -1, 1, 3, 5, 7));
}

TEST(ReferenceSketchTest, GaussianScalesAreTheDesignsConstants) {
  EXPECT_NEAR(GaussianScale(1), 1.253, 5e-4);
  EXPECT_NEAR(GaussianScale(2), 0.635, 5e-4);
  EXPECT_NEAR(GaussianScale(3), 0.310, 5e-4);
  for (int planes = 1; planes <= 3; ++planes) {
    EXPECT_NEAR(GaussianScale(planes) / kernels::kSketchGaussianScale[planes], 1, 1e-7);
  }
}

// <x, x^> = <x, x> is what makes the estimate unbiased along x; the scale in bf16 leaves 2^-8.
TEST(ReferenceSketchTest, EstimateAlongTheKeyIsExact) {
  Random random(3);
  const std::vector<int> signs = random.Signs(64);
  for (int planes = 1; planes <= 3; ++planes) {
    const Vector key = random.Normals(64, 3.0);
    const KeySketch sketch = MakeKeySketch(key, signs, planes, {});
    const Vector x = Rotate(key, signs);
    double projection = 0;
    for (size_t j = 0; j < x.size(); ++j) {
      projection += x[j] * LevelOf(sketch.code[j], planes) * sketch.scale.value;
    }
    EXPECT_NEAR(projection / Dot(x, x), 1.0, 1.0 / 256);
  }
}

// Over random sign flips the estimate of q.k has no bias: the mean error is within four standard
// errors of zero, and the error shrinks with every plane.
TEST(ReferenceSketchTest, EstimatorIsUnbiasedOverRotationsAndSharpensWithPlanes) {
  Random random(4);
  constexpr int kDim = 64, kDraws = 4000;
  const Vector key = random.Normals(kDim), noise = random.Normals(kDim);
  Vector query(kDim);
  for (int j = 0; j < kDim; ++j) query[j] = 0.7 * key[j] + noise[j];
  const double exact = Dot(query, key) / std::sqrt(double(kDim));
  double previous = INFINITY;
  for (int planes = 1; planes <= 3; ++planes) {
    double sum = 0, squares = 0;
    for (int i = 0; i < kDraws; ++i) {
      const std::vector<int> signs = random.Signs(kDim);
      const double error = EstimateLogit(MakeQuerySketch(query, signs, {}),
                                         MakeKeySketch(key, signs, planes, {}), planes, planes, {})
                               .value -
                           exact;
      sum += error;
      squares += error * error;
    }
    const double deviation = std::sqrt(squares / kDraws);
    // The scale's bf16 rounding is a bias of its own, at most 2^-9 of the logit per key; over the
    // draws' scales it averages out, half of it is a generous bound.
    EXPECT_LT(std::abs(sum / kDraws),
              4 * deviation / std::sqrt(double(kDraws)) + std::abs(exact) / 1024)
        << planes << " planes";
    EXPECT_LT(deviation, 0.75 * previous) << planes << " planes";
    previous = deviation;
  }
}

TEST(ReferenceSketchTest, ZeroKeyAndZeroQueryEstimateZero) {
  Random random(5);
  const std::vector<int> signs = random.Signs(64);
  const Vector zero(64, 0.0), x = random.Normals(64);
  const KeySketch key = MakeKeySketch(zero, signs, 2, {});
  EXPECT_EQ(EstimateLogit(MakeQuerySketch(x, signs, {}), key, 2, 2, {}).value, 0);
  const QuerySketch query = MakeQuerySketch(zero, signs, {});
  EXPECT_EQ(EstimateLogit(query, MakeKeySketch(x, signs, 2, {}), 2, 2, {}).value, 0);
}

// ---- scores -------------------------------------------------------------------------------------

TEST(ReferenceScoreTest, MinMaxByHand) {
  // Two blocks of two keys, two heads. Mean query (1, -2).
  const std::vector<Vector> queries = {{2, -4}, {0, 0}};
  const std::vector<Vector> keys = {{1, 1}, {3, -1}, {-2, 5}, {0, 4}};
  // Block 0: min (1, -1), max (3, 1): max(1, 3) + max(2, -2) = 5.
  // Block 1: min (-2, 4), max (0, 5): max(-2, 0) + max(-8, -10) = -8.
  const std::vector<Interval> scores = ScoreMinMax(queries, keys, 2, {});
  ASSERT_EQ(scores.size(), 2u);
  EXPECT_EQ(scores[0].value, 5);
  EXPECT_EQ(scores[1].value, -8);
  EXPECT_EQ(scores[0].low, 5);
  EXPECT_EQ(scores[1].high, -8);
}

TEST(ReferenceScoreTest, MinMaxBoundsEveryDotProductOfTheBlock) {
  Random random(6);
  std::vector<Vector> queries = {random.Normals(64)}, keys;
  for (int i = 0; i < 100; ++i) keys.push_back(random.Normals(64));
  const std::vector<Interval> scores = ScoreMinMax(queries, keys, 16, {});
  ASSERT_EQ(scores.size(), 7u);  // The last block is ragged.
  for (size_t t = 0; t < keys.size(); ++t) {
    EXPECT_GE(scores[t / 16].value, Dot(queries[0], keys[t]));
  }
}

TEST(ReferenceScoreTest, SketchMassSumsToTheNumberOfHeads) {
  Random random(7);
  const std::vector<int> signs = random.Signs(64);
  const std::vector<Vector> queries = {random.Normals(64), random.Normals(64), random.Normals(64)};
  std::vector<KeySketch> keys;
  for (int i = 0; i < 101; ++i) keys.push_back(MakeKeySketch(random.Normals(64), signs, 2, {}));
  kernels::SelectorSpec spec;
  spec.planes = 2;
  double sum = 0;
  for (const Interval& block : ScoreSketch(queries, keys, spec, {8, 1, 1}, signs, {})) {
    sum += block.value;
  }
  EXPECT_NEAR(sum, 3, 1e-12);
}

// Only blocks that reach the last pass have a share, among them the sink and the local ones.
TEST(ReferenceScoreTest, ProgressiveReadingRanksTheSurvivorsAlone) {
  Random random(10);
  const std::vector<int> signs = random.Signs(64);
  const std::vector<Vector> queries = {random.Normals(64), random.Normals(64)};
  std::vector<KeySketch> keys;
  for (int i = 0; i < 399; ++i) keys.push_back(MakeKeySketch(random.Normals(64), signs, 3, {}));
  for (int t = 0; t < 4; ++t) keys[t].scale = keys[395 + t].scale = {0, 0, 0};
  kernels::SelectorSpec spec;
  spec.block_tokens = 4;
  spec.refine_share = {0.25f, 0.12f};
  const std::vector<Interval> scores = ScoreSketch(queries, keys, spec, {8, 1, 1}, signs, {});
  double sum = 0;
  int survivors = 0;
  for (const Interval& block : scores) {
    if (block.value == -1) continue;
    ++survivors;
    sum += block.value;
  }
  EXPECT_EQ(survivors, 12);
  EXPECT_NEAR(sum, 2, 1e-12);
  EXPECT_GT(scores.front().value, 0);
  EXPECT_GT(scores.back().value, 0);
  // At full shares every plane is read of every block.
  spec.refine_share = {1.0f, 1.0f};
  const std::vector<Interval> whole = ScoreSketch(queries, keys, spec, {8, 1, 1}, signs, {});
  EXPECT_GT(std::min_element(whole.begin(), whole.end(),
                             [](const auto& a, const auto& b) { return a.value < b.value; })
                ->value,
            0);
}

// Any implementation whose inputs are off by at most the tolerance lands inside the intervals.
TEST(ReferenceScoreTest, IntervalsHoldUnderPerturbation) {
  Random random(8);
  constexpr int kDim = 64, kTokens = 200;
  const SelectionTolerance tolerance{1e-4, 0};
  const auto perturb = [&](const Vector& x) {
    Vector noise = random.Normals(x.size());
    const double scale = 0.99 * tolerance.vector * std::sqrt(Dot(x, x) / Dot(noise, noise));
    for (size_t j = 0; j < x.size(); ++j) noise[j] = x[j] + scale * noise[j];
    return noise;
  };
  const std::vector<int> signs = random.Signs(kDim);
  kernels::SelectorSpec spec;
  spec.planes = 3;
  spec.refine_share = {0.4f, 0.2f};
  int moved = 0;
  for (int round = 0; round < 10; ++round) {
    std::vector<Vector> queries, near_queries, keys, near_keys;
    std::vector<KeySketch> sketches, near_sketches;
    for (int h = 0; h < 3; ++h) {
      queries.push_back(random.Normals(kDim, 2.0));
      near_queries.push_back(perturb(queries.back()));
    }
    for (int t = 0; t < kTokens; ++t) {
      keys.push_back(random.Normals(kDim, 2.0));
      near_keys.push_back(perturb(keys.back()));
      sketches.push_back(MakeKeySketch(keys.back(), signs, 3, tolerance));
      near_sketches.push_back(MakeKeySketch(near_keys.back(), signs, 3, {}));
    }
    const Budget budget{5, 1, 1};
    const auto check = [&](const std::vector<Interval>& wide, const std::vector<Interval>& near) {
      for (size_t i = 0; i < wide.size(); ++i) {
        ASSERT_LE(wide[i].low, near[i].value) << i;
        ASSERT_GE(wide[i].high, near[i].value) << i;
        moved += wide[i].value != near[i].value;
      }
    };
    check(ScoreSketch(queries, sketches, spec, budget, signs, tolerance),
          ScoreSketch(near_queries, near_sketches, spec, budget, signs, {}));
    check(ScoreMinMax(queries, keys, 16, tolerance), ScoreMinMax(near_queries, near_keys, 16, {}));
  }
  EXPECT_GT(moved, 0);
}

// ---- the choice ---------------------------------------------------------------------------------

std::vector<Interval> Exact(const Vector& values) {
  std::vector<Interval> scores;
  for (double value : values) scores.push_back({value, value, value});
  return scores;
}

TEST(ReferenceChoiceTest, SinkAndLocalCountInsideTheBudgetAndTiesGoToTheLowerId) {
  const std::vector<Interval> scores = Exact({0, 5, 7, 7, 9, 7, 0});
  EXPECT_THAT(TopBlocks(scores, {4, 1, 1}), ElementsAre(0, 2, 4, 6));
  EXPECT_THAT(TopBlocks(scores, {3, 0, 0}), ElementsAre(2, 3, 4));
  EXPECT_THAT(TopBlocks(scores, {2, 1, 1}), ElementsAre(0, 6));
  EXPECT_THAT(TopBlocks(scores, {7, 1, 1}), ElementsAre(0, 1, 2, 3, 4, 5, 6));
}

TEST(ReferenceChoiceTest, ExplainsEveryWayToBeWrong) {
  std::vector<Interval> scores = Exact({0, 5, 7, 6, 9, 1, 0});
  const Budget budget{4, 1, 1};
  const auto explain = [&](std::vector<int> ids) { return ExplainChoice(scores, budget, ids); };
  EXPECT_THAT(explain({0, 2, 4, 6}), IsEmpty());
  EXPECT_THAT(explain({0, 2, 4}), HasSubstr("3 blocks kept"));
  EXPECT_THAT(explain({0, 4, 2, 6}), HasSubstr("not ascending"));
  EXPECT_THAT(explain({0, 2, 4, 7}), HasSubstr("not ascending"));
  EXPECT_THAT(explain({1, 2, 4, 6}), HasSubstr("block 0 of 7 is not kept"));
  EXPECT_THAT(explain({0, 3, 4, 6}), HasSubstr("block 3 is kept"));
  scores[3] = {5.5, 6, 7.1};
  EXPECT_THAT(explain({0, 3, 4, 6}), IsEmpty());
  EXPECT_THAT(explain({0, 1, 4, 6}), HasSubstr("block 1 is kept"));
}

// What selection is for: the share of the true attention mass that the kept blocks hold. The keys
// have a few dimensions of large variance, as trained keys do, and 1 in 40 answers the query.
TEST(ReferenceChoiceTest, SketchKeepsMoreOfTheAttentionThanMinMaxAtTheSameBudget) {
  Random random(9);
  constexpr int kDim = 64, kTokens = 1600, kRounds = 12;
  kernels::SelectorSpec sketch;
  sketch.planes = 2;
  sketch.block_tokens = 16;  // The same granularity for both.
  const std::vector<int> signs = random.Signs(kDim);
  const Budget budget{10, 1, 0};
  double minmax_mass = 0, sketch_mass = 0;
  for (int round = 0; round < kRounds; ++round) {
    const Vector query = random.Normals(kDim, 1.5);
    std::vector<Vector> keys;
    std::vector<KeySketch> sketches;
    for (int t = 0; t < kTokens; ++t) {
      Vector key = random.Normals(kDim);
      for (int j = 0; j < 8; ++j) key[j] *= 4;
      if (random.Below(40) == 0) {
        for (int j = 0; j < kDim; ++j) key[j] += 0.5 * query[j];
      }
      sketches.push_back(MakeKeySketch(key, signs, 2, {}));
      keys.push_back(std::move(key));
    }
    const std::vector<Vector> queries = {query};
    const auto mass_of = [&](const std::vector<int>& ids) {
      double kept = 0, all = 0;
      for (int t = 0; t < kTokens; ++t) {
        const double weight = std::exp(Dot(query, keys[t]) / std::sqrt(double(kDim)));
        all += weight;
        if (std::find(ids.begin(), ids.end(), t / 16) != ids.end()) kept += weight;
      }
      return kept / all;
    };
    minmax_mass += mass_of(TopBlocks(ScoreMinMax(queries, keys, 16, {}), budget)) / kRounds;
    sketch_mass +=
        mass_of(TopBlocks(ScoreSketch(queries, sketches, sketch, budget, signs, {}), budget)) /
        kRounds;
  }
  std::cout << "mass kept by 10 of 100 blocks: minmax " << minmax_mass << ", sketch " << sketch_mass
            << "\n";
  EXPECT_GT(sketch_mass, minmax_mass + 0.1);
}

}  // namespace
}  // namespace resa::testing
