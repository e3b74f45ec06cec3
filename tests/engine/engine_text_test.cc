// An output's text on its way through the engine: stop strings, special tokens, what is held back.

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "engine/tokenizer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/engine_fixture.h"

namespace resa::engine {
namespace {

using ::testing::SizeIs;

// Byte-level, one token per letter: id 0 is "a". 26 is a special token.
constexpr char kLetters[] = R"({
  "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
  "added_tokens": [{"id": 26, "content": "<end>", "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": true}],
  "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                    "use_regex": false},
  "post_processor": null,
  "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
              "use_regex": true},
  "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4, "f": 5, "g": 6, "h": 7, "i": 8,
                      "j": 9, "k": 10, "l": 11, "m": 12, "n": 13, "o": 14, "p": 15, "q": 16,
                      "r": 17, "s": 18, "t": 19, "u": 20, "v": 21, "w": 22, "x": 23, "y": 24,
                      "z": 25},
            "merges": []}
})";

// The n-th output token is the n-th letter.
class EngineTextTest : public EngineTest {
 protected:
  EngineTextTest() {
    auto tokenizer = Tokenizer::FromJson(kLetters, "");
    EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = *std::move(tokenizer);
    options_.limits.vocab_size = 27;
    options_.eos_ids = {26};
    engine_ = std::make_unique<Engine>(options_, tokenizer_.get(), &executor_, &clock_, &observer_);
    executor_.draw = [](const kernels::SampleRow& row) {
      kernels::SampleResult result;
      result.token = row.forced_token >= 0 ? row.forced_token : static_cast<int>(row.draw_index);
      return result;
    };
  }

  static std::unique_ptr<Request> Letters(int32_t max_tokens) {
    std::unique_ptr<Request> request = MakeRequest(3, max_tokens);
    request->prompt = {23, 24, 25};
    return request;
  }

  std::unique_ptr<const Tokenizer> tokenizer_;
};

TEST_F(EngineTextTest, TextComesWithTheTokensAndNothingIsHeldBackAtTheEnd) {
  auto request = Letters(5);
  request->stop.strings = {"exx"};  // "e" may be its beginning until the length ends the output.
  request->output.echo = true;
  auto sink = Submit(std::move(request));
  RunDry();
  EXPECT_EQ(sink->Text(), "xyzabcde");
  EXPECT_EQ(sink->deltas[0].text, "xyz");
  EXPECT_EQ(sink->finished[0].reason, FinishReason::kLength);
}

TEST_F(EngineTextTest, StopStringEndsTheOutputAndIsCutOff) {
  auto request = Letters(20);
  request->stop.strings = {"zz", "de"};
  auto without = Submit(std::move(request));
  request = Letters(20);
  request->stop.strings = {"de"};
  request->stop.include_stop = true;
  auto with = Submit(std::move(request));
  RunDry();
  EXPECT_EQ(without->Text(), "abc");
  EXPECT_THAT(without->Tokens(), SizeIs(5));
  EXPECT_EQ(without->finished[0].reason, FinishReason::kStop);
  EXPECT_EQ(without->finished[0].matched_stop, "de");
  EXPECT_EQ(without->finished[0].matched_stop_token, std::nullopt);
  EXPECT_EQ(with->Text(), "abcde");
  EXPECT_EQ(PagesUsed(), 0);
}

TEST_F(EngineTextTest, StopStringsWaitForMinTokensAndForcedTokens) {
  auto request = Letters(6);
  request->stop.strings = {"bc"};
  request->stop.min_tokens = 4;
  auto too_early = Submit(std::move(request));
  request = Letters(6);
  request->stop.strings = {"ab"};
  request->forced_tokens = {0, 1};
  auto forced = Submit(std::move(request));
  RunDry();
  EXPECT_EQ(too_early->Text(), "abcdef");
  EXPECT_EQ(forced->Text(), "abcdef");
}

TEST_F(EngineTextTest, StopTokensTextIsLeftOutUnlessAskedFor) {
  auto request = Letters(20);
  request->stop.token_ids = {3};
  auto without = Submit(std::move(request));
  request = Letters(20);
  request->stop.token_ids = {3};
  request->stop.include_stop = true;
  auto with = Submit(std::move(request));
  RunDry();
  EXPECT_EQ(without->Text(), "abc");
  EXPECT_EQ(with->Text(), "abcd");
  EXPECT_EQ(without->Tokens(), with->Tokens());
}

TEST_F(EngineTextTest, SpecialTokensAppearWhenAskedFor) {
  auto request = Letters(2);
  request->forced_tokens = {26, 0};
  auto without = Submit(std::move(request));
  request = Letters(2);
  request->forced_tokens = {26, 0};
  request->output.keep_special_tokens = true;
  auto with = Submit(std::move(request));
  RunDry();
  EXPECT_EQ(without->Text(), "a");
  EXPECT_EQ(with->Text(), "<end>a");
}

}  // namespace
}  // namespace resa::engine
