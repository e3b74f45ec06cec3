#ifndef RESA_ENGINE_REGEX_H_
#define RESA_ENGINE_REGEX_H_

// The regular expressions of tokenizer.json, compiled with PCRE2.
//
// They are written for Oniguruma, whose syntax and character classes differ from PCRE2's here and
// there, so a pattern is not handed on: it is parsed, and written anew for PCRE2. What both mean
// alike is accepted, everything else is refused by name, so a pattern never silently means
// something different:
//   literals, escapes of punctuation, \n \r \t \f \v \a \e \xHH \x{H} \uHHHH
//   .  \s \S \d \D  \p{X} \P{X} with X a general category (L, Lu, ..., N, M, P, S and their parts)
//   [...] and [^...] of these (no \P or \D inside), ranges
//   (...) as a group, (?:...) (?i:...) (?=...) (?!...) (?<=...) (?<!...) (?>...)
//   * + ? {n} {n,} {n,m}, each followed by ? for the least; ++ *+ ?+
// Refused: back references, anchors, \w, \b, \h, scripts, nested or intersected classes, inline
// options over the rest of a pattern, patterns that match the empty string.

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace resa::engine {

// What one call of Regex::Find writes to. Not shared by threads; any Regex may use it.
class RegexScratch {
 public:
  RegexScratch();
  ~RegexScratch();
  RegexScratch(RegexScratch&&) = delete;

 private:
  friend class Regex;
  struct State;
  const std::unique_ptr<State> state_;
};

// Immutable and thread-safe after compilation.
class Regex {
 public:
  // INVALID_ARGUMENT with the position and what is not supported.
  static absl::StatusOr<std::unique_ptr<const Regex>> Compile(absl::string_view pattern);
  ~Regex();

  struct Match {
    size_t begin = 0;  // Byte offsets into the subject; begin < end.
    size_t end = 0;
    bool found = false;
  };
  // The leftmost match that begins at `start` or later; `start` is on a character's boundary.
  // RESOURCE_EXHAUSTED when the pattern backtracks beyond PCRE2's limits on this subject.
  // REQUIRES valid UTF-8.
  absl::StatusOr<Match> Find(absl::string_view subject, size_t start, RegexScratch& scratch) const;

  // The pattern as given to PCRE2, for tests and error messages.
  const std::string& translated() const { return translated_; }

 private:
  struct Code;
  Regex(std::string translated, std::unique_ptr<Code> code);

  const std::string translated_;
  const std::unique_ptr<Code> code_;
};

// The translation alone. INVALID_ARGUMENT as Compile.
absl::StatusOr<std::string> TranslateRegex(absl::string_view pattern);

}  // namespace resa::engine

#endif  // RESA_ENGINE_REGEX_H_
