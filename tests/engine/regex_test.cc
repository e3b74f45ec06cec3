#include "engine/regex.h"

#include <string>
#include <utility>
#include <vector>

#include "engine/pre_tokenizer.h"
#include "engine/tokenizer_patterns.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace resa::engine {
namespace {

std::vector<std::string> Matches(const Regex& regex, absl::string_view text) {
  RegexScratch scratch;
  std::vector<std::string> matches;
  for (size_t at = 0; at < text.size();) {
    const auto match = regex.Find(text, at, scratch);
    EXPECT_TRUE(match.ok()) << match.status();
    if (!match.ok() || !match->found) break;
    matches.emplace_back(text.substr(match->begin, match->end - match->begin));
    at = match->end;
  }
  return matches;
}

std::vector<std::string> Matches(absl::string_view pattern, absl::string_view text) {
  const auto regex = Regex::Compile(pattern);
  EXPECT_TRUE(regex.ok()) << pattern << ": " << regex.status();
  return regex.ok() ? Matches(**regex, text) : std::vector<std::string>();
}

TEST(RegexTest, PatternsOfTheModelFamiliesSplitAsTheyShould) {
  using ::testing::ElementsAre;
  const char* const text = "I'LL pay $1234,\r\n\n ok  now";
  EXPECT_THAT(Matches(kGpt2Pattern, text),
              ElementsAre("I", "'", "LL", " pay", " $", "1234", ",", "\r\n\n", " ok", " ", " now"));
  EXPECT_THAT(Matches(kQwen2Pattern, text), ElementsAre("I", "'LL", " pay", " $", "1", "2", "3",
                                                        "4", ",\r\n\n", " ok", " ", " now"));
  EXPECT_THAT(Matches(kLlama3Pattern, text),
              ElementsAre("I", "'LL", " pay", " $", "123", "4", ",\r\n\n", " ok", " ", " now"));
  EXPECT_THAT(Matches(kTekkenPattern, "helloWorld HTTPServer"),
              ElementsAre("hello", "World", " HTTPServer"));
}

TEST(RegexTest, ClassesAreThoseOfUnicode) {
  // U+180E is no white space since Unicode 6.3, though PCRE2 still says so.
  EXPECT_THAT(Matches("\\s+", "a\xC2\x85 \xE3\x80\x80x\xE1\xA0\x8Ey"),
              ::testing::ElementsAre("\xC2\x85 \xE3\x80\x80"));
  EXPECT_THAT(Matches("\\S+", "a\xE1\xA0\x8Ey z"), ::testing::ElementsAre("a\xE1\xA0\x8Ey", "z"));
  EXPECT_THAT(Matches("[^\\S\\n]+", "a \t\n b"), ::testing::ElementsAre(" \t", " "));
  // Characters of Unicode 15 and 16: a Kawi letter, a Garay digit, a Kirat Rai mark.
  EXPECT_THAT(Matches("\\p{L}+",
                      "1\xF0\x91\xBC\x84"
                      "a1"),
              ::testing::ElementsAre("\xF0\x91\xBC\x84"
                                     "a"));
  EXPECT_THAT(Matches("\\p{N}", "\xF0\x90\xB5\x80"), ::testing::SizeIs(1));
  EXPECT_THAT(Matches("\\P{L}", "a\xF0\x91\xBC\x84"), ::testing::IsEmpty());
  EXPECT_THAT(Matches("[^\\p{L}]", "\xF0\x91\xBC\x84-"), ::testing::ElementsAre("-"));
}

TEST(RegexTest, SyntaxThatBothKnowIsTranslated) {
  using ::testing::ElementsAre;
  EXPECT_THAT(Matches("a{2,3}", "aaaaa"), ElementsAre("aaa", "aa"));
  EXPECT_THAT(Matches("a{2,3}?", "aaaa"), ElementsAre("aa", "aa"));
  EXPECT_THAT(Matches("(?i:'s)|x", "'S 's x X"), ElementsAre("'S", "'s", "x"));
  EXPECT_THAT(Matches("(a|bc)+", "abcax"), ElementsAre("abca"));
  EXPECT_THAT(Matches("(?<!b)a(?=c)", "ac bac"), ElementsAre("a"));
  EXPECT_THAT(Matches("[\\x{4e00}-\\u9fa5]+|[a\\-z]", "\xE4\xBD\xA0\xE5\xA5\xBD-b"),
              ElementsAre("\xE4\xBD\xA0\xE5\xA5\xBD", "-"));
  EXPECT_THAT(Matches(".+", "a\nb"), ElementsAre("a", "b"));
  EXPECT_THAT(Matches("\\d++",
                      "1\xD9\xA1"
                      "2x"),
              ElementsAre("1\xD9\xA1"
                          "2"));
}

TEST(RegexTest, WhatMayMeanSomethingElseIsRefusedByName) {
  const std::pair<const char*, const char*> cases[] = {
      {"\\w+", "\\w"},
      {"\\bx", "\\b"},
      {"\\h", "\\h"},
      {"(a)\\1", "\\1"},
      {"^a", "\"^\""},
      {"a$", "\"$\""},
      {"\\p{Han}", "the property Han"},
      {"\\p{^L}", "the property ^L"},
      {"\\pL", "a property without braces"},
      {"[[a]b]", "a class within a class"},
      {"[a-z&&[^b]]", "an intersection"},
      {"[\\P{L}]", "\\P within a class"},
      {"[z-a]", "a range out of order"},
      {"[\\s-z]", "a range that begins with a class"},
      {"[a", "not closed"},
      {"(a", "not closed"},
      {"a)", "unbalanced"},
      {"(?i)a", "the group (?i)"},
      {"(?<name>a)", "the group (?<n"},
      {"(*UTF)a", "the group (*UT"},
      {"(?i:ss)", "\"ss\" in any case"},
      {"(?i:\xC3\xA9)", "non-ASCII letter"},
      {"(?i:[a-z])", "a character class in any case"},
      {"a{2}?", "{n}?"},
      {"a{2,3}+", "{n,m}+"},
      {"a**", "a quantifier of a quantifier"},
      {"a{,3}", "the count {,3}"},
      {"a{9999}", "the count {9999}"},
      {"*a", "\"*\""},
      {"\\x80", "the character \\x80"},
      {"\\u{d800}", "the character \\u{d80"},
      {"\\", "a backslash at its end"},
      {"a*", "the empty string"},
      {"", "the empty string"},
      {"\xFF", "not valid UTF-8"},
  };
  for (const auto& [pattern, message] : cases) {
    const auto regex = Regex::Compile(pattern);
    ASSERT_EQ(regex.status().code(), absl::StatusCode::kInvalidArgument) << pattern;
    EXPECT_THAT(std::string(regex.status().message()), ::testing::HasSubstr(message)) << pattern;
  }
  std::string deep;
  for (int i = 0; i < 1000; ++i) deep += "(?:";
  EXPECT_FALSE(Regex::Compile(deep).ok());
}

TEST(RegexTest, PatternThatBacktracksForeverEndsWithAnError) {
  const auto regex = Regex::Compile("(?:(?:a|a)+)+[bc]");
  ASSERT_TRUE(regex.ok()) << regex.status();
  RegexScratch scratch;
  const auto match = (*regex)->Find(std::string(5000, 'a'), 0, scratch);
  EXPECT_EQ(match.status().code(), absl::StatusCode::kResourceExhausted);
  // The scratch is as good as new.
  const auto next = (*regex)->Find("aab", 0, scratch);
  ASSERT_TRUE(next.ok());
  EXPECT_EQ(next->end, 3u);
}

TEST(RegexTest, LongRunsMatchInOnePiece) {
  for (const absl::string_view pattern :
       {kGpt2Pattern, kQwen2Pattern, kLlama3Pattern, kTekkenPattern}) {
    const auto regex = Regex::Compile(pattern);
    ASSERT_TRUE(regex.ok()) << regex.status();
    for (const absl::string_view unit : {"a", "A", " ", "\n", "!", "\xE4\xBD\xA0", "\xCC\x81"}) {
      std::string text;
      while (text.size() < (1 << 20)) text.append(unit.data(), unit.size());
      const std::vector<std::string> matches = Matches(**regex, text);
      ASSERT_EQ(matches.size(), 1u) << pattern << " of " << unit;
      EXPECT_EQ(matches[0].size(), text.size());
    }
  }
}

}  // namespace
}  // namespace resa::engine
