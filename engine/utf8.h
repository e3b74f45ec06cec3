#ifndef RESA_ENGINE_UTF8_H_
#define RESA_ENGINE_UTF8_H_

// UTF-8 as the Unicode standard defines it: no surrogates, no overlong forms, nothing above
// U+10FFFF. Ill-formed bytes are replaced by U+FFFD once per maximal subpart (Unicode 3.9, best
// practice), which is what Python's errors="replace" and Rust's from_utf8_lossy do.

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"

namespace resa::engine {

inline constexpr absl::string_view kReplacementCharacter = "\xEF\xBF\xBD";  // U+FFFD

// What stands at the front of a byte string.
struct Utf8Unit {
  enum class Kind : uint8_t {
    kCharacter,   // `length` bytes encode `code_point`.
    kIllFormed,   // `length` bytes are one maximal subpart of an ill-formed sequence.
    kIncomplete,  // The string ends (after `length` bytes) inside a sequence well-formed so far.
  };
  Kind kind;
  uint8_t length;  // 1 .. 4
  char32_t code_point;
};

// REQUIRES !bytes.empty().
Utf8Unit ReadUtf8(absl::string_view bytes);

// Bytes of the longest prefix that consists of whole characters.
size_t ValidUtf8Prefix(absl::string_view bytes);
inline bool IsValidUtf8(absl::string_view bytes) { return ValidUtf8Prefix(bytes) == bytes.size(); }

// Appends `bytes` with U+FFFD in place of every maximal ill-formed subpart, an incomplete end
// included.
void AppendReplacingIllFormed(absl::string_view bytes, std::string* out);

// REQUIRES a scalar value.
void AppendUtf8(char32_t code_point, std::string* out);

// The code point at the front of a string known to be valid, and its length in bytes.
// REQUIRES valid UTF-8, not empty.
inline char32_t DecodeValid(absl::string_view text, size_t* length) {
  const auto byte = [text](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) {
    *length = 1;
    return lead;
  }
  if (lead < 0xE0) {
    *length = 2;
    return (lead & 0x1Fu) << 6 | (byte(1) & 0x3Fu);
  }
  if (lead < 0xF0) {
    *length = 3;
    return (lead & 0x0Fu) << 12 | (byte(1) & 0x3Fu) << 6 | (byte(2) & 0x3Fu);
  }
  *length = 4;
  return (lead & 0x07u) << 18 | (byte(1) & 0x3Fu) << 12 | (byte(2) & 0x3Fu) << 6 |
         (byte(3) & 0x3Fu);
}

// Bytes of the last character of a valid, non-empty string.
inline size_t LastCharacterBytes(absl::string_view text) {
  size_t length = 1;
  while (length < text.size() && (text[text.size() - length] & 0xC0) == 0x80) ++length;
  return length;
}

}  // namespace resa::engine

#endif  // RESA_ENGINE_UTF8_H_
