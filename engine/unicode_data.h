#ifndef RESA_ENGINE_UNICODE_DATA_H_
#define RESA_ENGINE_UNICODE_DATA_H_

// Character properties as the `tokenizers` library sees them: those of utf8proc and PCRE2, with the
// differences between Unicode versions ironed out (unicode_data_tables.inc, which says how it is
// made). Tokens must come out the same on every distribution, so nothing here may depend on how new
// its libraries are.

#include <string>

#include "absl/strings/string_view.h"

namespace resa::engine {

// White_Space: what `\s` means in the patterns and what strips mean by a space. Stable in Unicode.
bool IsWhitespace(char32_t c);

// General category N*.
bool IsNumeric(char32_t c);

// `\w` of UTS #18: alphabetic, mark, decimal digit, connector punctuation or join control.
bool IsWordCharacter(char32_t c);

// General category M*, in the Unicode version of the library's normalisation.
bool IsCombiningMark(char32_t c);

// True for characters that the library's normalisation copies and never reorders, composes or
// decomposes although newer Unicode versions do.
bool IsInertInNormalization(char32_t c);

// Appends the full lowercase mapping of `c`, without regard to context.
void AppendLowercase(char32_t c, std::string* out);

// The characters that belong to a general category ("L" or "Lu") but are missing from old versions
// of PCRE2, as the inside of a character class: "\x{1C89}-\x{1C8A}\x{A7CB}"; may be empty.
std::string NewCharactersClass(absl::string_view category);

// The inside of a character class that means White_Space.
inline constexpr absl::string_view kWhitespaceClass =
    "\\x{9}-\\x{D}\\x{20}\\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}"
    "\\x{205F}\\x{3000}";
// The same for everything that is not White_Space.
inline constexpr absl::string_view kNotWhitespaceClass =
    "\\x{0}-\\x{8}\\x{E}-\\x{1F}\\x{21}-\\x{84}\\x{86}-\\x{9F}\\x{A1}-\\x{167F}\\x{1681}-\\x{1FFF}"
    "\\x{200B}-\\x{2027}\\x{202A}-\\x{202E}\\x{2030}-\\x{205E}\\x{2060}-\\x{2FFF}"
    "\\x{3001}-\\x{10FFFF}";

}  // namespace resa::engine

#endif  // RESA_ENGINE_UNICODE_DATA_H_
