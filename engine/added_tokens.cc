#include "engine/added_tokens.h"

#include <algorithm>

#include "engine/unicode_data.h"
#include "engine/utf8.h"
#include "kernels/check.h"

namespace resa::engine {
namespace {

uint64_t EdgeKey(uint32_t node, char byte) {
  return static_cast<uint64_t>(node) << 8 | static_cast<unsigned char>(byte);
}

bool EndsInWordCharacter(absl::string_view text) {
  if (text.empty()) return false;
  size_t length = 0;
  return IsWordCharacter(DecodeValid(text.substr(text.size() - LastCharacterBytes(text)), &length));
}

bool BeginsWithWordCharacter(absl::string_view text) {
  size_t length = 0;
  return !text.empty() && IsWordCharacter(DecodeValid(text, &length));
}

size_t SpacesAtEnd(absl::string_view text) {
  size_t bytes = 0;
  while (bytes < text.size()) {
    const absl::string_view rest = text.substr(0, text.size() - bytes);
    const size_t length = LastCharacterBytes(rest);
    size_t ignored = 0;
    if (!IsWhitespace(DecodeValid(rest.substr(rest.size() - length), &ignored))) break;
    bytes += length;
  }
  return bytes;
}

size_t SpacesAtBegin(absl::string_view text) {
  size_t bytes = 0;
  size_t length = 0;
  while (bytes < text.size() && IsWhitespace(DecodeValid(text.substr(bytes), &length))) {
    bytes += length;
  }
  return bytes;
}

}  // namespace

AddedTokenMatcher::AddedTokenMatcher() : tokens_(1, nullptr) {}

void AddedTokenMatcher::Add(absl::string_view pattern, const AddedToken* token) {
  RESA_CHECK(!pattern.empty());
  first_bytes_[static_cast<unsigned char>(pattern[0])] = true;
  uint32_t node = 0;
  for (const char byte : pattern) {
    const auto [it, is_new] =
        children_.emplace(EdgeKey(node, byte), static_cast<uint32_t>(tokens_.size()));
    if (is_new) tokens_.push_back(nullptr);
    node = it->second;
  }
  if (tokens_[node] == nullptr) tokens_[node] = token;
}

AddedTokenMatcher::Found AddedTokenMatcher::LongestAt(absl::string_view text) const {
  Found found;
  uint32_t node = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto it = children_.find(EdgeKey(node, text[i]));
    if (it == children_.end()) break;
    node = it->second;
    if (tokens_[node] != nullptr) found = {tokens_[node], i + 1};
  }
  return found;
}

void AddedTokenMatcher::Split(absl::string_view text, bool parse_special,
                              std::vector<AddedTokenPiece>* pieces) const {
  size_t copied = 0;  // Bytes of `text` that are in pieces.
  size_t at = 0;
  while (at < text.size()) {
    if (!first_bytes_[static_cast<unsigned char>(text[at])]) {
      ++at;
      continue;
    }
    const Found found = LongestAt(text.substr(at));
    if (found.token == nullptr) {
      ++at;
      continue;
    }
    size_t begin = at;
    size_t end = at + found.length;
    at = end;
    const AddedToken& token = *found.token;
    if (token.special && !parse_special) continue;
    if (token.single_word &&
        (EndsInWordCharacter(text.substr(0, begin)) || BeginsWithWordCharacter(text.substr(end)))) {
      continue;
    }
    // White space that the token before has swallowed is gone.
    if (token.lstrip) begin = std::max(begin - SpacesAtEnd(text.substr(0, begin)), copied);
    if (token.rstrip) end += SpacesAtBegin(text.substr(end));
    if (begin > copied) pieces->push_back({text.substr(copied, begin - copied), nullptr});
    pieces->push_back({text.substr(begin, end - begin), &token});
    copied = end;
  }
  if (copied < text.size()) pieces->push_back({text.substr(copied), nullptr});
}

}  // namespace resa::engine
