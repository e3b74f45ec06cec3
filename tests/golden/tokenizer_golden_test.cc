// Encoding and decoding against the `tokenizers` library, for every kind of tokenizer that we
// support: goldens made by make_tokenizers.py.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "engine/detokenizer.h"
#include "engine/tokenizer.h"
#include "engine/utf8.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/support/test_tokenizers.h"

namespace resa::engine {
namespace {

using Ids = std::vector<int32_t>;

class TokenizerGoldenTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    tokenizer_ = testing::LoadTestTokenizer(GetParam());
    cases_ = nlohmann::json::parse(testing::ReadTokenizerFile(GetParam() + ".cases.json"));
    for (const auto& hex : nlohmann::json::parse(testing::ReadTokenizerFile("texts.json"))) {
      texts_.push_back(absl::HexStringToBytes(hex.get<std::string>()));
    }
    ASSERT_GT(texts_.size(), 50u);
  }

  std::unique_ptr<const Tokenizer> tokenizer_;
  nlohmann::json cases_;
  std::vector<std::string> texts_;
};

TEST_P(TokenizerGoldenTest, EncodesAsTheLibrary) {
  ASSERT_EQ(cases_["ids"].size(), texts_.size());
  ASSERT_EQ(cases_["plain"].size(), texts_.size());
  for (size_t i = 0; i < texts_.size(); ++i) {
    SCOPED_TRACE(absl::CHexEscape(texts_[i]));
    const auto ids = tokenizer_->Encode(texts_[i]);
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(*ids, cases_["ids"][i].get<Ids>());
    const auto plain =
        tokenizer_->Encode(texts_[i], {.add_special_tokens = false, .parse_special = false});
    ASSERT_TRUE(plain.ok()) << plain.status();
    EXPECT_EQ(*plain, cases_["plain"][i].get<Ids>());
  }
}

TEST_P(TokenizerGoldenTest, DecodesAsTheLibraryWholeAndTokenByToken) {
  ASSERT_EQ(cases_["sequences"].size(), cases_["kept"].size());
  ASSERT_GT(cases_["sequences"].size(), 40u);
  for (size_t i = 0; i < cases_["sequences"].size(); ++i) {
    const Ids ids = cases_["sequences"][i].get<Ids>();
    for (const bool skip : {false, true}) {
      const auto expected = cases_[skip ? "skipped" : "kept"][i].get<std::string>();
      SCOPED_TRACE(absl::CHexEscape(expected));
      EXPECT_EQ(tokenizer_->Decode(ids, skip), expected);
      Detokenizer detokenizer(
          tokenizer_.get(),
          {.stop_strings = {}, .skip_special_tokens = skip, .include_stop = false});
      std::string text;
      for (const int32_t id : ids) {
        const std::string piece = detokenizer.Push(id).text;
        EXPECT_TRUE(IsValidUtf8(piece));
        text += piece;
      }
      EXPECT_EQ(text + detokenizer.Finish(), expected);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, TokenizerGoldenTest,
                         ::testing::ValuesIn(testing::TestTokenizerNames()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace resa::engine
