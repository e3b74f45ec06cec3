#ifndef RESA_ENGINE_DETOKENIZER_H_
#define RESA_ENGINE_DETOKENIZER_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "engine/token_decoder.h"
#include "engine/tokenizer.h"

namespace resa::engine {

// The text of one sequence's output, piece by piece, with its stop strings (⑨ of the data path).
//
// Every piece is valid UTF-8, and what was given out is never taken back: bytes of a split
// character wait for the rest, and text that may be the beginning of a stop string waits until that
// is decided. All pieces together are Tokenizer::Decode of all tokens, cut at the stop string.
//
// One per output; single-threaded. The tokenizer outlives it. O(stop strings) per byte.
class Detokenizer {
 public:
  struct Options {
    std::vector<std::string> stop_strings;  // Not empty, valid UTF-8.
    bool skip_special_tokens = true;
    bool include_stop = false;  // The matched stop string is part of the text.
  };

  Detokenizer(const Tokenizer* tokenizer, Options options);

  struct Step {
    std::string text;  // Safe to give out; may be empty.
    // Set once a stop string has matched: the text has ended, nothing may be pushed any more. Of
    // several, the one that ends first; of those, the longest.
    std::optional<std::string> matched_stop;
  };
  // Takes the next token. With `may_stop` false (the least number of tokens is not reached, or the
  // token was forced) neither this token's text nor what came before it can be part of a match.
  // REQUIRES !stopped().
  Step Push(int32_t id, bool may_stop = true);

  // Gives out everything that waits; a stop string that is not complete is just text. Bytes of a
  // character that never came become U+FFFD. An empty string once stopped().
  std::string Finish();

  bool stopped() const { return stopped_; }

 private:
  // Appends decoded text and looks for stop strings in it.
  Step Advance(std::string decoded, bool may_stop);
  // Extends the partial matches by one byte. The index of the stop string that is now complete.
  std::optional<size_t> Match(char byte);
  size_t LongestPartialMatch() const;

  // The Knuth-Morris-Pratt failure function: borders[i] is the length of the longest proper prefix
  // of the string that also ends at its byte i.
  struct Pattern {
    std::string text;
    std::vector<uint32_t> borders;
    uint32_t matched = 0;  // Bytes of `text` that the output ends with.
  };

  const Tokenizer* const tokenizer_;
  const bool skip_special_tokens_;
  const bool include_stop_;
  std::vector<Pattern> patterns_;
  DecodeStream stream_;
  std::string held_;  // Decoded, but possibly the beginning of a stop string.
  bool stopped_ = false;
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_DETOKENIZER_H_
