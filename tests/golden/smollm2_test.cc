// A real pretrained model, SmolLM2-135M-Instruct out of its GGUF file, against what transformers
// and tokenizers computed for it (smollm2.json, made by make_smollm2.py).
//
// deploy/models/fetch_smollm2.sh fetches the model. Without it the tests are skipped; with
// RESA_REQUIRE_SMOLLM2=1 in the environment, as tests/run.sh sets it, they fail.

#include <stdlib.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "engine/model_files.h"
#include "engine/tokenizer.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_ops.h"
#include "nlohmann/json.hpp"
#include "tests/support/file_builders.h"
#include "tests/support/model_runner.h"

namespace resa {
namespace {

using nlohmann::json;
using testing::ModelRunner;

class SmolLm2Test : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    const std::string path =
        testing::SourcePath("deploy/models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    if (!std::filesystem::exists(path)) return;
    const absl::Time start = absl::Now();
    auto loaded = engine::LoadModel(path);
    std::printf("loaded in %.2f s\n", absl::ToDoubleSeconds(absl::Now() - start));
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    model_ = new engine::LoadedModel(*std::move(loaded));
    golden_ =
        new json(json::parse(testing::ReadFile(testing::SourcePath("tests/golden/smollm2.json"))));
  }
  static void TearDownTestSuite() {
    delete model_;
    delete golden_;
  }

  void SetUp() override {
    if (model_ == nullptr) {
      const char* required = getenv("RESA_REQUIRE_SMOLLM2");
      ASSERT_TRUE(required == nullptr || std::string(required) != "1")
          << "SmolLM2 is not there: run deploy/models/fetch_smollm2.sh";
      GTEST_SKIP() << "SmolLM2 is not there: run deploy/models/fetch_smollm2.sh";
    }
    ASSERT_FALSE(golden_->at("prompts").empty());
  }

  static ModelRunner MakeRunner(kernels::Ops* ops, kernels::DType kv_dtype) {
    testing::RunnerOptions options;
    options.kv_dtype = kv_dtype;
    options.max_tokens = 256;
    return ModelRunner(*model_, ops, options);
  }

  static std::vector<int32_t> Greedy(ModelRunner& runner, const std::vector<int32_t>& prompt,
                                     size_t count) {
    const int64_t vocab = model_->config.vocab_size;
    std::vector<float> logits = runner.Prefill(prompt, 128);
    std::vector<int32_t> tokens;
    while (tokens.size() < count) {
      const auto last = logits.end() - vocab;
      tokens.push_back(static_cast<int32_t>(std::max_element(last, logits.end()) - last));
      logits = runner.Feed({&tokens.back(), 1});
    }
    return tokens;
  }

  static engine::LoadedModel* model_;
  static json* golden_;
};

engine::LoadedModel* SmolLm2Test::model_ = nullptr;
json* SmolLm2Test::golden_ = nullptr;

// Natural log of the softmax of one row.
std::vector<double> LogProbs(const float* logits, size_t count) {
  const double top = *std::max_element(logits, logits + count);
  double sum = 0;
  for (size_t i = 0; i < count; ++i) sum += std::exp(logits[i] - top);
  std::vector<double> logprobs(count);
  for (size_t i = 0; i < count; ++i) logprobs[i] = logits[i] - top - std::log(sum);
  return logprobs;
}

TEST_F(SmolLm2Test, ConfigurationIsTheFiles) {
  const engine::ModelConfig& config = model_->config;
  EXPECT_EQ(config.architecture, "LlamaForCausalLM");
  EXPECT_EQ(config.num_layers, 30);
  EXPECT_EQ(config.num_heads, 9);
  EXPECT_EQ(config.num_kv_heads, 3);
  EXPECT_EQ(config.head_dim, 64);
  EXPECT_EQ(config.vocab_size, 49152);
  EXPECT_EQ(config.max_position, 8192);
  EXPECT_TRUE(config.tie_embeddings);
  EXPECT_EQ(config.eos_ids, std::vector<int32_t>{golden_->at("eos").get<int32_t>()});
}

TEST_F(SmolLm2Test, TokenizerAgrees) {
  const auto tokenizer = engine::Tokenizer::FromGguf(*model_->gguf_vocab);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  for (const json& prompt : golden_->at("prompts")) {
    const std::string text = prompt.at("text").get<std::string>();
    SCOPED_TRACE(text);
    const auto ids = (*tokenizer)->Encode(text, {.add_special_tokens = false});
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(*ids, prompt.at("ids").get<std::vector<int32_t>>());
    EXPECT_EQ((*tokenizer)->Decode(*ids, /*skip_special_tokens=*/false), text);
    EXPECT_EQ((*tokenizer)
                  ->Decode(prompt.at("greedy").get<std::vector<int32_t>>(),
                           /*skip_special_tokens=*/true),
              prompt.at("greedy_text").get<std::string>());
  }
}

TEST_F(SmolLm2Test, LogprobsOfPromptsAgree) {
  if (!kernels::CpuSupported()) GTEST_SKIP() << "this CPU lacks AVX2 or FMA";
  const auto ops = kernels::CreateCpuOps({});
  const size_t vocab = model_->config.vocab_size;
  double worst = 0;
  for (const json& prompt : golden_->at("prompts")) {
    ModelRunner runner = MakeRunner(ops.get(), kernels::DType::kF32);
    const std::vector<float> logits =
        runner.Prefill(prompt.at("ids").get<std::vector<int32_t>>(), 128);
    for (const auto& [position, top] : prompt.at("top").items()) {
      const std::vector<double> logprobs = LogProbs(&logits[std::stoul(position) * vocab], vocab);
      for (const json& entry : top) {
        const double delta = std::abs(logprobs[entry[0].get<int32_t>()] - entry[1].get<double>());
        worst = delta <= worst ? worst : delta;
      }
      const auto best = std::max_element(logprobs.begin(), logprobs.end()) - logprobs.begin();
      EXPECT_EQ(best, top[0][0].get<int32_t>()) << "position " << position;
    }
  }
  std::printf("max |delta logprob| %.2e\n", worst);
  // Float32 on both sides, 30 layers; the promise for logits is 2e-3, a logprob is a difference of
  // a logit and a mean of logits.
  EXPECT_LE(worst, 2e-3);
}

TEST_F(SmolLm2Test, GreedyTokensAgree) {
  if (!kernels::CpuSupported()) GTEST_SKIP() << "this CPU lacks AVX2 or FMA";
  const auto ops = kernels::CreateCpuOps({});
  for (const json& prompt : golden_->at("prompts")) {
    SCOPED_TRACE(prompt.at("text").get<std::string>());
    const auto margins = prompt.at("margins").get<std::vector<double>>();
    // Wide enough that float32 against float32 cannot turn a token over.
    ASSERT_GT(*std::min_element(margins.begin(), margins.end()), 4e-3);
    ModelRunner runner = MakeRunner(ops.get(), kernels::DType::kF32);
    const auto expected = prompt.at("greedy").get<std::vector<int32_t>>();
    EXPECT_EQ(Greedy(runner, prompt.at("ids").get<std::vector<int32_t>>(), expected.size()),
              expected);
  }
}

}  // namespace
}  // namespace resa
