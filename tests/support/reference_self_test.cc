// The reference is what the engine is held against, so it is tested on its own first: against
// numbers worked out by hand, and against the properties the method promises.

#include <cmath>
#include <iostream>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/bf16.h"
#include "kernels/sketch.h"
#include "tests/support/reference_schedule.h"
#include "tests/support/reference_selection.h"
#include "tests/support/resa_reference.h"

namespace resa::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) { std::cout << "seed " << seed << "\n"; }
  double Normal() { return normal_(engine_); }
  int Below(int n) { return static_cast<int>(engine_() % static_cast<uint32_t>(n)); }
  Vector Normals(size_t n, double scale = 1) {
    Vector out(n);
    for (double& x : out) x = scale * Normal();
    return out;
  }
  std::vector<int> Signs(size_t n) {
    std::vector<int> out(n);
    for (int& s : out) s = Below(2) == 0 ? 1 : -1;
    return out;
  }
  DenseMatrix Matrix(int rows, int cols, double gain = 1) {
    return {rows, cols, Normals(static_cast<size_t>(rows) * cols, gain / std::sqrt(cols))};
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<double> normal_;
};

double Dot(const Vector& a, const Vector& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

ReferenceModel RandomModel(Random* random, int layers, int heads, int kv_heads, int d) {
  constexpr int kHidden = 32, kMlp = 48, kVocab = 64;
  ReferenceModel model;
  model.heads = heads;
  model.kv_heads = kv_heads;
  model.head_dim = d;
  for (int j = 0; j < d / 2; ++j) model.inv_freq.push_back(std::pow(1e4, -2.0 * j / d));
  model.embedding = random->Matrix(kVocab, kHidden, 5);
  model.final_norm = Vector(kHidden, 1.0);
  for (int i = 0; i < layers; ++i) {
    ReferenceLayer layer;
    layer.attention_norm = layer.mlp_norm = Vector(kHidden, 1.0);
    layer.wq = random->Matrix(heads * d, kHidden, 2);  // Logits of standard deviation about 4.
    layer.wk = random->Matrix(kv_heads * d, kHidden, 2);
    layer.wv = random->Matrix(kv_heads * d, kHidden);
    layer.wo = random->Matrix(kHidden, heads * d);
    layer.gate = random->Matrix(kMlp, kHidden);
    layer.up = random->Matrix(kMlp, kHidden);
    layer.down = random->Matrix(kHidden, kMlp);
    model.layers.push_back(std::move(layer));
  }
  return model;
}

ReferenceOptions SketchOptions(Random* random, int block, int planes, int d) {
  ReferenceOptions options;
  options.selector.block_tokens = block;
  options.selector.planes = planes;
  options.signs = random->Signs(d);
  return options;
}

ReferenceOptions MinMaxOptions() {
  ReferenceOptions options;
  options.selector = {kernels::SelectorKind::kMinMax, 16, 0, {1, 1}};
  return options;
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
  double sum = 0;
  for (const Interval& block : ScoreSketch(queries, keys, spec, {8, 1, 1}, signs, {})) {
    sum += block.value;
  }
  EXPECT_NEAR(sum, 3, 1e-12);
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

// ---- the transformer ----------------------------------------------------------------------------

// One layer, one head of size 2, no rotation (frequency 0), no MLP, identity everywhere: then the
// logits are the normalised sum of the token's embedding and an average of normalised embeddings.
TEST(ReferenceDecoderTest, OneLayerByHand) {
  const DenseMatrix identity = {2, 2, {1, 0, 0, 1}};
  ReferenceModel model;
  model.heads = model.kv_heads = 1;
  model.head_dim = 2;
  model.rms_eps = 0;
  model.inv_freq = {0};
  model.embedding = {3, 2, {1, 0, 0, 2, 3, 4}};
  model.final_norm = {1, 1};
  ReferenceLayer layer;
  layer.attention_norm = layer.mlp_norm = {1, 1};
  layer.wq = layer.wk = layer.wv = layer.wo = identity;
  layer.gate = layer.up = layer.down = {2, 2, {0, 0, 0, 0}};
  model.layers = {layer};
  ReferenceDecoder decoder(&model, MinMaxOptions());
  const Vector logits = decoder.Dense(std::vector<int>{0, 1}, 0);
  // Normalised embeddings: token 0: (sqrt 2, 0), token 1: (0, sqrt 2). The query of token 1 has
  // logits 0 and 2 / sqrt 2 with them.
  const double weight = 1 / (1 + std::exp(-std::sqrt(2.0)));
  const double x = (1 - weight) * std::sqrt(2.0), y = 2 + weight * std::sqrt(2.0);
  const double rms = std::sqrt((x * x + y * y) / 2);
  EXPECT_NEAR(logits[0], x / rms, 1e-14);
  EXPECT_NEAR(logits[1], 2 * y / rms, 1e-14);
  EXPECT_NEAR(logits[2], (3 * x + 4 * y) / rms, 1e-14);
}

// Rotation makes attention depend on relative positions only.
TEST(ReferenceDecoderTest, RotaryPairsAreTheHalvesOfAHead) {
  ReferenceModel model;
  model.heads = model.kv_heads = 1;
  model.head_dim = 4;
  model.inv_freq = {1.0, 0.25};
  model.embedding = {1, 4, {1, 2, 3, 4}};
  model.final_norm = Vector(4, 1.0);
  ReferenceLayer layer;
  const DenseMatrix zero = {4, 4, Vector(16, 0.0)};
  layer.attention_norm = layer.mlp_norm = Vector(4, 1.0);
  layer.wq = layer.wv = layer.wo = layer.gate = layer.up = layer.down = zero;
  layer.wk = zero;
  layer.bk = {1, 2, 3, 4};
  model.layers = {layer};
  ReferenceDecoder decoder(&model, MinMaxOptions());
  decoder.Dense(std::vector<int>{0, 0, 0}, 0);
  const Vector& key = decoder.key(0, 0, 2);
  EXPECT_NEAR(key[0], 1 * std::cos(2.0) - 3 * std::sin(2.0), 1e-14);
  EXPECT_NEAR(key[2], 3 * std::cos(2.0) + 1 * std::sin(2.0), 1e-14);
  EXPECT_NEAR(key[1], 2 * std::cos(0.5) - 4 * std::sin(0.5), 1e-14);
  EXPECT_NEAR(key[3], 4 * std::cos(0.5) + 2 * std::sin(0.5), 1e-14);
}

std::vector<int> RandomTokens(Random* random, int n) {
  std::vector<int> tokens(n);
  for (int& token : tokens) token = random->Below(64);
  return tokens;
}

TEST(ReferenceDecoderTest, KeepingEveryBlockIsDense) {
  Random random(10);
  const ReferenceModel model = RandomModel(&random, 2, 6, 2, 16);
  const std::vector<int> prompt = RandomTokens(&random, 50);
  for (const ReferenceOptions& options : {MinMaxOptions(), SketchOptions(&random, 4, 2, 16)}) {
    ReferenceDecoder dense(&model, options), sparse(&model, options);
    int token = ArgMax(dense.Dense(prompt, 0));
    sparse.Dense(prompt, 0);
    for (int i = 0; i < 10; ++i) {
      const int blocks =
          (51 + i + options.selector.block_tokens - 1) / options.selector.block_tokens;
      const Vector a = dense.Dense(std::vector<int>{token}, 50 + i);
      EXPECT_EQ(a, sparse.Sparse(token, {blocks, 1, 0}));
      token = ArgMax(a);
    }
  }
}

// The invariant that everything leans on, and that it is not vacuous: sparse steps do drift.
TEST(ReferenceDecoderTest, RectifiedWindowEqualsDensePrefillExactly) {
  Random random(11);
  const ReferenceModel model = RandomModel(&random, 3, 6, 2, 16);
  std::vector<int> tokens = RandomTokens(&random, 90);
  for (const ReferenceOptions& options : {MinMaxOptions(), SketchOptions(&random, 8, 2, 16)}) {
    ReferenceDecoder decoder(&model, options), prefill(&model, options);
    const std::span<const int> all(tokens);
    decoder.Dense(all.first(64), 0);
    for (int p = 64; p < 80; ++p) decoder.Sparse(tokens[p], {2, 1, 0});
    prefill.Dense(all.first(80), 0);
    EXPECT_EQ(decoder.key(0, 0, 79), prefill.key(0, 0, 79));  // Below the first attention.
    EXPECT_NE(decoder.key(2, 0, 70), prefill.key(2, 0, 70));
    const Vector logits = decoder.Dense(all.subspan(64, 16), 64);
    for (int layer = 0; layer < 3; ++layer) {
      for (int p = 0; p < 80; ++p) {
        ASSERT_EQ(decoder.key(layer, 1, p), prefill.key(layer, 1, p));
        ASSERT_EQ(decoder.value(layer, 1, p), prefill.value(layer, 1, p));
      }
    }
    ReferenceDecoder fresh(&model, options);
    EXPECT_EQ(logits, fresh.Dense(all.first(80), 0));
  }
}

TEST(ReferenceDecoderTest, StoredKeysAreRoundedWhenAskedTo) {
  Random random(12);
  const ReferenceModel model = RandomModel(&random, 2, 2, 1, 16);
  ReferenceOptions options = SketchOptions(&random, 8, 2, 16);
  options.kv_in_bf16 = true;
  ReferenceDecoder decoder(&model, options);
  decoder.Dense(RandomTokens(&random, 5), 0);
  for (double x : decoder.key(1, 0, 3)) EXPECT_EQ(x, RoundToBf16(x));
  for (double x : decoder.value(1, 0, 3)) EXPECT_EQ(x, RoundToBf16(x));
}

// ---- the schedule -------------------------------------------------------------------------------

std::string Describe(const std::vector<ScheduleStep>& steps) {
  std::string out;
  for (const ScheduleStep& step : steps) {
    const char* kind = step.kind == ScheduleStep::Kind::kDense    ? "d"
                       : step.kind == ScheduleStep::Kind::kSparse ? "s"
                                                                  : "w";
    out += kind + std::to_string(step.begin);
    if (step.kind == ScheduleStep::Kind::kWindow) out += "-" + std::to_string(step.end - 1);
    out += " ";
  }
  return out;
}

ScheduleRules SmallRules() {
  ScheduleRules rules;
  rules.keep_ratio = 0.25;
  rules.min_tokens = 8;
  rules.local_tokens = 8;
  rules.sink_tokens = 0;
  rules.interval = 8;
  return rules;
}

TEST(ReferenceScheduleTest, WindowsEndAtMultiplesOfTheInterval) {
  EXPECT_EQ(Describe(MakeSchedule(18, 16, SmallRules())),
            "s18 s19 s20 s21 s22 w18-23 s24 s25 s26 s27 s28 s29 s30 w24-31 s32 ");
}

TEST(ReferenceScheduleTest, DuePositionOnExactHistoryIsADenseRow) {
  EXPECT_EQ(Describe(MakeSchedule(23, 4, SmallRules())), "d23 s24 s25 ");
}

TEST(ReferenceScheduleTest, DenseWhileTheBudgetCoversTheSequenceAndThatKeepsHistoryExact) {
  ScheduleRules rules = SmallRules();
  rules.min_tokens = 24;  // Three blocks of 8.
  const std::vector<ScheduleStep> steps = MakeSchedule(20, 14, rules);
  EXPECT_EQ(Describe(steps), "d20 d21 d22 d23 s24 s25 s26 s27 s28 s29 s30 w24-31 s32 ");
  EXPECT_EQ(steps[3].exact_len, 24);
  EXPECT_EQ(steps[4].exact_len, 24);
  EXPECT_EQ(steps[11].exact_len, 32);
}

TEST(ReferenceScheduleTest, SparseFromAndModes) {
  ScheduleRules rules = SmallRules();
  rules.sparse_from = 21;
  EXPECT_EQ(Describe(MakeSchedule(18, 8, rules)), "d18 d19 s20 s21 s22 w20-23 s24 ");
  rules.mode = ReferenceMode::kSparse;
  EXPECT_EQ(Describe(MakeSchedule(18, 8, rules)), "d18 d19 s20 s21 s22 s23 s24 ");
  rules.mode = ReferenceMode::kDense;
  EXPECT_EQ(Describe(MakeSchedule(18, 8, rules)), "d18 d19 d20 d21 d22 d23 d24 ");
}

TEST(ReferenceScheduleTest, BudgetRoundsUpToBlocks) {
  ScheduleRules rules = SmallRules();
  rules.local_tokens = 9;
  rules.sink_tokens = 1;
  rules.keep_ratio = 0.3;
  const std::vector<ScheduleStep> steps = MakeSchedule(160, 2, rules);
  ASSERT_EQ(steps.size(), 1u);
  EXPECT_EQ(steps[0].budget.local, 2);
  EXPECT_EQ(steps[0].budget.sink, 1);
  EXPECT_EQ(steps[0].budget.keep, 7);  // ceil(0.3 * 21)
}

}  // namespace
}  // namespace resa::testing
