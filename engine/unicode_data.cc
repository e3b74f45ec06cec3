#include "engine/unicode_data.h"

#include <utf8proc.h>

#include <algorithm>
#include <iterator>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/utf8.h"

namespace resa::engine {
namespace {

struct CodePointRange {
  char32_t begin;
  char32_t end;  // Inclusive.
};
struct NewCharacterRange {
  char32_t begin;
  char32_t end;  // Inclusive.
  char category[3];
};
struct CaseMapping {
  char32_t from;
  char32_t to;
};

#include "engine/unicode_data_tables.inc"

// The range of a sorted table that holds `c`, or null.
template <typename Range, size_t kSize>
const Range* FindRange(const Range (&table)[kSize], char32_t c) {
  const Range* it = std::lower_bound(std::begin(table), std::end(table), c,
                                     [](const Range& range, char32_t x) { return range.end < x; });
  return it != std::end(table) && it->begin <= c ? it : nullptr;
}

// The two letters of the general category, "Cn" when unassigned.
absl::string_view CategoryOf(char32_t c) {
  if (const NewCharacterRange* range = FindRange(kNewCharacters, c)) return range->category;
  return utf8proc_category_string(static_cast<utf8proc_int32_t>(c));
}

}  // namespace

bool IsWhitespace(char32_t c) {
  if (c < 0x80) return c == ' ' || (c >= 0x9 && c <= 0xD);
  return c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 ||
         c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

bool IsNumeric(char32_t c) {
  if (c < 0x80) return c >= '0' && c <= '9';
  // Digits of Unicode 17, which the library's digit splitter knows and its expressions do not.
  if (c >= 0x11DE0 && c <= 0x11DE9) return true;
  return CategoryOf(c)[0] == 'N';
}

bool IsWordCharacter(char32_t c) {
  const absl::string_view category = CategoryOf(c);
  if (category[0] == 'L' || category[0] == 'M') return true;
  if (category == "Nd" || category == "Nl" || category == "Pc") return true;
  // Join controls, then the circled and squared letters: symbols that are alphabetic.
  return c == 0x200C || c == 0x200D || (c >= 0x24B6 && c <= 0x24E9) ||
         (c >= 0x1F130 && c <= 0x1F149) || (c >= 0x1F150 && c <= 0x1F169) ||
         (c >= 0x1F170 && c <= 0x1F189);
}

bool IsCombiningMark(char32_t c) {
  if (c < 0x300 || IsInertInNormalization(c)) return false;
  return CategoryOf(c)[0] == 'M' || FindRange(kOnceMarks, c) != nullptr;
}

bool IsInertInNormalization(char32_t c) {
  return c >= kInertInNormalization[0].begin && FindRange(kInertInNormalization, c) != nullptr;
}

void AppendLowercase(char32_t c, std::string* out) {
  if (c < 0x80) {
    out->push_back(static_cast<char>(c >= 'A' && c <= 'Z' ? c + ('a' - 'A') : c));
    return;
  }
  if (c == 0x130) {  // The one lowercase mapping of two characters: i with a dot above.
    out->append("i\xCC\x87");
    return;
  }
  const CaseMapping* it =
      std::lower_bound(std::begin(kLowercase), std::end(kLowercase), c,
                       [](const CaseMapping& mapping, char32_t x) { return mapping.from < x; });
  if (it != std::end(kLowercase) && it->from == c) {
    AppendUtf8(it->to, out);
  } else {
    AppendUtf8(static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c))), out);
  }
}

std::string NewCharactersClass(absl::string_view category) {
  std::string result;
  for (const NewCharacterRange& range : kNewCharacters) {
    if (!absl::StartsWith(range.category, category)) continue;
    absl::StrAppendFormat(&result, "\\x{%X}", static_cast<uint32_t>(range.begin));
    if (range.end > range.begin) {
      absl::StrAppendFormat(&result, "-\\x{%X}", static_cast<uint32_t>(range.end));
    }
  }
  return result;
}

}  // namespace resa::engine
