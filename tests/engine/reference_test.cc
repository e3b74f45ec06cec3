// The engine's ReSA against an independent implementation of the paper's algorithm: the real
// executor and CPU kernels with f32 K/V on random models, and the float64 reference beside them,
// in lockstep over generations of hundreds of tokens. The same blocks, the same tokens.

#include <cstdlib>
#include <functional>
#include <iomanip>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_ops.h"
#include "tests/support/lockstep.h"
#include "tests/support/reference_schedule.h"
#include "tests/support/tiny_model.h"

namespace resa::testing {
namespace {

using kernels::SelectorKind;
using kernels::SelectorSpec;

// Where the tolerances come from. The engine computes in f32, unit roundoff u = 2^-24 = 6e-8. A
// layer is a chain of about ten roundings of relative size u sqrt(n) / 2 = 3e-7 (norm, projections,
// rotary embedding, softmax, output, MLP; n about 100 terms, errors adding like a random walk), so
// 1e-6 in all, adding likewise. Attention carries the absolute error of a logit, 1e-6 of up to 10,
// into its weights, where most of it averages out. Over three layers that makes 3 * 1e-6 and a
// share of the logits' error: 6e-6 of a vector's norm.
//
// The bound decides how wide the intervals of the scores are, so it must be tight to mean anything.
LockstepTolerance Tolerance() {
  LockstepTolerance tolerance;
  tolerance.selection.vector = 6e-6;
  // Beyond its inputs' errors: exp and sums of f32 (u |logit| for logits up to 30).
  tolerance.selection.score = 4e-6;
  // Logits have unit variance, so the largest of 131 is about 3: the relative error, times that.
  tolerance.logit = 2e-5;
  return tolerance;
}

// With K and V in bf16 a component whose f32 value lies next to a rounding boundary is stored one
// step, up to 2^-7 of itself, apart; were it all of them, 2^-7 of the norm. Attention over hundreds
// of keys averages most of it out again: the logits move by 2^-8 times 3 at the worst.
LockstepTolerance Bf16Tolerance() {
  LockstepTolerance tolerance = Tolerance();
  tolerance.selection.vector = 1.0 / 128;
  tolerance.logit = 3.0 / 256;
  return tolerance;
}

struct Case {
  std::string name;
  SelectorSpec selector;
  TinyModelOptions model;
  ScheduleRules rules;
  int prompt = 400;
  int new_tokens = 220;
  uint64_t seed = 1;
  kernels::DType kv_dtype = kernels::DType::kF32;
};

SelectorSpec MinMax() { return {SelectorKind::kMinMax, 16, 0, {1.0f, 1.0f}}; }

SelectorSpec Sketch(int block, int planes, float second = 1.0f, float third = 0.0f) {
  return {SelectorKind::kSketch, block, planes, {second, third > 0 ? third : second}};
}

// kv_heads x group heads; attention sharp enough that what is selected decides what comes out.
TinyModelOptions Model(int kv_heads, int group) {
  TinyModelOptions model;
  model.num_layers = 3;
  model.num_kv_heads = kv_heads;
  model.group = group;
  model.attention_sharpness = 3.0;
  return model;
}

ScheduleRules Rules(double keep, int interval) {
  ScheduleRules rules;
  rules.keep_ratio = keep;
  rules.min_tokens = 48;
  rules.local_tokens = 16;
  rules.sink_tokens = 8;
  rules.interval = interval;
  return rules;
}

std::vector<Case> Cases() {
  std::vector<Case> cases;
  // The paper's own budgets need a longer context to be sparse at all: 256 tokens at least.
  Case paper{"PaperMinMax", MinMax(), Model(2, 3), {}, 1300, 230, 11};
  paper.rules = {ReferenceMode::kRectified, 0.1, 256, 16, 0, 32, 16, 0};
  cases.push_back(paper);
  cases.push_back({"MinMaxSinkGroup7", MinMax(), Model(1, 7), Rules(0.15, 16), 333, 220, 12});
  cases.push_back({"SketchDefault", Sketch(8, 2), Model(2, 3), Rules(0.1, 32), 700, 220, 13});
  cases.push_back({"SketchBlock4OnePlane", Sketch(4, 1), Model(2, 1), Rules(0.2, 8), 401, 220, 14});
  cases.push_back(
      {"SketchBlock16ThreePlanes", Sketch(16, 3), Model(1, 7), Rules(0.2, 64), 450, 220, 15});
  cases.push_back({"SketchProgressiveTwoPlanes", Sketch(8, 2, 0.25f), Model(2, 3), Rules(0.1, 32),
                   640, 220, 16});
  cases.push_back({"SketchProgressiveThreePlanes", Sketch(8, 3, 0.4f, 0.2f), Model(1, 3),
                   Rules(0.1, 24), 511, 220, 17});
  Case qwen3{"SketchQkNorm", Sketch(8, 2), Model(2, 2), Rules(0.1, 32), 512, 220, 18};
  qwen3.model.qk_norm = true;
  cases.push_back(qwen3);
  Case qwen2{"MinMaxBias", MinMax(), Model(2, 2), Rules(0.2, 40), 512, 220, 19};
  qwen2.model.qkv_bias = true;
  cases.push_back(qwen2);
  Case wide{"SketchHeadDim128", Sketch(8, 2, 0.4f), Model(1, 2), Rules(0.1, 32), 300, 210, 20};
  wide.model.head_dim = 128;
  cases.push_back(wide);
  Case sparse{"SketchNeverRectified", Sketch(8, 2), Model(2, 3), Rules(0.1, 32), 400, 220, 21};
  sparse.rules.mode = ReferenceMode::kSparse;
  cases.push_back(sparse);
  Case late{"SketchSparseFromLater", Sketch(8, 2), Model(2, 3), Rules(0.1, 32), 200, 220, 22};
  late.rules.sparse_from = 300;
  cases.push_back(late);
  cases.push_back({"SketchBf16", Sketch(8, 2), Model(2, 3), Rules(0.1, 32), 400, 220, 23,
                   kernels::DType::kBF16});
  cases.push_back(
      {"MinMaxBf16", MinMax(), Model(2, 3), Rules(0.15, 32), 400, 220, 24, kernels::DType::kBF16});
  for (Case& each : cases) each.rules.block_tokens = each.selector.block_tokens;
  return cases;
}

// Other models and prompts for RESA_TEST_SEED=n; the expectations hold for any.
uint64_t SeedOffset() {
  const char* given = std::getenv("RESA_TEST_SEED");
  return given == nullptr ? 0 : std::strtoull(given, nullptr, 10);
}

class ReferenceTest : public ::testing::TestWithParam<Case> {
 protected:
  static void SetUpTestSuite() { ops_ = kernels::CreateCpuOps({.threads = 2}).release(); }
  static void TearDownTestSuite() {
    delete ops_;
    ops_ = nullptr;
  }
  static kernels::Ops* ops_;
};
kernels::Ops* ReferenceTest::ops_ = nullptr;

TEST_P(ReferenceTest, SameBlocksSameTokens) {
  const Case& test = GetParam();
  const bool bf16 = test.kv_dtype == kernels::DType::kBF16;
  const LockstepTolerance tolerance = bf16 ? Bf16Tolerance() : Tolerance();
  const uint64_t seed = test.seed + SeedOffset();
  const engine::LoadedModel model = MakeTinyModel(test.model, seed);
  const std::vector<int32_t> prompt = RandomTokens(test.prompt, test.model.vocab_size, seed + 1000);
  const std::vector<ScheduleStep> schedule = MakeSchedule(test.prompt, test.new_tokens, test.rules);
  Lockstep lockstep(model,
                    {.selector = test.selector,
                     .kv_dtype = test.kv_dtype,
                     .tolerance = tolerance,
                     .max_context = test.prompt + test.new_tokens,
                     .plant = nullptr},
                    ops_);
  const LockstepReport report = lockstep.Run(prompt, schedule, /*chunk=*/96);

  std::cout << std::setprecision(2) << "seed " << seed << ": " << report.sparse_rows
            << " sparse rows, " << report.windows << " windows, " << report.differing_ids << " of "
            << report.kept_ids << " ids differ, " << report.near_tie_tokens << " of "
            << test.new_tokens << " tokens are near ties; errors: q " << report.query_error
            << ", K/V " << report.kv_error << ", logits " << report.logit_error
            << "; a window repaired up to " << report.repaired << "; " << report.distinct_tokens
            << " distinct tokens\n";
  for (const std::string& failure : report.failures) ADD_FAILURE() << failure;
  if (HasFailure()) return;  // The generation ended there.

  // Choices that rounding decided must be rare, or the intervals hide something.
  EXPECT_LE(report.differing_ids, report.kept_ids / (bf16 ? 100 : 1000));
  EXPECT_LE(report.near_tie_tokens, 2);
  // And the test must have had something to find.
  EXPECT_GT(report.sparse_rows, test.new_tokens / 3);
  EXPECT_GE(report.distinct_tokens, 20);
  if (test.rules.mode == ReferenceMode::kRectified) {
    EXPECT_GE(report.windows, 2);
    EXPECT_GT(report.repaired, 0.1);
    EXPECT_EQ(lockstep.DifferenceFromPrefill(schedule.back().exact_len, /*chunk=*/130), "");
  }
}

INSTANTIATE_TEST_SUITE_P(Selectors, ReferenceTest, ::testing::ValuesIn(Cases()),
                         [](const auto& info) { return info.param.name; });

// ---- the comparison itself ----------------------------------------------------------------------

struct Plant {
  std::string name;
  SelectorSpec selector;
  std::function<void(ReferenceOptions*)> plant;
};

class PlantedErrorTest : public ::testing::TestWithParam<Plant> {};

// A reference that believes something slightly different must not go unnoticed.
TEST_P(PlantedErrorTest, IsNoticed) {
  const std::unique_ptr<kernels::Ops> ops = kernels::CreateCpuOps({.threads = 2});
  constexpr int kPrompt = 600, kNewTokens = 12;
  const engine::LoadedModel model = MakeTinyModel(Model(2, 3), 31);
  ScheduleRules rules = Rules(0.1, 32);
  rules.block_tokens = GetParam().selector.block_tokens;
  Lockstep lockstep(model,
                    {.selector = GetParam().selector,
                     .kv_dtype = kernels::DType::kF32,
                     .tolerance = Tolerance(),
                     .max_context = kPrompt + kNewTokens,
                     .plant = GetParam().plant},
                    ops.get());
  const LockstepReport report =
      lockstep.Run(RandomTokens(kPrompt, Model(2, 3).vocab_size, 32),
                   MakeSchedule(kPrompt, kNewTokens, rules), /*chunk=*/96);
  EXPECT_FALSE(report.failures.empty());
  if (!report.failures.empty()) std::cout << "noticed: " << report.failures.front() << "\n";
}

INSTANTIATE_TEST_SUITE_P(
    Reference, PlantedErrorTest,
    ::testing::Values(Plant{"OneSignOfTheRotation", Sketch(8, 2),
                            [](auto* o) { o->signs[5] *= -1; }},
                      Plant{"OnePlaneFewer", Sketch(8, 2), [](auto* o) { o->selector.planes = 1; }},
                      Plant{"ReadWholeNotProgressively", Sketch(8, 2, 0.25f),
                            [](auto* o) {
                              o->selector.refine_share = {1.0f, 1.0f};
                            }},
                      Plant{"KeysRoundedToBf16", MinMax(), [](auto* o) { o->kv_in_bf16 = true; }},
                      Plant{"AnglesInF64", MinMax(), [](auto* o) { o->angles_in_f32 = false; }}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace resa::testing
