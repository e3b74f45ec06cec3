#include "engine/unicode_normalization.h"

#include <utf8proc.h>

#include <algorithm>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "engine/unicode_data.h"
#include "engine/utf8.h"
#include "kernels/check.h"

namespace resa::engine {
namespace {

struct Range {
  char32_t begin;
  char32_t end;  // Inclusive.
};

// Ranges of characters that NFC never changes and that never compose with a character before them:
// starters without a singleton decomposition. Not all there are, but those of most text.
constexpr Range kStableInNfc[] = {
    {0x0000, 0x02FF},    // Latin
    {0x0400, 0x0482},    // Cyrillic
    {0x048A, 0x052F},    // Cyrillic supplement
    {0x05D0, 0x05EA},    // Hebrew letters
    {0x0620, 0x064A},    // Arabic letters
    {0x0660, 0x066F},    // Arabic digits and punctuation
    {0x0E01, 0x0E30},    // Thai consonants
    {0x2010, 0x2027},    // Punctuation
    {0x2030, 0x205E},    // Punctuation
    {0x20A0, 0x20C0},    // Currency
    {0x2190, 0x2328},    // Arrows, mathematics
    {0x2460, 0x2ADB},    // Enclosed, boxes, dingbats, mathematics
    {0x3000, 0x3029},    // CJK punctuation
    {0x3041, 0x3096},    // Hiragana
    {0x309B, 0x30FF},    // Katakana
    {0x3400, 0x4DBF},    // CJK extension A
    {0x4E00, 0x9FFF},    // CJK
    {0xAC00, 0xD7A3},    // Hangul syllables
    {0xFF01, 0xFFEF},    // Fullwidth forms
    {0xFFFD, 0xFFFD},    // Replacement character
    {0x1F300, 0x1FAFF},  // Emoji
};

// True when `c` begins a new, unchanged piece in this form whatever stands before it.
bool IsStable(UnicodeForm form, char32_t c) {
  switch (form) {
    case UnicodeForm::kNfc: {
      if (c < 0x300) return true;
      const Range* it =
          std::lower_bound(std::begin(kStableInNfc), std::end(kStableInNfc), c,
                           [](const Range& range, char32_t x) { return range.end < x; });
      return (it != std::end(kStableInNfc) && it->begin <= c) || IsInertInNormalization(c);
    }
    case UnicodeForm::kNfd:
      return c < 0xC0 || IsInertInNormalization(c);
    case UnicodeForm::kNfkc:
    case UnicodeForm::kNfkd:
      return c < 0xA0 || IsInertInNormalization(c);
  }
  return false;
}

utf8proc_option_t OptionsOf(UnicodeForm form) {
  int options = UTF8PROC_STABLE;
  if (form == UnicodeForm::kNfkc || form == UnicodeForm::kNfkd) options |= UTF8PROC_COMPAT;
  options |= form == UnicodeForm::kNfc || form == UnicodeForm::kNfkc ? UTF8PROC_COMPOSE
                                                                     : UTF8PROC_DECOMPOSE;
  return static_cast<utf8proc_option_t>(options);
}

int CombiningClass(int32_t c) { return utf8proc_get_property(c)->combining_class; }

// Decomposes `run` fully, character by character.
void Decompose(UnicodeForm form, absl::string_view run, std::vector<int32_t>* code_points) {
  // Decomposition alone: with the composing option utf8proc keeps what it can put together again.
  int options = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE;
  if (form == UnicodeForm::kNfkc || form == UnicodeForm::kNfkd) options |= UTF8PROC_COMPAT;
  code_points->clear();
  while (!run.empty()) {
    size_t length = 0;
    const auto c = static_cast<utf8proc_int32_t>(DecodeValid(run, &length));
    run.remove_prefix(length);
    utf8proc_int32_t parts[32];  // The longest decomposition in Unicode has 18.
    int last_boundclass = 0;
    const utf8proc_ssize_t count = utf8proc_decompose_char(
        c, parts, std::size(parts), static_cast<utf8proc_option_t>(options), &last_boundclass);
    RESA_CHECK(count > 0 && count <= static_cast<utf8proc_ssize_t>(std::size(parts)));
    code_points->insert(code_points->end(), parts, parts + count);
  }
}

// Puts each run of combining marks in the order of their classes. utf8proc's own sort is quadratic,
// which a client could use against us.
void Reorder(std::vector<int32_t>* code_points) {
  const auto less = [](int32_t a, int32_t b) { return CombiningClass(a) < CombiningClass(b); };
  auto at = code_points->begin();
  while (at != code_points->end()) {
    if (CombiningClass(*at) == 0) {
      ++at;
      continue;
    }
    const auto end =
        std::find_if(at, code_points->end(), [](int32_t c) { return CombiningClass(c) == 0; });
    std::stable_sort(at, end, less);
    at = end;
  }
}

void AppendNormalizedRun(UnicodeForm form, absl::string_view run, std::string* out,
                         std::vector<int32_t>* code_points) {
  Decompose(form, run, code_points);
  Reorder(code_points);
  size_t length = code_points->size();
  if (form == UnicodeForm::kNfc || form == UnicodeForm::kNfkc) {
    const utf8proc_ssize_t composed = utf8proc_normalize_utf32(
        code_points->data(), static_cast<utf8proc_ssize_t>(length), OptionsOf(form));
    RESA_CHECK(composed >= 0);
    length = static_cast<size_t>(composed);
  }
  for (size_t i = 0; i < length; ++i) AppendUtf8(static_cast<char32_t>((*code_points)[i]), out);
}

}  // namespace

bool NormalizeUnicode(UnicodeForm form, absl::string_view text, std::string* out,
                      std::vector<int32_t>* code_points) {
  bool changed = false;
  size_t copied = 0;    // Bytes of `text` already in *out.
  size_t previous = 0;  // Begin of the character before `at`.
  bool previous_is_inert = false;
  size_t at = 0;
  while (at < text.size()) {
    if (static_cast<unsigned char>(text[at]) < 0x80) {
      previous = at++;
      previous_is_inert = false;
      continue;
    }
    size_t length = 0;
    const char32_t c = DecodeValid(text.substr(at), &length);
    if (IsStable(form, c)) {
      previous = at;
      previous_is_inert = IsInertInNormalization(c);
      at += length;
      continue;
    }
    // The run that may change: from the character before (this one may compose with it) to the
    // next stable one.
    const size_t begin = previous_is_inert || at == 0 ? at : previous;
    size_t end = at + length;
    while (end < text.size()) {
      const char32_t next = DecodeValid(text.substr(end), &length);
      if (IsStable(form, next)) break;
      end += length;
    }
    if (!changed) out->clear();
    changed = true;
    absl::StrAppend(out, text.substr(copied, begin - copied));
    AppendNormalizedRun(form, text.substr(begin, end - begin), out, code_points);
    copied = end;
    // The stable character at `end` starts anew; nothing before it can change any more.
    if (end < text.size()) {
      const char32_t next = DecodeValid(text.substr(end), &length);
      previous = end;
      previous_is_inert = IsInertInNormalization(next);
      end += length;
    }
    at = end;
  }
  if (changed) absl::StrAppend(out, text.substr(copied));
  return changed;
}

}  // namespace resa::engine
