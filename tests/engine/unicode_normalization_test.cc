#include "engine/unicode_normalization.h"

#include <utf8proc.h>

#include <cstdlib>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "engine/unicode_data.h"
#include "engine/utf8.h"
#include "gtest/gtest.h"
#include "tests/support/test_tokenizers.h"

namespace resa::engine {
namespace {

constexpr UnicodeForm kForms[] = {UnicodeForm::kNfc, UnicodeForm::kNfd, UnicodeForm::kNfkc,
                                  UnicodeForm::kNfkd};

std::string Normalize(UnicodeForm form, const std::string& text) {
  std::string out = "left over";
  std::vector<int32_t> scratch;
  return NormalizeUnicode(form, text, &out, &scratch) ? out : text;
}

// The whole text through utf8proc, without looking for what is stable.
std::string Reference(UnicodeForm form, const std::string& text) {
  int options = UTF8PROC_STABLE;
  if (form == UnicodeForm::kNfkc || form == UnicodeForm::kNfkd) options |= UTF8PROC_COMPAT;
  options |= form == UnicodeForm::kNfc || form == UnicodeForm::kNfkc ? UTF8PROC_COMPOSE
                                                                     : UTF8PROC_DECOMPOSE;
  utf8proc_uint8_t* result = nullptr;
  const auto length = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                                   static_cast<utf8proc_ssize_t>(text.size()), &result,
                                   static_cast<utf8proc_option_t>(options));
  EXPECT_GE(length, 0);
  std::string out(reinterpret_cast<const char*>(result), static_cast<size_t>(length));
  std::free(result);
  return out;
}

TEST(UnicodeNormalizationTest, EveryCharacterBetweenOthersIsAsWithoutShortcuts) {
  for (char32_t c = 0; c <= 0x10FFFF; ++c) {
    if (c == 0xD800) c = 0xE000;
    if (IsInertInNormalization(c)) continue;
    std::string alone;
    AppendUtf8(c, &alone);
    // After a letter, before marks that reorder and compose, after a Hangul syllable.
    const std::string text =
        absl::StrCat("a", alone, "\xCC\x81\xCC\xA7\xEA\xB0\x80", alone, "\xE1\x86\xA8");
    for (const UnicodeForm form : kForms) {
      ASSERT_EQ(Normalize(form, text), Reference(form, text)) << absl::CHexEscape(alone);
    }
  }
}

TEST(UnicodeNormalizationTest, RandomTextIsAsWithoutShortcuts) {
  const uint64_t seed = std::random_device()();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937_64 rng(seed);
  for (int round = 0; round < 3000; ++round) {
    std::string text = testing::RandomText(rng, rng() % 20);
    for (int i = rng() % 6; i > 0; --i) AppendUtf8(0x300 + rng() % 0x70, &text);
    text += testing::RandomText(rng, rng() % 5);
    std::string kept;
    for (size_t at = 0, length = 0; at < text.size(); at += length) {
      const char32_t c = DecodeValid(absl::string_view(text).substr(at), &length);
      if (!IsInertInNormalization(c)) kept += text.substr(at, length);
    }
    for (const UnicodeForm form : kForms) {
      ASSERT_EQ(Normalize(form, kept), Reference(form, kept)) << absl::CHexEscape(kept);
    }
  }
}

TEST(UnicodeNormalizationTest, InertCharactersAreBarriers) {
  // U+1133B (Unicode 11, class 7) would be reordered before the grave accent (class 230).
  const std::string text = "a\xCC\x80\xF0\x91\x8C\xBB\xCC\xA7\xCC\x81";
  ASSERT_TRUE(IsInertInNormalization(0x1133B));
  EXPECT_EQ(Normalize(UnicodeForm::kNfc, text), "\xC3\xA0\xF0\x91\x8C\xBB\xCC\xA7\xCC\x81");
}

TEST(UnicodeNormalizationTest, NothingToDoLeavesTheOutputAlone) {
  std::string out = "untouched";
  std::vector<int32_t> scratch;
  EXPECT_FALSE(NormalizeUnicode(UnicodeForm::kNfc, "plain \xC3\xA9 \xE4\xBD\xA0\xEA\xB0\x80", &out,
                                &scratch));
  EXPECT_EQ(out, "untouched");
}

// A sort that is quadratic in a run of marks would need hours for this.
TEST(UnicodeNormalizationTest, LongRunOfMarksIsNoTrouble) {
  std::string text = "a";
  std::string expected = "\xC3\xA0";  // The first grave accent composes with the letter.
  constexpr int kMarks = 300'000;
  for (int i = 0; i < kMarks; ++i) text += "\xCC\x80\xCC\x96";  // Classes 230 and 220.
  // By class: all accents below come first, so nothing blocks the letter from its grave accent.
  for (int i = 0; i < kMarks; ++i) expected += "\xCC\x96";
  for (int i = 0; i < kMarks - 1; ++i) expected += "\xCC\x80";
  EXPECT_TRUE(Normalize(UnicodeForm::kNfc, text) == expected);
}

}  // namespace
}  // namespace resa::engine
