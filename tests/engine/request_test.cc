#include "engine/request.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

namespace resa::engine {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

ModelLimits Limits() { return {.vocab_size = 100, .max_context = 50, .pool_tokens = 400}; }

Request ValidRequest() {
  Request request;
  request.prompt = {1, 2, 3, 99, 0};
  return request;
}

absl::Status Validate(const Request& request, const ModelLimits& limits = Limits()) {
  return ValidateRequest(request, limits, /*eos_ids=*/{});
}

TEST(RequestTest, AcceptsDefaultsAndTheEndsOfEveryRange) {
  EXPECT_TRUE(Validate(ValidRequest()).ok());
  Request request = ValidRequest();
  request.sampling = {.temperature = 100,
                      .top_k = 1 << 30,
                      .top_p = 1e-9f,
                      .min_p = 1,
                      .repetition_penalty = 100,
                      .presence_penalty = -2,
                      .frequency_penalty = 2,
                      .seed = ~uint64_t{0},
                      .logit_bias = {{0, -kInfinity}, {99, 3e38f}}};
  request.stop.max_tokens = 45;
  request.stop.min_tokens = 45;
  request.stop.strings = std::vector<std::string>(kMaxStopStrings, std::string(1024, 'x'));
  request.stop.token_ids = std::vector<int32_t>(kMaxStopTokens, 99);
  request.output.logprobs = true;
  request.output.top_logprobs = kernels::kMaxTopLogprobs;
  request.forced_tokens = std::vector<int32_t>(45, 99);
  request.n = kMaxOutputs;
  request.priority = kMinPriority;
  EXPECT_EQ(Validate(request), absl::OkStatus());
}

struct BadCase {
  const char* field;
  std::function<void(Request*)> change;
};

// Every field with a range, just outside of it; NaN wherever a number can be one.
std::vector<BadCase> BadCases() {
  return {
      {"prompt: ", [](Request* r) { r->prompt.clear(); }},
      {"prompt: ", [](Request* r) { r->prompt.assign(50, 1); }},
      {"prompt[3]: ", [](Request* r) { r->prompt[3] = 100; }},
      {"prompt[0]: ", [](Request* r) { r->prompt[0] = -1; }},
      {"sampling.temperature: ", [](Request* r) { r->sampling.temperature = -0.1f; }},
      {"sampling.temperature: ", [](Request* r) { r->sampling.temperature = 100.1f; }},
      {"sampling.temperature: ", [](Request* r) { r->sampling.temperature = kNan; }},
      {"sampling.top_k: ", [](Request* r) { r->sampling.top_k = -1; }},
      {"sampling.top_p: ", [](Request* r) { r->sampling.top_p = 0; }},
      {"sampling.top_p: ", [](Request* r) { r->sampling.top_p = 1.01f; }},
      {"sampling.top_p: ", [](Request* r) { r->sampling.top_p = kNan; }},
      {"sampling.min_p: ", [](Request* r) { r->sampling.min_p = -0.01f; }},
      {"sampling.min_p: ", [](Request* r) { r->sampling.min_p = 1.01f; }},
      {"sampling.min_p: ", [](Request* r) { r->sampling.min_p = kNan; }},
      {"sampling.repetition_penalty: ", [](Request* r) { r->sampling.repetition_penalty = 0; }},
      {"sampling.repetition_penalty: ", [](Request* r) { r->sampling.repetition_penalty = 101; }},
      {"sampling.repetition_penalty: ", [](Request* r) { r->sampling.repetition_penalty = kNan; }},
      {"sampling.presence_penalty: ", [](Request* r) { r->sampling.presence_penalty = -2.1f; }},
      {"sampling.presence_penalty: ", [](Request* r) { r->sampling.presence_penalty = kNan; }},
      {"sampling.frequency_penalty: ", [](Request* r) { r->sampling.frequency_penalty = 2.1f; }},
      {"sampling.frequency_penalty: ", [](Request* r) { r->sampling.frequency_penalty = kNan; }},
      {"sampling.logit_bias: ",
       [](Request* r) {
         r->sampling.logit_bias = {{100, 0}};
       }},
      {"sampling.logit_bias: ",
       [](Request* r) {
         r->sampling.logit_bias = {{-1, 0}};
       }},
      {"sampling.logit_bias: ",
       [](Request* r) {
         r->sampling.logit_bias = {{1, kNan}};
       }},
      {"sampling.logit_bias: ",
       [](Request* r) {
         r->sampling.logit_bias = {{1, kInfinity}};
       }},
      {"sampling.logit_bias: ",
       [](Request* r) {
         r->sampling.logit_bias = {{1, 0}, {1, 1}};
       }},
      {"sampling.logit_bias: ",
       [](Request* r) {
         r->sampling.logit_bias.assign(kMaxLogitBias + 1, {1, 0});
       }},
      {"stop.max_tokens: ", [](Request* r) { r->stop.max_tokens = 0; }},
      {"stop.max_tokens: ", [](Request* r) { r->stop.max_tokens = 46; }},
      {"stop.max_tokens: ", [](Request* r) { r->stop.max_tokens = 2147483647; }},
      {"stop.min_tokens: ", [](Request* r) { r->stop.min_tokens = -1; }},
      {"stop.min_tokens: ", [](Request* r) { r->stop.min_tokens = 46; }},
      {"stop.strings[1]: ",
       [](Request* r) {
         r->stop.strings = {"a", ""};
       }},
      {"stop.strings[0]: ", [](Request* r) { r->stop.strings = {std::string(1025, 'x')}; }},
      {"stop.strings: ", [](Request* r) { r->stop.strings.assign(17, "x"); }},
      {"stop.token_ids: ", [](Request* r) { r->stop.token_ids.assign(65, 1); }},
      {"stop.token_ids[1]: ",
       [](Request* r) {
         r->stop.token_ids = {1, 100};
       }},
      {"output.top_logprobs: ", [](Request* r) { r->output.top_logprobs = 1; }},
      {"output.top_logprobs: ",
       [](Request* r) {
         r->output.logprobs = true;
         r->output.top_logprobs = 21;
       }},
      {"output.top_logprobs: ", [](Request* r) { r->output.top_logprobs = -1; }},
      {"attention.keep_ratio: ", [](Request* r) { r->attention.keep_ratio = 0; }},
      {"attention.rectify_interval: ", [](Request* r) { r->attention.rectify_interval = 9; }},
      {"forced_token_ids: ", [](Request* r) { r->forced_tokens.assign(46, 1); }},
      {"forced_token_ids[0]: ", [](Request* r) { r->forced_tokens = {100}; }},
      {"n: ", [](Request* r) { r->n = 0; }},
      {"n: ", [](Request* r) { r->n = 65; }},
      {"priority: ", [](Request* r) { r->priority = -1001; }},
      {"priority: ", [](Request* r) { r->priority = 1001; }},
  };
}

TEST(RequestTest, NamesTheFieldThatIsWrong) {
  for (const BadCase& bad : BadCases()) {
    Request request = ValidRequest();
    bad.change(&request);
    const absl::Status status = Validate(request);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bad.field;
    EXPECT_THAT(std::string(status.message()), StartsWith(bad.field));
  }
}

TEST(RequestTest, RefusesToBanTheWholeVocabulary) {
  ModelLimits limits = Limits();
  limits.vocab_size = 4;
  Request request = ValidRequest();
  request.prompt = {0};
  request.sampling.logit_bias = {{0, -kInfinity}, {1, -kInfinity}, {2, -kInfinity}};
  EXPECT_TRUE(Validate(request, limits).ok());
  request.stop.token_ids = {3};
  EXPECT_TRUE(Validate(request, limits).ok());
  request.stop.min_tokens = 1;  // Now the stop token is banned too.
  EXPECT_THAT(std::string(Validate(request, limits).message()), HasSubstr("every token"));
  // So is the end of sequence, unless it is ignored.
  request.stop.token_ids.clear();
  EXPECT_TRUE(Validate(request, limits).ok());
  const auto with_eos = [&] { return ValidateRequest(request, limits, /*eos_ids=*/{3}); };
  EXPECT_THAT(std::string(with_eos().message()), HasSubstr("every token"));
  request.stop.ignore_eos = true;
  EXPECT_TRUE(with_eos().ok());
  request.stop = StopCriteria();
  EXPECT_TRUE(with_eos().ok());
}

TEST(RequestTest, BoundsWhatSeveralOutputsEcho) {
  const ModelLimits limits = {.vocab_size = 100, .max_context = 1 << 20, .pool_tokens = 1 << 20};
  Request request = ValidRequest();
  request.prompt.assign(kMaxEchoTokens / 2, 1);
  request.output.echo = true;
  request.n = 2;
  EXPECT_EQ(Validate(request, limits), absl::OkStatus());
  request.prompt.push_back(1);
  EXPECT_THAT(std::string(Validate(request, limits).message()), StartsWith("output.echo: "));
  request.n = 1;
  request.prompt.resize(kMaxEchoTokens + 1);
  EXPECT_EQ(Validate(request, limits), absl::OkStatus());
}

TEST(RequestTest, SaysWhichLimitIsTooTight) {
  Request request = ValidRequest();
  request.stop.max_tokens = 60;
  EXPECT_THAT(std::string(Validate(request).message()),
              ::testing::AllOf(HasSubstr("the context holds 50 tokens"), HasSubstr("leaves 45")));
  ModelLimits small_pool = Limits();
  small_pool.pool_tokens = 32;
  EXPECT_THAT(std::string(Validate(request, small_pool).message()),
              ::testing::AllOf(HasSubstr("the KV pool holds 32 tokens"), HasSubstr("leaves 27")));
}

TEST(RequestTest, MaxOutputTokensIsTheTightestOfThree) {
  Request request = ValidRequest();
  EXPECT_EQ(MaxOutputTokens(request, Limits()), 45);
  ModelLimits small_pool = Limits();
  small_pool.pool_tokens = 32;
  EXPECT_EQ(MaxOutputTokens(request, small_pool), 27);
  request.stop.max_tokens = 7;
  EXPECT_EQ(MaxOutputTokens(request, small_pool), 7);
}

TEST(RequestTest, NamesFinishReasons) {
  EXPECT_STREQ(NameOf(FinishReason::kStop), "stop");
  EXPECT_STREQ(NameOf(FinishReason::kLength), "length");
}

}  // namespace
}  // namespace resa::engine
