#include "tests/bench/random_model.h"

#include <gmock/gmock.h>

#include <cmath>

#include "kernels/bf16.h"
#include "tests/bench/bench_fixture.h"

namespace resa::bench {
namespace {

using ::testing::HasSubstr;

TEST(ShapeTest, AreThoseOfTheModelsAndCanBeServed) {
  for (const std::string& name : ShapeNames()) {
    const auto config = ConfigOfShape(name);
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_TRUE(engine::ValidateModelConfig(*config, name).ok())
        << engine::ValidateModelConfig(*config, name);
  }
  const auto half = ConfigOfShape("0.5b");
  EXPECT_EQ(half->num_layers, 24);
  EXPECT_EQ(half->hidden_size, 896);
  EXPECT_EQ(half->num_heads, 14);
  EXPECT_EQ(half->num_kv_heads, 2);
  EXPECT_EQ(half->vocab_size, 151936);
  const auto qwen3 = ConfigOfShape("qwen3-8b");
  EXPECT_TRUE(qwen3->qk_norm);
  EXPECT_FALSE(qwen3->tie_embeddings);
}

TEST(ShapeTest, CanBeCutToTheirFirstLayers) {
  const auto cut = ConfigOfShape("qwen2.5-7b-4l");
  ASSERT_TRUE(cut.ok()) << cut.status();
  EXPECT_EQ(cut->num_layers, 4);
  EXPECT_EQ(cut->hidden_size, 3584);
}

TEST(ShapeTest, UnknownOnesAreRefusedWithTheKnown) {
  for (const char* name : {"", "0.6b", "0.5b-l", "4l", "0.5b-4l-4l"}) {
    EXPECT_THAT(ConfigOfShape(name).status().message(), HasSubstr("smollm2-135m")) << name;
  }
  for (const char* name : {"0.5b-0l", "0.5b-25l", "0.5b--1l"}) {
    EXPECT_FALSE(ConfigOfShape(name).ok()) << name;
  }
}

TEST(RandomModelTest, MatricesKeepTheSizeOfActivations) {
  const auto model = MakeRandomModel(SmallConfig(), 7);
  ASSERT_TRUE(model.ok()) << model.status();
  ASSERT_EQ(model->weights.layers.size(), 2u);
  EXPECT_EQ(model->weights.lm_head.data, model->weights.embed.data);
  for (const engine::WeightTensor* matrix :
       {&model->weights.embed, &model->weights.layers[1].q_proj,
        &model->weights.layers[0].down_proj}) {
    ASSERT_TRUE(matrix->present());
    double squares = 0;
    for (int64_t i = 0; i < matrix->elements(); ++i) {
      const double x = kernels::ToFloat(matrix->b16()[i]);
      squares += x * x;
    }
    // Over 9,216 values or more the mean of squares of a normal has a deviation of 1.5 %; stretches
    // of the bank that overlap make it a few times that.
    EXPECT_NEAR(
        squares / static_cast<double>(matrix->elements()) * static_cast<double>(matrix->shape[1]),
        1.0, 0.1);
  }
  EXPECT_EQ(model->weights.layers[0].attn_norm.f32()[5], 1.0f);
  EXPECT_LT(std::abs(model->weights.layers[0].k_bias.f32()[5]), 0.2f);
}

TEST(RandomModelTest, FollowFromTheSeed) {
  const auto a = MakeRandomModel(SmallConfig(), 7);
  const auto same = MakeRandomModel(SmallConfig(), 7);
  const auto other = MakeRandomModel(SmallConfig(), 8);
  const auto bytes = [](const auto& model) {
    const engine::WeightTensor& w = model->weights.layers[1].up_proj;
    return std::vector<std::byte>(w.data, w.data + w.bytes());
  };
  EXPECT_EQ(bytes(a), bytes(same));
  EXPECT_NE(bytes(a), bytes(other));
}

}  // namespace
}  // namespace resa::bench
