#include "engine/utf8.h"

#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace resa::engine {
namespace {

// The range that the second byte of a sequence must lie in; it is what excludes overlong forms,
// surrogates and values above U+10FFFF (Unicode table 3-7).
struct SecondByteRange {
  unsigned char min;
  unsigned char max;
};

SecondByteRange SecondByteOf(unsigned char lead) {
  switch (lead) {
    case 0xE0:
      return {0xA0, 0xBF};
    case 0xED:
      return {0x80, 0x9F};
    case 0xF0:
      return {0x90, 0xBF};
    case 0xF4:
      return {0x80, 0x8F};
    default:
      return {0x80, 0xBF};
  }
}

}  // namespace

Utf8Unit ReadUtf8(absl::string_view bytes) {
  RESA_CHECK(!bytes.empty());
  const auto byte = [bytes](size_t i) { return static_cast<unsigned char>(bytes[i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return {Utf8Unit::Kind::kCharacter, 1, lead};
  if (lead < 0xC2 || lead > 0xF4) return {Utf8Unit::Kind::kIllFormed, 1, 0};
  const size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  char32_t code_point = lead & (0x7Fu >> length);
  for (size_t i = 1; i < length; ++i) {
    if (i == bytes.size()) {
      return {Utf8Unit::Kind::kIncomplete, static_cast<uint8_t>(i), 0};
    }
    const SecondByteRange range = i == 1 ? SecondByteOf(lead) : SecondByteRange{0x80, 0xBF};
    if (byte(i) < range.min || byte(i) > range.max) {
      return {Utf8Unit::Kind::kIllFormed, static_cast<uint8_t>(i), 0};
    }
    code_point = code_point << 6 | (byte(i) & 0x3Fu);
  }
  return {Utf8Unit::Kind::kCharacter, static_cast<uint8_t>(length), code_point};
}

size_t ValidUtf8Prefix(absl::string_view bytes) {
  size_t at = 0;
  while (at < bytes.size()) {
    // Eight ASCII bytes at a time: the common case of most prompts.
    uint64_t word;
    while (at + sizeof(word) <= bytes.size()) {
      std::memcpy(&word, bytes.data() + at, sizeof(word));
      if (word & 0x8080808080808080u) break;
      at += sizeof(word);
    }
    if (at == bytes.size()) break;
    const Utf8Unit unit = ReadUtf8(bytes.substr(at));
    if (unit.kind != Utf8Unit::Kind::kCharacter) break;
    at += unit.length;
  }
  return at;
}

void AppendReplacingIllFormed(absl::string_view bytes, std::string* out) {
  while (!bytes.empty()) {
    const size_t valid = ValidUtf8Prefix(bytes);
    absl::StrAppend(out, bytes.substr(0, valid));
    bytes.remove_prefix(valid);
    if (bytes.empty()) break;
    absl::StrAppend(out, kReplacementCharacter);
    bytes.remove_prefix(ReadUtf8(bytes).length);
  }
}

void AppendUtf8(char32_t code_point, std::string* out) {
  const auto put = [out](char32_t byte) { out->push_back(static_cast<char>(byte)); };
  if (code_point < 0x80) {
    put(code_point);
  } else if (code_point < 0x800) {
    put(0xC0 | code_point >> 6);
    put(0x80 | (code_point & 0x3F));
  } else if (code_point < 0x10000) {
    RESA_CHECK(code_point < 0xD800 || code_point > 0xDFFF) << "a surrogate has no UTF-8";
    put(0xE0 | code_point >> 12);
    put(0x80 | (code_point >> 6 & 0x3F));
    put(0x80 | (code_point & 0x3F));
  } else {
    RESA_CHECK(code_point <= 0x10FFFF) << "beyond Unicode";
    put(0xF0 | code_point >> 18);
    put(0x80 | (code_point >> 12 & 0x3F));
    put(0x80 | (code_point >> 6 & 0x3F));
    put(0x80 | (code_point & 0x3F));
  }
}

}  // namespace resa::engine
