#include "server/generate_flags.h"

#include <cmath>

#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "google/protobuf/util/message_differencer.h"
#include "gtest/gtest.h"
#include "tests/support/file_builders.h"

namespace resa::server {
namespace {

using ::resa::testing::TempFolder;
using ::testing::HasSubstr;

absl::StatusOr<resa::v1::GenerateRequest> Parse(std::vector<std::string> args) {
  FlagSet flags;
  GenerateFlags generate;
  generate.AddTo(&flags);
  generate.AddPromptTo(&flags);
  const auto words = flags.Parse(args);
  if (!words.ok()) return words.status();
  if (absl::Status status = generate.SetPrompt(*words); !status.ok()) return status;
  return generate.request();
}

TEST(GenerateFlagsTest, EveryFieldOfARequestCanBeSet) {
  const auto request = Parse({"--temperature=0.5",
                              "--top-k=40",
                              "--top-p=0.9",
                              "--min-p=0.25",
                              "--repetition-penalty=1.5",
                              "--presence-penalty=0.5",
                              "--frequency-penalty=-0.5",
                              "--seed=18446744073709551615",
                              "--logit-bias=5:1.5,6:-2,7:-inf",
                              "--max-tokens=7",
                              "--min-tokens=2",
                              "--stop=a",
                              "--stop=b",
                              "--stop-ids=1,2",
                              "--ignore-eos",
                              "--include-stop",
                              "--token-ids",
                              "--logprobs=3",
                              "--echo",
                              "--keep-special",
                              "--mode=sparse",
                              "--keep-ratio=0.25",
                              "--attention-min-tokens=9",
                              "--local-tokens=10",
                              "--sink-tokens=0",
                              "--rectify-interval=64",
                              "--forced-ids=8,9",
                              "--n=2",
                              "--priority=-3",
                              "--request-id=me",
                              "--no-add-special",
                              "--no-parse-special",
                              "Hello",
                              "world"});
  ASSERT_TRUE(request.ok()) << request.status();
  resa::v1::GenerateRequest expected;
  ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(
      R"(request_id: "me" text: "Hello world" add_special_tokens: false
         parse_special_tokens: false
         sampling { temperature: 0.5 top_k: 40 top_p: 0.9 min_p: 0.25 repetition_penalty: 1.5
                    presence_penalty: 0.5 frequency_penalty: -0.5 seed: 18446744073709551615
                    logit_bias { key: 5 value: 1.5 } logit_bias { key: 6 value: -2 }
                    logit_bias { key: 7 value: -inf } }
         stop { max_tokens: 7 min_tokens: 2 strings: "a" strings: "b" token_ids: [1, 2]
                ignore_eos: true include_stop: true }
         output { token_ids: true logprobs: true top_logprobs: 3 echo: true
                  keep_special_tokens: true }
         attention { mode: ATTENTION_MODE_SPARSE keep_ratio: 0.25 min_tokens: 9 local_tokens: 10
                     sink_tokens: 0 rectify_interval: 64 }
         forced_token_ids: [8, 9] n: 2 priority: -3)",
      &expected));
  EXPECT_TRUE(google::protobuf::util::MessageDifferencer::Equals(*request, expected))
      << request->DebugString();
}

TEST(GenerateFlagsTest, UnsetFieldsStayUnset) {
  const auto request = Parse({"x"});
  ASSERT_TRUE(request.ok());
  EXPECT_FALSE(request->sampling().has_temperature());
  EXPECT_FALSE(request->stop().has_max_tokens());
  EXPECT_FALSE(request->has_n());
}

TEST(GenerateFlagsTest, PromptsComeFromFilesIdsAndChats) {
  TempFolder folder;
  const std::string path = folder.Write("prompt.txt", "from\na file\n");
  EXPECT_EQ(Parse({"--file", path})->text(), "from\na file\n");
  const auto ids = Parse({"--prompt-ids=3,1,2"});
  ASSERT_TRUE(ids.ok());
  EXPECT_THAT(ids->token_ids().ids(), ::testing::ElementsAre(3, 1, 2));
  const auto chat = Parse({"--chat", "--system", "Be brief.", "Hi"});
  ASSERT_TRUE(chat.ok());
  ASSERT_EQ(chat->chat().messages_size(), 2);
  EXPECT_EQ(chat->chat().messages(0).role(), "system");
  EXPECT_EQ(chat->chat().messages(0).content(), "Be brief.");
  EXPECT_EQ(chat->chat().messages(1).role(), "user");
  EXPECT_EQ(chat->chat().messages(1).content(), "Hi");
}

TEST(GenerateFlagsTest, RefusesWhatMakesNoSense) {
  TempFolder folder;
  const std::string empty = folder.Write("empty.txt", "");
  struct Case {
    std::vector<std::string> args;
    std::string message;
  };
  const Case cases[] = {
      {{"--file=" + empty}, "the prompt is empty"},
      {{"--file=/nonexistent"}, "--file: cannot read /nonexistent"},
      {{"--file=x", "words"}, "give the prompt once"},
      {{"--prompt-ids=1", "words"}, "give the prompt once"},
      {{"--prompt-ids=1", "--chat"}, "--prompt-ids: not with --chat"},
      {{"--prompt-ids=1,x"}, "--prompt-ids: 'x' is not a whole number"},
      {{"--system=s", "words"}, "--system: needs --chat"},
      {{"--mode=fast", "w"}, "--mode: 'fast' is none of dense, sparse, rectified"},
      {{"--logit-bias=5", "w"}, "--logit-bias: '5' is not ID:BIAS"},
      {{"--logit-bias=5:x", "w"}, "--logit-bias: 'x' is not a number"},
      {{"--logit-bias=5:inf", "w"}, "--logit-bias: 'inf' is not a number"},
      {{"--seed=-1", "w"}, "--seed: '-1' is not a whole number from 0"},
      {{"--temperature=hot", "w"}, "--temperature: 'hot' is not a number"},
      {{"--logprobs=many", "w"}, "--logprobs: 'many' is not a whole number"},
  };
  for (const Case& c : cases) {
    const auto request = Parse(c.args);
    ASSERT_FALSE(request.ok()) << c.message;
    EXPECT_THAT(std::string(request.status().message()), HasSubstr(c.message));
  }
}

}  // namespace
}  // namespace resa::server
