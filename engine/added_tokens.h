#ifndef RESA_ENGINE_ADDED_TOKENS_H_
#define RESA_ENGINE_ADDED_TOKENS_H_

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"

namespace resa::engine {

// A token that is found in the text before anything else happens to it. Fields as in
// tokenizer.json.
struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool single_word = false;  // Matches only where no word character touches it.
  bool lstrip = false;       // Swallows white space to its left.
  bool rstrip = false;       // Swallows white space to its right.
  bool normalized = false;   // Is looked for in the normalised text, normalised itself.
  bool special = false;      // Controls the model: left out of decoded text, and of user text.
};

// A piece of a text: an added token, or text between them.
struct AddedTokenPiece {
  absl::string_view text;
  const AddedToken* token = nullptr;  // Null for text.
};

// Finds added tokens: leftmost first, the longest of those that begin at one place.
// Holds pointers to the tokens it is given. Immutable and thread-safe after the last Add.
class AddedTokenMatcher {
 public:
  AddedTokenMatcher();

  // Looks for `pattern` (not empty); of equal patterns the first one added counts.
  void Add(absl::string_view pattern, const AddedToken* token);

  // Appends the pieces of `text`, none empty, which point into it. Without `parse_special`, special
  // tokens are text. A match that is rejected (not a single word, special) still takes its place:
  // no other match begins within it. As in the library.
  void Split(absl::string_view text, bool parse_special,
             std::vector<AddedTokenPiece>* pieces) const;

 private:
  struct Found {
    const AddedToken* token = nullptr;
    size_t length = 0;
  };
  Found LongestAt(absl::string_view text) const;

  // A trie: (node, byte) to node; node 0 is the root. tokens_ is by node.
  absl::flat_hash_map<uint64_t, uint32_t> children_;
  std::vector<const AddedToken*> tokens_;
  std::array<bool, 256> first_bytes_{};
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_ADDED_TOKENS_H_
