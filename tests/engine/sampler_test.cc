#include "engine/sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <map>

namespace resa::engine {
namespace {

constexpr float kBan = -std::numeric_limits<float>::infinity();
constexpr int32_t kEos[] = {7, 8};

Request BasicRequest() {
  Request request;
  request.prompt = {5, 6, 5};
  return request;
}

std::map<int32_t, float> BiasOf(const kernels::SampleRow& row) {
  std::map<int32_t, float> bias;
  for (int64_t i = 0; i < row.num_bias; ++i) {
    EXPECT_TRUE(bias.emplace(row.bias[i].id, row.bias[i].bias).second) << "twice";
  }
  return bias;
}

// id -> (output count, in prompt)
std::map<int32_t, std::pair<int32_t, bool>> CountsOf(const kernels::SampleRow& row) {
  std::map<int32_t, std::pair<int32_t, bool>> counts;
  for (int64_t i = 0; i < row.num_counts; ++i) {
    const kernels::TokenCount& count = row.counts[i];
    EXPECT_TRUE(counts.emplace(count.id, std::pair(count.output_count, count.in_prompt)).second);
  }
  return counts;
}

TEST(SamplerTest, PassesTheRequestsParametersOn) {
  Request request = BasicRequest();
  request.sampling = {.temperature = 0.5f,
                      .top_k = 3,
                      .top_p = 0.9f,
                      .min_p = 0.1f,
                      .repetition_penalty = 1.5f,
                      .presence_penalty = 0.25f,
                      .frequency_penalty = -0.25f,
                      .seed = 42};
  request.output.top_logprobs = 4;
  const SamplerState state(request, 0, kEos);
  const kernels::SampleRow row = state.Next();
  EXPECT_EQ(row.temperature, 0.5f);
  EXPECT_EQ(row.top_k, 3);
  EXPECT_EQ(row.top_p, 0.9f);
  EXPECT_EQ(row.min_p, 0.1f);
  EXPECT_EQ(row.repetition_penalty, 1.5f);
  EXPECT_EQ(row.presence_penalty, 0.25f);
  EXPECT_EQ(row.frequency_penalty, -0.25f);
  EXPECT_EQ(row.seed, 42u);
  EXPECT_EQ(row.top_logprobs, 4);
}

TEST(SamplerTest, EachOutputHasItsSeedAndEachTokenItsDraw) {
  Request request = BasicRequest();
  request.sampling.seed = ~uint64_t{0};
  request.n = 3;
  SamplerState first(request, 0, kEos);
  SamplerState last(request, 2, kEos);
  EXPECT_EQ(first.Next().seed, ~uint64_t{0});
  EXPECT_EQ(last.Next().seed, 1u);  // Wraps.
  EXPECT_EQ(last.Next().draw_index, 0u);
  EXPECT_EQ(last.Next().draw_index, 0u) << "Next alone must not draw";
  last.Accept(3);
  EXPECT_EQ(last.Next().draw_index, 1u);
  EXPECT_EQ(first.Next().draw_index, 0u);
}

TEST(SamplerTest, CountsNothingWithoutPenalties) {
  const Request request = BasicRequest();
  SamplerState state(request, 0, kEos);
  state.Accept(5);
  EXPECT_EQ(state.Next().num_counts, 0);
}

TEST(SamplerTest, RepetitionCountsPromptAndOutput) {
  Request request = BasicRequest();
  request.sampling.repetition_penalty = 1.2f;
  SamplerState state(request, 0, kEos);
  state.Accept(6);
  state.Accept(9);
  state.Accept(9);
  const std::map<int32_t, std::pair<int32_t, bool>> expected = {
      {5, {0, true}}, {6, {1, true}}, {9, {2, false}}};
  EXPECT_EQ(CountsOf(state.Next()), expected);
}

TEST(SamplerTest, PresenceAndFrequencyCountOutputAlone) {
  for (const bool presence : {true, false}) {
    Request request = BasicRequest();
    (presence ? request.sampling.presence_penalty : request.sampling.frequency_penalty) = 0.5f;
    SamplerState state(request, 0, kEos);
    EXPECT_EQ(state.Next().num_counts, 0);
    state.Accept(5);
    const std::map<int32_t, std::pair<int32_t, bool>> expected = {{5, {1, false}}};
    EXPECT_EQ(CountsOf(state.Next()), expected);
  }
}

TEST(SamplerTest, BansEveryEndUntilMinTokens) {
  Request request = BasicRequest();
  request.stop.min_tokens = 2;
  request.stop.token_ids = {3, 8};
  request.sampling.logit_bias = {{3, 5.0f}, {4, 1.0f}};
  SamplerState state(request, 0, kEos);
  const std::map<int32_t, float> banned = {{3, kBan}, {4, 1.0f}, {7, kBan}, {8, kBan}};
  const std::map<int32_t, float> free = {{3, 5.0f}, {4, 1.0f}};
  EXPECT_EQ(BiasOf(state.Next()), banned);
  state.Accept(1);
  EXPECT_EQ(BiasOf(state.Next()), banned);
  state.Accept(1);
  EXPECT_EQ(BiasOf(state.Next()), free);
}

TEST(SamplerTest, IgnoredEosIsAnOrdinaryToken) {
  Request request = BasicRequest();
  request.stop.min_tokens = 1;
  request.stop.ignore_eos = true;
  request.stop.token_ids = {3};
  const SamplerState state(request, 0, kEos);
  const std::map<int32_t, float> expected = {{3, kBan}};
  EXPECT_EQ(BiasOf(state.Next()), expected);
}

TEST(SamplerTest, ForcesTokensWhileTheyLast) {
  Request request = BasicRequest();
  request.forced_tokens = {11, 12};
  SamplerState state(request, 0, kEos);
  EXPECT_EQ(state.Next().forced_token, 11);
  state.Accept(11);
  EXPECT_EQ(state.Next().forced_token, 12);
  state.Accept(12);
  EXPECT_EQ(state.Next().forced_token, -1);
  EXPECT_EQ(state.Next().draw_index, 2u);
}

TEST(SamplerTest, CopyAndMoveGoOnIndependently) {
  Request request = BasicRequest();
  request.sampling.frequency_penalty = 1.0f;
  SamplerState original(request, 0, kEos);
  original.Accept(1);
  SamplerState copy = original;
  SamplerState moved = std::move(original);
  moved.Accept(2);
  EXPECT_EQ(CountsOf(copy.Next()).size(), 1u);
  EXPECT_EQ(CountsOf(moved.Next()).size(), 2u);
}

}  // namespace
}  // namespace resa::engine
