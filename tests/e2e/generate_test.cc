// Generation through a real socket: every kind of prompt, output and option.

#include <algorithm>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/server_fixture.h"

namespace resa::testing {
namespace {

using ::resa::v1::GenerateRequest;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::SizeIs;
using ::testing::StartsWith;

class GenerateTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { server_ = new TestServer; }
  static void TearDownTestSuite() {
    delete server_;
    server_ = nullptr;
  }

  static Generation Run(const GenerateRequest& request) {
    Generation result = Generate(server_->stub(), request);
    EXPECT_TRUE(result.ok()) << result.Describe();
    return result;
  }
  static std::string Detokenize(const std::vector<int32_t>& ids, bool keep_special = false) {
    resa::v1::DetokenizeRequest request;
    request.mutable_token_ids()->Add(ids.begin(), ids.end());
    request.set_keep_special_tokens(keep_special);
    grpc::ClientContext context;
    resa::v1::DetokenizeResponse response;
    const grpc::Status status = server_->stub().Detokenize(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response.text();
  }
  static std::vector<int32_t> Tokenize(const resa::v1::TokenizeRequest& request) {
    grpc::ClientContext context;
    resa::v1::TokenizeResponse response;
    const grpc::Status status = server_->stub().Tokenize(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return {response.token_ids().begin(), response.token_ids().end()};
  }

  static TestServer* server_;
};

TestServer* GenerateTest::server_ = nullptr;

TEST_F(GenerateTest, StreamsTokensAndTellsHowItWent) {
  GenerateRequest request = RequestFor("Hello there", 200);
  request.set_request_id("my-request");
  request.mutable_sampling()->set_seed(5);
  const Generation result = Run(request);
  EXPECT_EQ(result.accepted->request_id(), "my-request");
  EXPECT_EQ(result.accepted->seed(), 5u);
  // 5 bytes "Hello", " the" is one token, "re".
  EXPECT_EQ(result.accepted->prompt_tokens(), 8);
  ASSERT_THAT(result.outputs, SizeIs(1));
  const Generation::Output& out = result.outputs[0];
  EXPECT_THAT(out.token_ids, SizeIs(200));
  EXPECT_GT(out.deltas, 1);
  EXPECT_EQ(out.text, Detokenize(out.token_ids));
  EXPECT_EQ(out.finished->reason(), resa::v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(out.finished->matched_stop_case(), resa::v1::Finished::MATCHED_STOP_NOT_SET);
  EXPECT_EQ(out.finished->usage().prompt_tokens(), 8);
  EXPECT_EQ(out.finished->usage().output_tokens(), 200);
  // The pool's default policy is rectified: 208 tokens, sparse above 64, a window every 32.
  const resa::v1::AttentionStats& attention = out.finished->attention();
  EXPECT_GT(attention.sparse_steps(), 100);
  EXPECT_EQ(attention.rectifications(), 4);  // At 96, 128, 160 and 192 tokens.
  EXPECT_GT(attention.kept_block_ratio(), 0.2);
  EXPECT_LT(attention.kept_block_ratio(), 1.0);
  const resa::v1::Timings& timings = out.finished->timings();
  EXPECT_GT(timings.total().nanos() + timings.total().seconds(), 0);
  EXPECT_GT(timings.first_token().nanos() + timings.first_token().seconds(), 0);
}

TEST_F(GenerateTest, TheSameSeedGivesTheSameTokensAndAnotherGivesOthers) {
  GenerateRequest request = RequestFor("A tale of", 40);
  request.mutable_sampling()->set_seed(77);
  const Generation first = Run(request);
  EXPECT_EQ(Run(request).outputs[0].token_ids, first.outputs[0].token_ids);
  request.mutable_sampling()->set_seed(78);
  EXPECT_NE(Run(request).outputs[0].token_ids, first.outputs[0].token_ids);
}

TEST_F(GenerateTest, ASeedThatTheServerDrewCanBeUsedAgain) {
  GenerateRequest request = RequestFor("Once", 40);
  const Generation first = Run(request);
  const Generation other = Run(request);
  EXPECT_NE(first.accepted->seed(), other.accepted->seed());
  EXPECT_NE(first.accepted->request_id(), "");
  request.mutable_sampling()->set_seed(first.accepted->seed());
  EXPECT_EQ(Run(request).outputs[0].token_ids, first.outputs[0].token_ids);
}

TEST_F(GenerateTest, TextTokenIdsAndTokenizeAgree) {
  resa::v1::TokenizeRequest tokenize;
  tokenize.set_text("the cat\xE2\x82\xAC <|im_end|>");
  const std::vector<int32_t> ids = Tokenize(tokenize);
  EXPECT_THAT(ids, Contains(kTheToken));
  EXPECT_EQ(ids.back(), kImEndToken);
  EXPECT_EQ(Detokenize(ids, /*keep_special=*/true), tokenize.text());
  EXPECT_EQ(Detokenize(ids), "the cat\xE2\x82\xAC ");
  GenerateRequest by_text = RequestFor(tokenize.text(), 30);
  by_text.mutable_sampling()->set_seed(1);
  GenerateRequest by_ids = by_text;
  by_ids.mutable_token_ids()->mutable_ids()->Add(ids.begin(), ids.end());
  const Generation a = Run(by_text);
  const Generation b = Run(by_ids);
  EXPECT_EQ(a.accepted->prompt_tokens(), static_cast<int>(ids.size()));
  EXPECT_EQ(a.outputs[0].token_ids, b.outputs[0].token_ids);
}

TEST_F(GenerateTest, SpecialTokensInTextCanBeLeftText) {
  resa::v1::TokenizeRequest tokenize;
  tokenize.set_text("<|im_end|>");
  EXPECT_THAT(Tokenize(tokenize), ElementsAre(kImEndToken));
  tokenize.set_parse_special_tokens(false);
  EXPECT_THAT(Tokenize(tokenize), Not(Contains(kImEndToken)));
}

TEST_F(GenerateTest, ChatPromptsAreRendered) {
  GenerateRequest request = RequestFor("", 10);
  request.mutable_sampling()->set_temperature(0);
  resa::v1::ChatMessage* message = request.mutable_chat()->add_messages();
  message->set_role("user");
  message->set_content("Hi<|im_end|>");
  resa::v1::TokenizeRequest tokenize;
  *tokenize.mutable_chat() = request.chat();
  const std::vector<int32_t> ids = Tokenize(tokenize);
  EXPECT_EQ(ids.front(), kImStartToken);
  // The client's own <|im_end|> stays text: there is one control token, that of the template.
  EXPECT_EQ(std::count(ids.begin(), ids.end(), kImEndToken), 1);
  EXPECT_EQ(Detokenize(ids, true),
            "<|im_start|>user\nHi<|im_end|><|im_end|>\n<|im_start|>assistant\n");
  const Generation by_chat = Run(request);
  request.mutable_token_ids()->mutable_ids()->Add(ids.begin(), ids.end());
  EXPECT_EQ(Run(request).outputs[0].token_ids, by_chat.outputs[0].token_ids);
}

TEST_F(GenerateTest, SeveralOutputsShareThePromptAndDrawApart) {
  GenerateRequest request = RequestFor("Many worlds", 60);
  request.mutable_sampling()->set_seed(100);
  request.set_n(4);
  const Generation together = Run(request);
  ASSERT_THAT(together.outputs, SizeIs(4));
  // Output i is what a request with seed + i alone gives.
  request.set_n(1);
  for (int i = 0; i < 4; ++i) {
    request.mutable_sampling()->set_seed(100 + i);
    EXPECT_EQ(together.outputs[i].token_ids, Run(request).outputs[0].token_ids) << i;
    EXPECT_EQ(together.outputs[i].finished->index(), i);
  }
  EXPECT_NE(together.outputs[0].token_ids, together.outputs[1].token_ids);
}

TEST_F(GenerateTest, StopStringsEndTheOutputAndAreCutOff) {
  GenerateRequest request = RequestFor("Stop here", 200);
  request.mutable_sampling()->set_seed(3);
  // Only letters, so that every token is a character.
  for (int id = 0; id < kModelVocabSize; ++id) {
    if (id < 'a' || id > 'z') (*request.mutable_sampling()->mutable_logit_bias())[id] = -100;
  }
  const std::string text = Run(request).outputs[0].text;
  ASSERT_THAT(text, SizeIs(200));
  const std::string stop = text.substr(100, 3);
  const size_t at = text.find(stop);
  request.mutable_stop()->add_strings("not there at all");
  request.mutable_stop()->add_strings(stop);
  Generation result = Run(request);
  EXPECT_EQ(result.outputs[0].text, text.substr(0, at));
  EXPECT_EQ(result.outputs[0].finished->reason(), resa::v1::FINISH_REASON_STOP);
  EXPECT_EQ(result.outputs[0].finished->matched_stop_string(), stop);
  request.mutable_stop()->set_include_stop(true);
  EXPECT_EQ(Run(request).outputs[0].text, text.substr(0, at + 3));
}

TEST_F(GenerateTest, StopTokensAndEndOfSequenceEndTheOutput) {
  GenerateRequest request = RequestFor("x", 50);
  request.mutable_sampling()->set_seed(9);
  const std::vector<int32_t> ids = Run(request).outputs[0].token_ids;
  request.mutable_stop()->add_token_ids(ids[20]);
  const Generation result = Run(request);
  const auto first = std::find(ids.begin(), ids.end(), ids[20]);
  EXPECT_EQ(result.outputs[0].finished->matched_stop_token_id(), ids[20]);
  EXPECT_EQ(result.outputs[0].finished->usage().output_tokens(), first - ids.begin() + 1);

  // End of sequence, made certain.
  GenerateRequest eos = RequestFor("x", 50);
  (*eos.mutable_sampling()->mutable_logit_bias())[kEosToken] = 100;
  eos.mutable_stop()->set_ignore_eos(false);
  const Generation ended = Run(eos);
  EXPECT_EQ(ended.outputs[0].finished->matched_stop_token_id(), kEosToken);
  EXPECT_EQ(ended.outputs[0].finished->usage().output_tokens(), 1);
  EXPECT_EQ(ended.outputs[0].text, "");
  eos.mutable_stop()->set_min_tokens(7);
  EXPECT_EQ(Run(eos).outputs[0].finished->usage().output_tokens(), 8);
  eos.mutable_stop()->set_ignore_eos(true);
  EXPECT_EQ(Run(eos).outputs[0].finished->usage().output_tokens(), 50);
}

TEST_F(GenerateTest, EchoPutsThePromptFirst) {
  GenerateRequest request = RequestFor("An echo: ", 20);
  request.mutable_sampling()->set_seed(4);
  const Generation plain = Run(request);
  request.mutable_output()->set_echo(true);
  request.set_n(2);
  const Generation echoed = Run(request);
  EXPECT_EQ(echoed.outputs[0].text, "An echo: " + plain.outputs[0].text);
  EXPECT_THAT(echoed.outputs[1].text, StartsWith("An echo: "));
  EXPECT_EQ(echoed.outputs[0].token_ids.size(),
            static_cast<size_t>(plain.accepted->prompt_tokens()) + 20);
}

TEST_F(GenerateTest, LogprobsAreTheModelsOwnAndOrdered) {
  GenerateRequest request = RequestFor("Numbers", 30);
  request.mutable_sampling()->set_temperature(0);
  request.mutable_output()->set_logprobs(true);
  request.mutable_output()->set_top_logprobs(5);
  const Generation result = Run(request);
  const Generation::Output& out = result.outputs[0];
  ASSERT_THAT(out.logprobs, SizeIs(30));
  for (size_t i = 0; i < out.logprobs.size(); ++i) {
    const resa::v1::TokenLogprob& logprob = out.logprobs[i];
    EXPECT_EQ(logprob.token_id(), out.token_ids[i]);
    EXPECT_LE(logprob.logprob(), 0);
    ASSERT_EQ(logprob.top_size(), 5);
    // Greedy: the token is the best one.
    EXPECT_EQ(logprob.top(0).token_id(), logprob.token_id());
    EXPECT_EQ(logprob.top(0).logprob(), logprob.logprob());
    for (int j = 1; j < 5; ++j) EXPECT_LE(logprob.top(j).logprob(), logprob.top(j - 1).logprob());
  }
}

TEST_F(GenerateTest, ForcedTokensAreTakenWithTheirLogprobs) {
  // Force what greedy decoding chose: the same tokens and logprobs, and it goes on the same.
  GenerateRequest request = RequestFor("Teacher", 100);
  request.mutable_sampling()->set_temperature(0);
  request.mutable_output()->set_logprobs(true);
  const Generation free_run = Run(request);
  const std::vector<int32_t>& ids = free_run.outputs[0].token_ids;
  request.mutable_forced_token_ids()->Add(ids.begin(), ids.begin() + 70);
  const Generation forced = Run(request);
  EXPECT_EQ(forced.outputs[0].token_ids, ids);
  for (size_t i = 0; i < ids.size(); ++i) {
    EXPECT_EQ(forced.outputs[0].logprobs[i].logprob(), free_run.outputs[0].logprobs[i].logprob())
        << i;
  }
  // Other tokens, the end of sequence among them: taken all the same.
  request.mutable_forced_token_ids()->Clear();
  request.mutable_forced_token_ids()->Add(kEosToken);
  request.mutable_forced_token_ids()->Add(kTheToken);
  request.mutable_stop()->set_ignore_eos(false);
  request.mutable_stop()->set_max_tokens(2);
  EXPECT_THAT(Run(request).outputs[0].token_ids, ElementsAre(kEosToken, kTheToken));
}

TEST_F(GenerateTest, SpecialTokensAreShownOnlyWhenAsked) {
  GenerateRequest request = RequestFor("x", 3);
  for (const int32_t id : {int{'a'}, kImEndToken, int{'b'}}) request.add_forced_token_ids(id);
  EXPECT_EQ(Run(request).outputs[0].text, "ab");
  request.mutable_output()->set_keep_special_tokens(true);
  EXPECT_EQ(Run(request).outputs[0].text, "a<|im_end|>b");
}

TEST_F(GenerateTest, SplitCodePointsAreHeldTogether) {
  GenerateRequest request = RequestFor("x", 6);
  // The bytes of U+20AC, one token each, then half of another that never ends.
  for (const int32_t id : {0xE2, 0x82, 0xAC, int{'z'}, 0xE2, 0x82})
    request.add_forced_token_ids(id);
  const Generation result = Run(request);
  EXPECT_THAT(result.outputs[0].text, StartsWith("\xE2\x82\xACz"));
  EXPECT_EQ(result.outputs[0].text, Detokenize({0xE2, 0x82, 0xAC, 'z', 0xE2, 0x82}));
}

TEST_F(GenerateTest, PoliciesAreTakenPerRequest) {
  GenerateRequest request = RequestFor("Policy", 300);
  request.mutable_sampling()->set_temperature(0);
  request.mutable_attention()->set_mode(resa::v1::ATTENTION_MODE_DENSE);
  const Generation dense = Run(request);
  EXPECT_EQ(dense.outputs[0].finished->attention().sparse_steps(), 0);
  EXPECT_EQ(dense.outputs[0].finished->attention().rectifications(), 0);
  request.mutable_attention()->set_mode(resa::v1::ATTENTION_MODE_SPARSE);
  const Generation sparse = Run(request);
  EXPECT_GT(sparse.outputs[0].finished->attention().sparse_steps(), 200);
  EXPECT_EQ(sparse.outputs[0].finished->attention().rectifications(), 0);
  request.mutable_attention()->set_mode(resa::v1::ATTENTION_MODE_RECTIFIED);
  request.mutable_attention()->set_rectify_interval(8);
  const Generation rectified = Run(request);
  EXPECT_GT(rectified.outputs[0].finished->attention().rectifications(), 25);
  // Everything kept is dense.
  request.mutable_attention()->set_keep_ratio(1.0);
  EXPECT_EQ(Run(request).outputs[0].token_ids, dense.outputs[0].token_ids);
}

TEST_F(GenerateTest, ModelAndLoadAreDescribed) {
  grpc::ClientContext context;
  resa::v1::GetModelResponse model;
  ASSERT_TRUE(server_->stub().GetModel(&context, {}, &model).ok());
  EXPECT_EQ(model.name(), "tiny");
  EXPECT_EQ(model.architecture(), "llama");
  EXPECT_EQ(model.vocab_size(), kModelVocabSize);
  EXPECT_EQ(model.max_context_tokens(), 131072);
  EXPECT_EQ(model.max_sequences(), 64);
  EXPECT_EQ(model.max_waiting(), 256);
  EXPECT_THAT(model.eos_token_ids(), ElementsAre(kEosToken));
  EXPECT_EQ(model.chat_format(), "chatml");
  EXPECT_EQ(model.default_attention().mode(), resa::v1::ATTENTION_MODE_RECTIFIED);
  EXPECT_EQ(model.default_attention().rectify_interval(), 32);
  EXPECT_TRUE(model.default_attention().has_sink_tokens());
  EXPECT_EQ(model.selector().kind(), "sketch");
  EXPECT_EQ(model.selector().planes(), 3);
  EXPECT_EQ(model.kv_dtype(), "bf16");
  EXPECT_EQ(model.num_layers(), 2);
  const resa::v1::GetLoadResponse load = server_->Load();
  EXPECT_EQ(load.pages_total() * load.page_tokens(), model.pool_tokens());
  EXPECT_FALSE(load.draining());
  EXPECT_FALSE(model.attention_choice().mode_is_auto());
  EXPECT_FALSE(model.attention_choice().sparse_from_is_auto());
  EXPECT_EQ(model.sparse_from_tokens(), 0);
}

resa::v1::GetModelResponse Describe(TestServer* server) {
  grpc::ClientContext context;
  resa::v1::GetModelResponse model;
  EXPECT_TRUE(server->stub().GetModel(&context, {}, &model).ok());
  return model;
}

TEST(AutoAttentionTest, TheModeIsChosenAtStartAndARequestsOwnWins) {
  TestServer server({.flags = {"--attention-mode=auto"}});
  const resa::v1::GetModelResponse model = Describe(&server);
  const resa::v1::AttentionChoice& choice = model.attention_choice();
  EXPECT_TRUE(choice.mode_is_auto());
  EXPECT_FALSE(choice.sparse_from_is_auto());
  EXPECT_GT(choice.read_bytes_per_second(), 1e8);
  EXPECT_GT(choice.flops_per_second(), 1e8);
  EXPECT_EQ(choice.context_tokens(), std::min<int64_t>(32768, model.pool_tokens()));
  const bool cheap = choice.rectification_seconds() < 0.25 * choice.dense_step_seconds();
  EXPECT_EQ(model.default_attention().mode(),
            cheap ? resa::v1::ATTENTION_MODE_RECTIFIED : resa::v1::ATTENTION_MODE_SPARSE);
  EXPECT_THAT(choice.reason(), HasSubstr(cheap ? "mode rectified" : "mode sparse"));
  EXPECT_THAT(server.LogLines(), Contains(HasSubstr("attention chosen: " + choice.reason())));

  resa::v1::GenerateRequest request = RequestFor(std::string(200, 'x'), 64);
  const auto run = [&] {
    const Generation result = Generate(server.stub(), request);
    EXPECT_TRUE(result.ok()) << result.Describe();
    return result.outputs[0].finished->attention();
  };
  const resa::v1::AttentionStats by_default = run();
  EXPECT_GT(by_default.sparse_steps(), 0);
  EXPECT_EQ(by_default.rectifications() > 0, cheap);
  request.mutable_attention()->set_mode(resa::v1::ATTENTION_MODE_RECTIFIED);
  EXPECT_GT(run().rectifications(), 0);
  request.mutable_attention()->set_mode(resa::v1::ATTENTION_MODE_SPARSE);
  EXPECT_EQ(run().rectifications(), 0);
  request.mutable_attention()->set_mode(resa::v1::ATTENTION_MODE_DENSE);
  EXPECT_EQ(run().sparse_steps(), 0);
}

// This model is so small that a step is all overhead: sparse steps begin late, if ever.
TEST(AutoAttentionTest, ShortContextsAreAttendedDensely) {
  TestServer server({.flags = {"--sparse-from=auto"}});
  const resa::v1::GetModelResponse model = Describe(&server);
  EXPECT_TRUE(model.attention_choice().sparse_from_is_auto());
  EXPECT_FALSE(model.attention_choice().mode_is_auto());
  EXPECT_EQ(model.default_attention().mode(), resa::v1::ATTENTION_MODE_RECTIFIED);
  EXPECT_GE(model.sparse_from_tokens(), 256);
  EXPECT_THAT(model.attention_choice().reason(), HasSubstr("pay"));
  resa::v1::GenerateRequest request = RequestFor(std::string(100, 'x'), 64);
  const Generation result = Generate(server.stub(), request);
  ASSERT_TRUE(result.ok()) << result.Describe();
  EXPECT_EQ(result.outputs[0].finished->attention().sparse_steps(), 0);
}

}  // namespace
}  // namespace resa::testing
