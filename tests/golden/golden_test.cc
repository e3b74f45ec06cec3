// Dense inference against Hugging Face transformers in float32, on every golden model.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "engine/gguf.h"
#include "engine/gguf_dequant.h"
#include "engine/mapped_file.h"
#include "engine/model_files.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_ops.h"
#include "tests/golden/golden_files.h"
#include "tests/support/model_runner.h"

namespace resa {
namespace {

using testing::Golden;
using testing::ModelRunner;

class GoldenTest : public ::testing::TestWithParam<std::string> {
 protected:
  GoldenTest() : golden_(testing::ReadGolden(GetParam())) {}

  void SetUp() override {
    if (!kernels::CpuSupported()) GTEST_SKIP() << "this CPU lacks AVX2 or FMA";
    auto model = engine::LoadModel(golden_.model_path);
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
    ops_ = kernels::CreateCpuOps({.threads = 2});
  }

  ModelRunner MakeRunner(kernels::DType kv_dtype) {
    testing::RunnerOptions options;
    options.kv_dtype = kv_dtype;
    return ModelRunner(model_, ops_.get(), options);
  }

  // Differences from the golden logits over all golden rows.
  struct Difference {
    double max = 0;
    double rms = 0;
    double golden_rms = 0;
  };
  Difference Compare(const std::vector<float>& logits) const {
    const size_t vocab = model_.config.vocab_size;
    Difference difference;
    for (size_t r = 0; r < golden_.logit_rows.size(); ++r) {
      for (size_t v = 0; v < vocab; ++v) {
        const double expected = golden_.logits[r * vocab + v];
        const double got = logits[golden_.logit_rows[r] * vocab + v];
        const double delta = std::abs(got - expected);
        // NaN compares as the largest difference, never as none.
        difference.max = delta <= difference.max ? difference.max : delta;
        difference.rms += delta * delta;
        difference.golden_rms += expected * expected;
      }
    }
    const double count = static_cast<double>(golden_.logits.size());
    difference.rms = std::sqrt(difference.rms / count);
    difference.golden_rms = std::sqrt(difference.golden_rms / count);
    return difference;
  }

  const Golden golden_;
  engine::LoadedModel model_;
  std::unique_ptr<kernels::Ops> ops_;
};

TEST_P(GoldenTest, LogitsWithF32Kv) {
  ASSERT_EQ(golden_.logits.size(), golden_.logit_rows.size() * model_.config.vocab_size);
  for (int chunk : {128, 48}) {
    ModelRunner runner = MakeRunner(kernels::DType::kF32);
    const Difference difference = Compare(runner.Prefill(golden_.prompt, chunk));
    std::printf("%s, chunks of %d: max |delta| %.2e, rms %.2e of %.2f\n", GetParam().c_str(), chunk,
                difference.max, difference.rms, difference.golden_rms);
    // resad promises 2e-3. float32 on both sides leaves a few 1e-5, so the test can ask for more.
    EXPECT_LE(difference.max, 5e-4);
  }
}

// The bounds above mean something: a rotary embedding or a norm a little off misses them by far.
TEST_P(GoldenTest, SmallMistakesWouldBeSeen) {
  const auto max_difference = [this] {
    ModelRunner runner = MakeRunner(kernels::DType::kF32);
    return Compare(runner.Prefill(golden_.prompt, 128)).max;
  };
  const engine::ModelConfig right = model_.config;
  model_.config.rope_theta *= 1.01;
  EXPECT_GT(max_difference(), 2e-3) << "rope_theta off by 1 %";
  model_.config = right;
  model_.config.rms_norm_eps = 1e-3f;
  EXPECT_GT(max_difference(), 2e-3) << "rms_norm_eps 1e-3 in place of 1e-5";
  model_.config = right;
  if (right.rope_scaling.kind == engine::RopeScaling::Kind::kNone) return;
  model_.config.rope_scaling.factor *= 1.05;
  model_.config.rope_scaling.attention_factor *= 1.01;
  for (float& divisor : model_.config.rope_scaling.divisors) divisor = 1.0f + divisor * 0.05f;
  EXPECT_GT(max_difference(), 2e-3) << "scaling off by a few percent";
}

// bf16 has 8 significant bits: rounding a K or V component is off by at most 2^-8 of it, and by
// 2^-8 / sqrt(12) * 1.4 = 1.6e-3 in root mean square over mantissas. In the golden models, whose
// q and k projections have a gain of 2 after a norm of about 1, q and k components have a root mean
// square of about s = 2.2 (1.1 with q/k norms), so a score q.k / sqrt(d) is off by
// 1.6e-3 s^2 = 8e-3, and a softmax average by that share of a value's size, plus V's own 1.6e-3:
// about 1e-2. The attention output is at most about as large as the rest of the residual stream,
// and L layers add up as sqrt(L) at least and L at most: relative to the logits' root mean square
// the difference stays below 1e-2 L, and the largest of N ~ 3000 roughly normal differences below
// 5 times the bound on their root mean square.
TEST_P(GoldenTest, LogitsWithBf16Kv) {
  ModelRunner runner = MakeRunner(kernels::DType::kBF16);
  const Difference difference = Compare(runner.Prefill(golden_.prompt, 128));
  const double bound = 1e-2 * model_.config.num_layers * difference.golden_rms;
  std::printf("%s, bf16 KV: max |delta| %.2e (bound %.2e), rms %.2e (bound %.2e)\n",
              GetParam().c_str(), difference.max, 5 * bound, difference.rms, bound);
  EXPECT_LE(difference.rms, bound);
  EXPECT_LE(difference.max, 5 * bound);
  // The path under test really rounds: exact K and V would differ by a few 1e-5.
  EXPECT_GE(difference.rms, 1e-4 * difference.golden_rms);
}

// Rounding the rows of every Linear errs like rounding K and V: 1.6e-3 of each component in root
// mean square, of which a sum of many keeps that share. Per layer q and k (8e-3 of a softmax
// average by the reckoning above), v, the attention output, gate, up and down see it, 1e-2 together
// once more, and the last one adds 1.6e-3.
TEST_P(GoldenTest, LogitsWithBf16Rows) {
  ops_ = kernels::CreateCpuOps({.threads = 2, .bf16_linear = kernels::Bf16Linear::kForce});
  if (ops_->Description().find("oneDNN bf16") == std::string::npos) {
    GTEST_SKIP() << ops_->Description();
  }
  const std::vector<float> logits = MakeRunner(kernels::DType::kF32).Prefill(golden_.prompt, 128);
  const Difference difference = Compare(logits);
  const double bound = (2e-2 * model_.config.num_layers + 2e-3) * difference.golden_rms;
  std::printf("%s, bf16 rows: max |delta| %.2e (bound %.2e), rms %.2e (bound %.2e)\n",
              GetParam().c_str(), difference.max, 5 * bound, difference.rms, bound);
  EXPECT_LE(difference.rms, bound);
  EXPECT_LE(difference.max, 5 * bound);
  EXPECT_GE(difference.rms, 1e-4 * difference.golden_rms);  // It really rounds.
  for (int chunk : {1, 7, 48}) {
    EXPECT_EQ(MakeRunner(kernels::DType::kF32).Prefill(golden_.prompt, chunk), logits)
        << "chunks of " << chunk;
  }
  EXPECT_EQ(ops_->Description().find("but for"), std::string::npos) << ops_->Description();
}

TEST_P(GoldenTest, GreedyTokensWithF32Kv) {
  // Logits are right within 2e-3, so a margin above twice that decides each token.
  ASSERT_GT(golden_.min_margin, 4e-3);
  ModelRunner runner = MakeRunner(kernels::DType::kF32);
  const size_t vocab = model_.config.vocab_size;
  std::vector<float> logits = runner.Prefill(golden_.prompt, 128);
  std::vector<int32_t> tokens;
  while (tokens.size() < golden_.greedy.size()) {
    const auto last = logits.end() - static_cast<int64_t>(vocab);
    tokens.push_back(static_cast<int32_t>(std::max_element(last, logits.end()) - last));
    logits = runner.Feed({&tokens.back(), 1});
  }
  EXPECT_EQ(tokens, golden_.greedy);
}

class GgufGoldenTest : public GoldenTest {};

TEST_P(GgufGoldenTest, TensorsDecodeAsTheGgufPackageDecodesThem) {
  const auto map = engine::MappedFile::Open(golden_.model_path);
  ASSERT_TRUE(map.ok()) << map.status();
  const auto file = engine::GgufFile::Parse((*map)->bytes(), golden_.model_path);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(golden_.dequantised.size(), file->tensors().size());
  for (const auto& [name, expected] : golden_.dequantised) {
    const engine::StoredTensor* tensor = file->FindTensor(name);
    ASSERT_NE(tensor, nullptr) << name;
    const int64_t blocks =
        static_cast<int64_t>(expected.size()) / engine::BlockElements(tensor->type);
    std::vector<float> decoded(expected.size());
    engine::DecodeToFloat(tensor->type,
                          tensor->data.first(blocks * engine::BlockBytes(tensor->type)), decoded);
    EXPECT_EQ(decoded, expected) << name;  // Exactly: see gguf_dequant.h.
  }
}

std::vector<std::string> GgufNames() {
  std::vector<std::string> names;
  for (const std::string& name : testing::GoldenNames()) {
    if (testing::ReadGolden(name).is_gguf()) names.push_back(name);
  }
  return names;
}

INSTANTIATE_TEST_SUITE_P(Models, GoldenTest, ::testing::ValuesIn(testing::GoldenNames()),
                         [](const auto& info) { return info.param; });

INSTANTIATE_TEST_SUITE_P(Models, GgufGoldenTest, ::testing::ValuesIn(GgufNames()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace resa
