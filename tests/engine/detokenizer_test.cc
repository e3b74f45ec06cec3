#include "engine/detokenizer.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "engine/utf8.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/test_tokenizers.h"

namespace resa::engine {
namespace {

using Ids = std::vector<int32_t>;

Ids Encode(const Tokenizer& tokenizer, const std::string& text) {
  auto ids = tokenizer.Encode(text, {.add_special_tokens = false, .parse_special = true});
  EXPECT_TRUE(ids.ok()) << ids.status();
  return ids.ok() ? *ids : Ids();
}

// What Push and Finish gave out, checked for valid UTF-8 on the way.
struct Output {
  std::vector<std::string> pieces;
  std::string text;
  std::optional<std::string> stop;
};

Output Detokenize(const Tokenizer& tokenizer, const Ids& ids, Detokenizer::Options options) {
  Detokenizer detokenizer(&tokenizer, std::move(options));
  Output output;
  for (const int32_t id : ids) {
    Detokenizer::Step step = detokenizer.Push(id);
    output.pieces.push_back(step.text);
    if (step.matched_stop.has_value()) {
      output.stop = step.matched_stop;
      break;
    }
  }
  output.pieces.push_back(detokenizer.Finish());
  for (const std::string& piece : output.pieces) {
    EXPECT_TRUE(IsValidUtf8(piece)) << absl::CHexEscape(piece);
    output.text += piece;
  }
  return output;
}

TEST(DetokenizerTest, BytesOfACharacterWaitForTheRest) {
  const auto tokenizer = testing::LoadTestTokenizer("gpt2");
  // An emoji in three tokens: its first two bytes, and one for each of the others.
  const Ids ids = Encode(*tokenizer, "a\xF0\x9F\xA6\x96z");
  ASSERT_EQ(ids.size(), 5u);
  EXPECT_THAT(Detokenize(*tokenizer, ids, {}).pieces,
              ::testing::ElementsAre("a", "", "", "\xF0\x9F\xA6\x96", "z", ""));
}

TEST(DetokenizerTest, UnfinishedCharacterAtTheEndIsReplaced) {
  const auto tokenizer = testing::LoadTestTokenizer("gpt2");
  Ids ids = Encode(*tokenizer, "a\xF0\x9F\xA6\x96");
  ids.pop_back();
  EXPECT_EQ(Detokenize(*tokenizer, ids, {}).text, "a\xEF\xBF\xBD");
}

TEST(DetokenizerTest, RunOfByteTokensWaitsForItsEnd) {
  const auto tokenizer = testing::LoadTestTokenizer("llama2");
  const int32_t first = *tokenizer->TokenToId("<0xE2>");
  const int32_t second = *tokenizer->TokenToId("<0x82>");
  const int32_t third = *tokenizer->TokenToId("<0xAC>");
  const int32_t letter = *tokenizer->TokenToId("a");
  EXPECT_THAT(Detokenize(*tokenizer, {letter, first, second, third, letter}, {}).pieces,
              ::testing::ElementsAre("a", "", "", "",
                                     "\xE2\x82\xAC"
                                     "a",
                                     ""));
  // One byte too few: the whole run is ill-formed, as the library has it.
  EXPECT_EQ(Detokenize(*tokenizer, {letter, first, second, third, first, letter}, {}).text,
            "a\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"
            "a");
}

TEST(DetokenizerTest, LongRunOfByteTokensFlowsInTheEnd) {
  const auto tokenizer = testing::LoadTestTokenizer("llama2");
  Detokenizer detokenizer(tokenizer.get(), {});
  std::string text;
  std::string expected;
  for (int i = 0; i < 200; ++i) {
    for (const char* byte : {"<0xE2>", "<0x82>", "<0xAC>"}) {
      text += detokenizer.Push(*tokenizer->TokenToId(byte)).text;
    }
    expected += "\xE2\x82\xAC";
    ASSERT_LE(expected.size() - text.size(), DecodeStream::kMaxHeldBytes);
  }
  EXPECT_EQ(text + detokenizer.Finish(), expected);
}

TEST(DetokenizerTest, SpecialTokensAreSkippedOnRequest) {
  const auto tokenizer = testing::LoadTestTokenizer("gpt2");
  const Ids ids = Encode(*tokenizer, "a<|im_end|>b");
  EXPECT_EQ(Detokenize(*tokenizer, ids, {}).text, "ab");
  EXPECT_EQ(Detokenize(*tokenizer, ids,
                       {.stop_strings = {}, .skip_special_tokens = false, .include_stop = false})
                .text,
            "a<|im_end|>b");
}

TEST(DetokenizerTest, PossibleStopIsHeldUntilDecided) {
  const auto tokenizer = testing::LoadTestTokenizer("gpt2");
  Detokenizer detokenizer(tokenizer.get(), {.stop_strings = {"xyz"}});
  const auto push = [&](const char* token) {
    return detokenizer.Push(*tokenizer->TokenToId(token)).text;
  };
  EXPECT_EQ(push("a"), "a");
  EXPECT_EQ(push("x"), "");
  EXPECT_EQ(push("x"), "x");  // The second x may begin it, the first can't.
  EXPECT_EQ(push("y"), "");
  EXPECT_EQ(push("a"), "xya");
  EXPECT_EQ(push("x"), "");
  EXPECT_EQ(detokenizer.Finish(), "x");
}

TEST(DetokenizerTest, StopAcrossTokensCutsTheText) {
  const auto tokenizer = testing::LoadTestTokenizer("gpt2");
  for (const bool include : {false, true}) {
    const Output output = Detokenize(
        *tokenizer, Encode(*tokenizer, "one two three four"),
        {.stop_strings = {"zzz", "o thr"}, .skip_special_tokens = true, .include_stop = include});
    EXPECT_EQ(output.stop, "o thr");
    EXPECT_EQ(output.text, include ? "one two thr" : "one tw");
  }
}

TEST(DetokenizerTest, OfStopsThatEndTogetherTheLongestCounts) {
  const auto tokenizer = testing::LoadTestTokenizer("gpt2");
  const Output output = Detokenize(*tokenizer, Encode(*tokenizer, "say END now"),
                                   {.stop_strings = {"ND", " END", "END"}});
  EXPECT_EQ(output.stop, " END");
  EXPECT_EQ(output.text, "say");
}

TEST(DetokenizerTest, NothingBeforeTheLeastNumberOfTokensCanStop) {
  const auto tokenizer = testing::LoadTestTokenizer("gpt2");
  Detokenizer detokenizer(tokenizer.get(), {.stop_strings = {"ab"}});
  const int32_t a = *tokenizer->TokenToId("a");
  const int32_t b = *tokenizer->TokenToId("b");
  EXPECT_EQ(detokenizer.Push(a, /*may_stop=*/false).text, "a");
  EXPECT_FALSE(detokenizer.Push(b).matched_stop.has_value());
  EXPECT_EQ(detokenizer.Push(a).text, "");
  // What was held becomes plain text when the next token may not stop.
  EXPECT_EQ(detokenizer.Push(b, /*may_stop=*/false).text, "ab");
  detokenizer.Push(a);
  EXPECT_EQ(detokenizer.Push(b).matched_stop, "ab");
  EXPECT_TRUE(detokenizer.stopped());
  EXPECT_EQ(detokenizer.Finish(), "");
}

// The stop that ends first, the longest of those that end there: straight from the definition.
std::optional<std::pair<size_t, std::string>> FirstStop(const std::string& text,
                                                        const std::vector<std::string>& stops) {
  std::optional<std::pair<size_t, std::string>> best;  // Its end and itself.
  for (const std::string& stop : stops) {
    const size_t at = text.find(stop);
    if (at == std::string::npos) continue;
    const size_t end = at + stop.size();
    if (!best.has_value() || end < best->first ||
        (end == best->first && stop.size() > best->second.size())) {
      best = {end, stop};
    }
  }
  return best;
}

TEST(DetokenizerTest, RandomTextsAndStopsAgreeWithTheWholeText) {
  const uint64_t seed = std::random_device()();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937_64 rng(seed);
  for (const std::string& name : testing::TestTokenizerNames()) {
    SCOPED_TRACE(name);
    const auto tokenizer = testing::LoadTestTokenizer(name);
    int stopped = 0;
    for (int round = 0; round < 60; ++round) {
      // Half text, half any ids at all: broken characters, special and byte tokens.
      Ids ids = Encode(*tokenizer, testing::RandomText(rng, 1 + rng() % 30));
      while (round % 2 == 1 && ids.size() < 60) {
        ids.insert(ids.begin() + rng() % (ids.size() + 1),
                   static_cast<int32_t>(rng() % (tokenizer->vocab_size() + 2)));
      }
      const std::string whole = tokenizer->Decode(ids, true);
      std::vector<std::string> stops;
      for (size_t i = rng() % 4; i > 0 && !whole.empty(); --i) {
        // A piece of the text itself, on character boundaries, sometimes with a wrong end.
        size_t begin = rng() % whole.size();
        while (begin > 0 && (whole[begin] & 0xC0) == 0x80) --begin;
        const size_t length = 1 + rng() % 12;
        std::string stop = whole.substr(begin, length);
        stop.resize(ValidUtf8Prefix(stop));
        if (rng() % 3 == 0) stop += "#";
        if (!stop.empty()) stops.push_back(stop);
      }
      const bool include = rng() % 2 == 0;
      const Output output =
          Detokenize(*tokenizer, ids,
                     {.stop_strings = stops, .skip_special_tokens = true, .include_stop = include});
      const auto expected = FirstStop(whole, stops);
      if (!expected.has_value()) {
        EXPECT_EQ(output.text, whole);
        EXPECT_FALSE(output.stop.has_value());
        continue;
      }
      ++stopped;
      const size_t kept = expected->first - (include ? 0 : expected->second.size());
      EXPECT_EQ(output.text, whole.substr(0, kept)) << absl::CHexEscape(whole);
      // A stop that only Finish completes cuts the text, too, but has no step to be told in.
      if (output.stop.has_value()) {
        EXPECT_EQ(*output.stop, expected->second);
      }
    }
    EXPECT_GT(stopped, 5);
  }
}

}  // namespace
}  // namespace resa::engine
