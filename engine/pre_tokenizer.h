#ifndef RESA_ENGINE_PRE_TOKENIZER_H_
#define RESA_ENGINE_PRE_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "engine/regex.h"

namespace resa::engine {

// The pattern of GPT-2, which a ByteLevel step splits by unless told otherwise.
inline constexpr absl::string_view kGpt2Pattern =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

// What becomes of the matches when text is split by a pattern; names as in tokenizer.json.
enum class SplitBehavior : uint8_t {
  kRemoved,             // Dropped.
  kIsolated,            // A piece each.
  kMergedWithPrevious,  // The end of the piece before.
  kMergedWithNext,      // The beginning of the piece after.
  kContiguous,          // Neighbouring matches are one piece.
};

enum class PrependScheme : uint8_t { kAlways, kNever, kFirst };

// One step of pre-tokenization; names as in tokenizer.json.
struct PreTokenizerStep {
  enum class Kind : uint8_t { kSplit, kDigits, kMetaspace, kByteLevel };
  Kind kind;

  // kSplit, and kByteLevel that uses its pattern.
  std::shared_ptr<const Regex> regex{};
  // kSplit without a regex: a literal.
  std::string literal{};
  SplitBehavior behavior = SplitBehavior::kIsolated;
  bool invert = false;  // What does not match counts as a match.

  bool individual_digits = false;  // kDigits: one piece per digit, not per run of digits.

  std::string replacement{};  // kMetaspace: one character that stands for a space.
  PrependScheme prepend_scheme = PrependScheme::kAlways;  // kMetaspace
  bool split_words = true;  // kMetaspace: each replacement begins a piece.

  bool add_prefix_space = false;  // kByteLevel
};

// The pieces of a text: `spans` are byte offsets into `text`, in order, none empty.
struct PreTokens {
  absl::string_view text;
  std::vector<std::pair<uint32_t, uint32_t>> spans;
  // Whether the first piece stems from the very beginning of the whole input.
  bool first_at_origin = false;
};

// Buffers of one call. Not shared by threads.
struct PreTokenizerScratch {
  std::string buffers[2];
  std::vector<std::pair<uint32_t, uint32_t>> spans;
  std::vector<std::pair<uint32_t, bool>> parts;
  RegexScratch* regex = nullptr;  // Set by the owner.
};

// Splits text into the words within which BPE merges. Immutable and thread-safe.
class PreTokenizer {
 public:
  PreTokenizer() = default;  // One piece: the whole text.
  // REQUIRES that a kByteLevel step, if there is one, is the last.
  explicit PreTokenizer(std::vector<PreTokenizerStep> steps);

  // Fills *tokens, whose text stays valid as long as `text` does and until the next call with that
  // scratch. `at_origin`: `text` begins where the whole input does. With a byte-level last step the
  // pieces are the plain text's: the model maps bytes itself (engine/bpe.h).
  // RESOURCE_EXHAUSTED when a pattern needs too much work.
  // REQUIRES valid UTF-8, below 2^31 bytes.
  absl::Status Run(absl::string_view text, bool at_origin, PreTokenizerScratch& scratch,
                   PreTokens* tokens) const;

  bool byte_level() const;

 private:
  std::vector<PreTokenizerStep> steps_;
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_PRE_TOKENIZER_H_
