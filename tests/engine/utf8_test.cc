#include "engine/utf8.h"

#include <string>

#include "absl/strings/escaping.h"
#include "gtest/gtest.h"

namespace resa::engine {
namespace {

std::string Replaced(absl::string_view bytes) {
  std::string out;
  AppendReplacingIllFormed(bytes, &out);
  return out;
}

TEST(Utf8Test, EveryScalarValueRoundTrips) {
  for (char32_t c = 0; c <= 0x10FFFF; ++c) {
    if (c == 0xD800) c = 0xE000;
    std::string text;
    AppendUtf8(c, &text);
    const Utf8Unit unit = ReadUtf8(text);
    ASSERT_EQ(unit.kind, Utf8Unit::Kind::kCharacter) << static_cast<uint32_t>(c);
    ASSERT_EQ(unit.code_point, c);
    ASSERT_EQ(unit.length, text.size());
    size_t length = 0;
    ASSERT_EQ(DecodeValid(text, &length), c);
    ASSERT_EQ(length, text.size());
    ASSERT_EQ(LastCharacterBytes("x" + text), text.size());
    for (size_t cut = 1; cut < text.size(); ++cut) {
      const Utf8Unit part = ReadUtf8(absl::string_view(text).substr(0, cut));
      ASSERT_EQ(part.kind, Utf8Unit::Kind::kIncomplete);
      ASSERT_EQ(part.length, cut);
    }
  }
}

TEST(Utf8Test, IllFormedSubpartsAreReplacedOneByOne) {
  // Expected values: bytes.decode("utf-8", errors="replace") of Python 3.
  constexpr char kR[] = "\xEF\xBF\xBD";
  const auto r = [&](int n) {
    std::string text;
    while (n-- > 0) text += kR;
    return text;
  };
  const std::pair<std::string, std::string> cases[] = {
      {"", ""},
      {"plain", "plain"},
      {"\xFF", r(1)},
      {"\x80\x80", r(2)},
      {"\xC0\x80", r(2)},  // Overlong.
      {"\xC3", r(1)},      // Incomplete at the end.
      {"\xC3z", r(1) + "z"},
      {"\xE4\xBD", r(1)},  // Two of three bytes: one subpart.
      {"\xE4\xBDz", r(1) + "z"},
      {"\xE0\x9F\xBF", r(3)},  // Overlong.
      {"\xED\xA0\x80", r(3)},  // Surrogate.
      {"\xF0\x9F\x98", r(1)},
      {"\xF0\x9F\x98\xF0\x9F\x98\x80", r(1) + "\xF0\x9F\x98\x80"},
      {"\xF0\x8F\xBF\xBF", r(4)},  // Overlong.
      {"\xF4\x90\x80\x80", r(4)},  // Above U+10FFFF.
      {"\xF5\x80", r(2)},
      {"a\xE4\xBD\xA0\xFF"
       "b",
       "a\xE4\xBD\xA0" + r(1) + "b"},
  };
  for (const auto& [bytes, expected] : cases) {
    EXPECT_EQ(Replaced(bytes), expected) << absl::CHexEscape(bytes);
    EXPECT_EQ(IsValidUtf8(bytes), bytes == expected);
    EXPECT_TRUE(IsValidUtf8(Replaced(bytes)));
  }
}

TEST(Utf8Test, ValidPrefixEndsBeforeTheFirstFault) {
  std::string text(100, 'a');
  EXPECT_EQ(ValidUtf8Prefix(text), 100u);
  for (const size_t at : {0, 1, 7, 8, 9, 63, 99}) {
    std::string broken = text;
    broken[at] = '\xC3';
    EXPECT_EQ(ValidUtf8Prefix(broken), at);
  }
}

}  // namespace
}  // namespace resa::engine
