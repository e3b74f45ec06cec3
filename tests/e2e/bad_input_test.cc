// Whatever a client can get wrong, field by field: a status that names the field, and a daemon that
// goes on.

#include <limits>

#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "gtest/gtest.h"
#include "tests/support/server_fixture.h"

namespace resa::testing {
namespace {

using ::resa::v1::GenerateRequest;
using ::testing::HasSubstr;

// The field that the status' details blame, or "".
std::string BlamedField(const grpc::Status& status) {
  google::rpc::Status rpc;
  google::rpc::BadRequest bad_request;
  if (!rpc.ParseFromString(status.error_details()) || rpc.details_size() != 1 ||
      !rpc.details(0).UnpackTo(&bad_request) || bad_request.field_violations_size() != 1) {
    return "";
  }
  return bad_request.field_violations(0).field();
}

class BadInputTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { server_ = new TestServer({.flags = {"--max-context=1000"}}); }
  static void TearDownTestSuite() {
    delete server_;
    server_ = nullptr;
  }
  static TestServer* server_;
};

TestServer* BadInputTest::server_ = nullptr;

struct BadField {
  std::string request;  // Text format, on top of a good request.
  std::string field;    // What must be blamed.
};

const BadField kBadFields[] = {
    {"sampling { temperature: -0.1 }", "sampling.temperature"},
    {"sampling { temperature: 101 }", "sampling.temperature"},
    {"sampling { temperature: nan }", "sampling.temperature"},
    {"sampling { temperature: inf }", "sampling.temperature"},
    {"sampling { top_k: -1 }", "sampling.top_k"},
    {"sampling { top_p: 0 }", "sampling.top_p"},
    {"sampling { top_p: 1.1 }", "sampling.top_p"},
    {"sampling { top_p: nan }", "sampling.top_p"},
    {"sampling { min_p: -0.1 }", "sampling.min_p"},
    {"sampling { min_p: 1.1 }", "sampling.min_p"},
    {"sampling { repetition_penalty: 0 }", "sampling.repetition_penalty"},
    {"sampling { repetition_penalty: -1 }", "sampling.repetition_penalty"},
    {"sampling { presence_penalty: 2.5 }", "sampling.presence_penalty"},
    {"sampling { presence_penalty: nan }", "sampling.presence_penalty"},
    {"sampling { frequency_penalty: -2.5 }", "sampling.frequency_penalty"},
    {"sampling { logit_bias { key: -1 value: 1 } }", "sampling.logit_bias"},
    {"sampling { logit_bias { key: 264 value: 1 } }", "sampling.logit_bias"},
    {"sampling { logit_bias { key: 1 value: nan } }", "sampling.logit_bias"},
    {"sampling { logit_bias { key: 1 value: inf } }", "sampling.logit_bias"},
    {"stop { max_tokens: 0 }", "stop.max_tokens"},
    {"stop { max_tokens: -5 }", "stop.max_tokens"},
    {"stop { max_tokens: 1000 }", "stop.max_tokens"},
    {"stop { max_tokens: 2147483647 }", "stop.max_tokens"},
    {"stop { min_tokens: -1 }", "stop.min_tokens"},
    {"stop { max_tokens: 5 min_tokens: 6 }", "stop.min_tokens"},
    {"stop { strings: '' }", "stop.strings[0]"},
    {"stop { strings: 'a' strings: '' }", "stop.strings[1]"},
    {"stop { token_ids: -1 }", "stop.token_ids[0]"},
    {"stop { token_ids: [1, 264] }", "stop.token_ids[1]"},
    {"output { top_logprobs: 1 }", "output.top_logprobs"},
    {"output { logprobs: true top_logprobs: 21 }", "output.top_logprobs"},
    {"output { logprobs: true top_logprobs: -1 }", "output.top_logprobs"},
    {"attention { mode: 7 }", "attention.mode"},
    {"attention { keep_ratio: 0 }", "attention.keep_ratio"},
    {"attention { keep_ratio: 1.01 }", "attention.keep_ratio"},
    {"attention { keep_ratio: nan }", "attention.keep_ratio"},
    {"attention { min_tokens: 0 }", "attention.min_tokens"},
    {"attention { local_tokens: 0 }", "attention.local_tokens"},
    {"attention { sink_tokens: -1 }", "attention.sink_tokens"},
    {"attention { rectify_interval: 0 }", "attention.rectify_interval"},
    {"attention { rectify_interval: 12 }", "attention.rectify_interval"},
    {"attention { rectify_interval: 512 }", "attention.rectify_interval"},
    {"forced_token_ids: -1", "forced_token_ids[0]"},
    {"forced_token_ids: [1, 2, 264]", "forced_token_ids[2]"},
    {"stop { max_tokens: 1 } forced_token_ids: [1, 2]", "forced_token_ids"},
    {"n: 0", "n"},
    {"n: -1", "n"},
    {"n: 65", "n"},
    {"priority: 1001", "priority"},
    {"priority: -1001", "priority"},
    {"text: ''", "text"},
    {"token_ids { }", "token_ids.ids"},
    {"token_ids { ids: -1 }", "token_ids.ids[0]"},
    {"token_ids { ids: [1, 264] }", "token_ids.ids[1]"},
    {"token_ids { ids: 1 } add_special_tokens: true", "add_special_tokens"},
    {"chat { messages { role: 'user' } } parse_special_tokens: true", "parse_special_tokens"},
    {"chat { }", "chat.messages"},
    {"chat { messages { role: 'wizard' content: 'x' } }", "chat.messages"},
};

TEST_F(BadInputTest, EveryFieldIsBlamedByName) {
  for (const BadField& bad : kBadFields) {
    GenerateRequest request = RequestFor("good", 5);
    ASSERT_TRUE(google::protobuf::TextFormat::MergeFromString(bad.request, &request))
        << bad.request;
    const Generation result = Generate(server_->stub(), request);
    EXPECT_EQ(result.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << bad.request;
    EXPECT_EQ(BlamedField(result.status), bad.field)
        << bad.request << ": " << result.status.error_message();
    EXPECT_FALSE(result.accepted.has_value()) << bad.request;
  }
  // And still it serves.
  const Generation result = Generate(server_->stub(), RequestFor("good", 5));
  EXPECT_TRUE(result.ok()) << result.Describe();
}

TEST_F(BadInputTest, ListsAreBounded) {
  const auto blamed = [](const GenerateRequest& request) {
    const Generation result = Generate(server_->stub(), request);
    EXPECT_EQ(result.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    return BlamedField(result.status);
  };
  GenerateRequest request = RequestFor("good", 5);
  request.set_request_id(std::string(257, 'x'));
  EXPECT_EQ(blamed(request), "request_id");
  request = RequestFor("good", 5);
  for (int i = 0; i < 17; ++i) request.mutable_stop()->add_strings("s");
  EXPECT_EQ(blamed(request), "stop.strings");
  request = RequestFor("good", 5);
  request.mutable_stop()->add_strings(std::string(1025, 's'));
  EXPECT_EQ(blamed(request), "stop.strings[0]");
  request = RequestFor("good", 5);
  for (int i = 0; i < 65; ++i) request.mutable_stop()->add_token_ids(1);
  EXPECT_EQ(blamed(request), "stop.token_ids");
  request = RequestFor(std::string(1000, 'x'), 5);
  EXPECT_EQ(blamed(request), "prompt");
  request = {};
  EXPECT_EQ(blamed(request), "prompt");
}

TEST_F(BadInputTest, BanningAllButTheEndIsBlamedWhileTheEndIsBannedToo) {
  GenerateRequest request = RequestFor("good", 5);
  request.mutable_stop()->set_ignore_eos(false);
  request.mutable_stop()->set_min_tokens(1);
  for (int id = 0; id < kModelVocabSize; ++id) {
    if (id == kEosToken) continue;
    (*request.mutable_sampling()->mutable_logit_bias())[id] =
        -std::numeric_limits<float>::infinity();
  }
  const Generation refused = Generate(server_->stub(), request);
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT)
      << refused.status.error_message();
  EXPECT_EQ(BlamedField(refused.status), "sampling.logit_bias");
  request.mutable_stop()->set_min_tokens(0);
  const Generation served = Generate(server_->stub(), request);
  EXPECT_TRUE(served.ok()) << served.Describe();
  EXPECT_EQ(served.outputs[0].token_ids.size(), 1u);
}

// Not left to how quick the reader happens to be.
TEST(EchoTest, ALongPromptIsEchoedToFewOutputs) {
  TestServer server({.flags = {"--pool-memory=32MiB"}});
  GenerateRequest request = RequestFor(std::string(4100, 'x'), 1);
  request.mutable_output()->set_echo(true);
  request.set_n(64);
  const Generation refused = Generate(server.stub(), request);
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT)
      << refused.status.error_message();
  EXPECT_EQ(BlamedField(refused.status), "output.echo");
  request.set_n(63);
  const Generation served = Generate(server.stub(), request);
  EXPECT_TRUE(served.ok()) << served.Describe();
  EXPECT_EQ(served.outputs.back().token_ids.size(), 4101u);
}

TEST_F(BadInputTest, TokenizeAndDetokenizeBlameToo) {
  const auto tokenize = [](const std::string& text) {
    resa::v1::TokenizeRequest request;
    EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(text, &request));
    grpc::ClientContext context;
    resa::v1::TokenizeResponse response;
    const grpc::Status status = server_->stub().Tokenize(&context, request, &response);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << text;
    return BlamedField(status);
  };
  EXPECT_EQ(tokenize(""), "input");
  EXPECT_EQ(tokenize("text: ''"), "text");
  EXPECT_EQ(tokenize("chat {}"), "chat.messages");
  EXPECT_EQ(tokenize("chat { messages { role: 'user' } } add_special_tokens: false"),
            "add_special_tokens");
  resa::v1::DetokenizeRequest request;
  request.add_token_ids(5);
  request.add_token_ids(kModelVocabSize);
  grpc::ClientContext context;
  resa::v1::DetokenizeResponse response;
  const grpc::Status status = server_->stub().Detokenize(&context, request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(BlamedField(status), "token_ids[1]");
}

TEST(UnknownChatTemplateTest, ChatIsRefusedAndTextStillServed) {
  for (const std::string& chat_template : {std::string(), std::string("{{ messages }}")}) {
    TestServer server({.chat_template = chat_template});
    GenerateRequest request = RequestFor("", 5);
    resa::v1::ChatMessage* message = request.mutable_chat()->add_messages();
    message->set_role("user");
    message->set_content("Hi");
    const Generation refused = Generate(server.stub(), request);
    EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_EQ(BlamedField(refused.status), "chat") << refused.status.error_message();
    const Generation served = Generate(server.stub(), RequestFor("Hi", 5));
    EXPECT_TRUE(served.ok()) << served.Describe();
  }
}

}  // namespace
}  // namespace resa::testing
