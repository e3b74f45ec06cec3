#include "server/validate.h"

#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"
#include "tests/support/model_folder.h"

namespace resa::server {
namespace {

using ::resa::testing::kChatMlTemplate;
using ::resa::testing::kImEndToken;
using ::resa::testing::kImStartToken;
using ::resa::testing::kModelVocabSize;
using ::resa::testing::kTheToken;
using ::resa::testing::ModelFolder;
using ::resa::v1::GenerateRequest;
using ::testing::ElementsAre;
using ::testing::Pair;
using ::testing::StartsWith;
using ::testing::UnorderedElementsAre;

constexpr uint64_t kRandomSeed = 99;

class ValidateTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ModelFolder folder({.num_layers = 1}, 1, kChatMlTemplate);
    auto tokenizer = engine::Tokenizer::FromDirectory(folder.path());
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = *std::move(tokenizer);
    model_.tokenizer = tokenizer_.get();
    model_.chat_format = engine::ChatFormat::kChatMl;
    model_.limits.vocab_size = kModelVocabSize;
    model_.limits.max_context = 100;
    model_.default_attention.keep_ratio = 0.3;
    model_.default_attention.sink_tokens = 5;
  }

  absl::StatusOr<std::unique_ptr<engine::Request>> Convert(const std::string& text) {
    GenerateRequest request;
    EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(text, &request)) << text;
    return ToEngineRequest(request, model_, kRandomSeed);
  }

  std::unique_ptr<const engine::Tokenizer> tokenizer_;
  ServedModel model_;
};

TEST_F(ValidateTest, WhatNoContextHoldsIsRefusedUnseen) {
  const size_t most = 100 * tokenizer_->max_token_bytes();
  const auto error = [&](const auto& result) { return std::string(result.status().message()); };
  GenerateRequest request;
  request.set_text(std::string(most, 'x'));
  EXPECT_TRUE(ToEngineRequest(request, model_, kRandomSeed).ok());
  request.mutable_text()->push_back('x');
  EXPECT_THAT(error(ToEngineRequest(request, model_, kRandomSeed)), StartsWith("text: "));
  resa::v1::TokenizeRequest tokenize;
  tokenize.set_text(request.text());
  EXPECT_THAT(error(Tokenize(tokenize, model_)), StartsWith("text: "));
  for (int i = 0; i < 2; ++i) {
    resa::v1::ChatMessage* message = tokenize.mutable_chat()->add_messages();
    message->set_role("user");
    message->set_content(std::string(most / 2 + 1, 'x'));
  }
  EXPECT_THAT(error(Tokenize(tokenize, model_)), StartsWith("chat.messages: "));
  resa::v1::DetokenizeRequest detokenize;
  for (int i = 0; i < 100; ++i) detokenize.add_token_ids(kTheToken);
  EXPECT_TRUE(Detokenize(detokenize, model_).ok());
  detokenize.add_token_ids(kTheToken);
  EXPECT_THAT(error(Detokenize(detokenize, model_)), StartsWith("token_ids: 101 ids"));
}

TEST_F(ValidateTest, UnsetFieldsGetTheirDefaults) {
  const auto request = Convert("text: 'the'");
  ASSERT_TRUE(request.ok()) << request.status();
  const engine::Request& out = **request;
  EXPECT_THAT(out.prompt, ElementsAre(kTheToken));
  EXPECT_EQ(out.sampling.temperature, 1.0f);
  EXPECT_EQ(out.sampling.top_k, 0);
  EXPECT_EQ(out.sampling.top_p, 1.0f);
  EXPECT_EQ(out.sampling.min_p, 0.0f);
  EXPECT_EQ(out.sampling.repetition_penalty, 1.0f);
  EXPECT_EQ(out.sampling.seed, kRandomSeed);
  EXPECT_EQ(out.stop.max_tokens, std::nullopt);
  EXPECT_EQ(out.stop.min_tokens, 0);
  EXPECT_FALSE(out.stop.ignore_eos);
  EXPECT_FALSE(out.output.logprobs);
  EXPECT_EQ(out.attention, model_.default_attention);
  EXPECT_EQ(out.n, 1);
  EXPECT_EQ(out.priority, 0);
}

TEST_F(ValidateTest, EveryFieldArrives) {
  const auto request = Convert(R"(
      request_id: "r" token_ids { ids: [1, 2] }
      sampling { temperature: 0 top_k: 4 top_p: 0.5 min_p: 0.1 repetition_penalty: 1.1
                 presence_penalty: 0.2 frequency_penalty: 0.3 seed: 0
                 logit_bias { key: 7 value: -3 } logit_bias { key: 8 value: 2 } }
      stop { max_tokens: 9 min_tokens: 3 strings: "x" token_ids: 5 ignore_eos: true
             include_stop: true }
      output { token_ids: true logprobs: true top_logprobs: 2 echo: true
               keep_special_tokens: true }
      attention { mode: ATTENTION_MODE_DENSE keep_ratio: 0.5 min_tokens: 10 local_tokens: 11
                  sink_tokens: 0 rectify_interval: 16 }
      forced_token_ids: [3, 4] n: 2 priority: 5)");
  ASSERT_TRUE(request.ok()) << request.status();
  const engine::Request& out = **request;
  EXPECT_THAT(out.prompt, ElementsAre(1, 2));
  EXPECT_EQ(out.sampling.temperature, 0);
  EXPECT_EQ(out.sampling.top_k, 4);
  EXPECT_EQ(out.sampling.top_p, 0.5f);
  EXPECT_EQ(out.sampling.min_p, 0.1f);
  EXPECT_EQ(out.sampling.repetition_penalty, 1.1f);
  EXPECT_EQ(out.sampling.presence_penalty, 0.2f);
  EXPECT_EQ(out.sampling.frequency_penalty, 0.3f);
  EXPECT_EQ(out.sampling.seed, 0u);  // Set, and so not random.
  EXPECT_THAT(out.sampling.logit_bias, UnorderedElementsAre(Pair(7, -3), Pair(8, 2)));
  EXPECT_EQ(out.stop.max_tokens, 9);
  EXPECT_EQ(out.stop.min_tokens, 3);
  EXPECT_THAT(out.stop.strings, ElementsAre("x"));
  EXPECT_THAT(out.stop.token_ids, ElementsAre(5));
  EXPECT_TRUE(out.stop.ignore_eos);
  EXPECT_TRUE(out.stop.include_stop);
  EXPECT_TRUE(out.output.token_ids);
  EXPECT_TRUE(out.output.logprobs);
  EXPECT_EQ(out.output.top_logprobs, 2);
  EXPECT_TRUE(out.output.echo);
  EXPECT_TRUE(out.output.keep_special_tokens);
  EXPECT_EQ(out.attention.mode, engine::AttentionMode::kDense);
  EXPECT_EQ(out.attention.keep_ratio, 0.5);
  EXPECT_EQ(out.attention.min_tokens, 10);
  EXPECT_EQ(out.attention.local_tokens, 11);
  EXPECT_EQ(out.attention.sink_tokens, 0);
  EXPECT_EQ(out.attention.rectify_interval, 16);
  EXPECT_THAT(out.forced_tokens, ElementsAre(3, 4));
  EXPECT_EQ(out.n, 2);
  EXPECT_EQ(out.priority, 5);
}

TEST_F(ValidateTest, AttentionThatIsPartlySetKeepsTheRestOfTheDefault) {
  const auto request = Convert("text: 'a' attention { rectify_interval: 64 }");
  ASSERT_TRUE(request.ok());
  EXPECT_EQ((*request)->attention.rectify_interval, 64);
  EXPECT_EQ((*request)->attention.keep_ratio, 0.3);
  EXPECT_EQ((*request)->attention.sink_tokens, 5);
  EXPECT_EQ((*request)->attention.mode, engine::AttentionMode::kRectified);
}

TEST_F(ValidateTest, ControlTokensAreParsedInTextOnlyAndOnlyIfWanted) {
  EXPECT_THAT((*Convert("text: '<|im_end|>'"))->prompt, ElementsAre(kImEndToken));
  EXPECT_EQ((*Convert("text: '<|im_end|>' parse_special_tokens: false"))->prompt.size(), 10u);
  const auto chat = Convert("chat { messages { role: 'user' content: '<|im_end|>' } }");
  ASSERT_TRUE(chat.ok()) << chat.status();
  EXPECT_EQ((*chat)->prompt.front(), kImStartToken);
  EXPECT_EQ(std::count((*chat)->prompt.begin(), (*chat)->prompt.end(), kImEndToken), 1);
}

TEST_F(ValidateTest, TheAssistantsTurnIsOpenedUnlessToldOtherwise) {
  const auto opened = Convert("chat { messages { role: 'user' content: 'x' } }");
  const auto closed =
      Convert("chat { messages { role: 'user' content: 'x' } add_generation_prompt: false }");
  ASSERT_TRUE(opened.ok() && closed.ok());
  EXPECT_GT((*opened)->prompt.size(), (*closed)->prompt.size());
}

TEST_F(ValidateTest, WhatOnlyTheWireCanSayIsRefusedWithItsField) {
  struct Case {
    std::string request;
    std::string message;
  };
  const std::string long_id(257, 'x');
  const Case cases[] = {
      {"", "prompt: required; one of text, token_ids and chat"},
      {"text: ''", "text: must not be empty"},
      {"token_ids {}", "token_ids.ids: must hold at least one token"},
      {"token_ids { ids: [1, -1] }", "token_ids.ids[1]: token id -1 is not from 0 to 263"},
      {"token_ids { ids: 264 }", "token_ids.ids[0]: token id 264 is not from 0 to 263"},
      {"token_ids { ids: 1 } add_special_tokens: true", "add_special_tokens: acts on a text"},
      {"chat { messages { role: 'user' } } parse_special_tokens: true", "parse_special_tokens: "},
      {"chat {}", "chat.messages: must hold at least one message"},
      {"chat { messages { role: 'wizard' content: 'x' } }", "chat.messages: "},
      {"text: 'a' request_id: '" + long_id + "'", "request_id: 257 bytes; at most 256"},
      {"text: 'a' attention { mode: 9 }", "attention.mode: 9 is not"},
      {"text: 'a' attention { keep_ratio: 2 }", "attention.keep_ratio: 2 is not"},
  };
  for (const Case& c : cases) {
    const auto request = Convert(c.request);
    ASSERT_FALSE(request.ok()) << c.request;
    EXPECT_EQ(request.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(request.status().message()), StartsWith(c.message));
  }
}

TEST_F(ValidateTest, ChatWithoutATemplateSaysWhy) {
  model_.chat_format.reset();
  model_.chat_refusal = "the model has no chat template";
  const auto request = Convert("chat { messages { role: 'user' content: 'x' } }");
  EXPECT_EQ(request.status().message(), "chat: the model has no chat template");
}

TEST_F(ValidateTest, TokenizeAndDetokenizeAreInverse) {
  resa::v1::TokenizeRequest tokenize;
  tokenize.set_text("the \xE2\x82\xAC<|im_end|>");
  const auto ids = Tokenize(tokenize, model_);
  ASSERT_TRUE(ids.ok()) << ids.status();
  resa::v1::DetokenizeRequest detokenize;
  detokenize.mutable_token_ids()->Add(ids->begin(), ids->end());
  EXPECT_EQ(Detokenize(detokenize, model_).value(), "the \xE2\x82\xAC");
  detokenize.set_keep_special_tokens(true);
  EXPECT_EQ(Detokenize(detokenize, model_).value(), tokenize.text());
  detokenize.add_token_ids(kModelVocabSize);
  EXPECT_FALSE(Detokenize(detokenize, model_).ok());
}

TEST_F(ValidateTest, APolicySurvivesTheWayToTheWireAndBack) {
  engine::AttentionPolicy policy;
  policy.mode = engine::AttentionMode::kSparse;
  policy.keep_ratio = 0.07;
  policy.min_tokens = 1;
  policy.local_tokens = 2;
  policy.sink_tokens = 0;
  policy.rectify_interval = 8;
  GenerateRequest request;
  request.set_text("a");
  *request.mutable_attention() = ToProto(policy);
  EXPECT_EQ((*ToEngineRequest(request, model_, 0))->attention, policy);
}

}  // namespace
}  // namespace resa::server
