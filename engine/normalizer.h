#ifndef RESA_ENGINE_NORMALIZER_H_
#define RESA_ENGINE_NORMALIZER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "engine/regex.h"

namespace resa::engine {

// One step of a tokenizer's normalisation; the names are those of tokenizer.json.
struct NormalizerStep {
  enum class Kind : uint8_t {
    kNfc,
    kNfd,
    kNfkc,
    kNfkd,
    kLowercase,
    kStripAccents,  // Removes combining marks.
    kReplace,       // Every `pattern` (or match of `regex`) becomes `content`.
    kPrepend,       // `content` goes in front of a text that is not empty.
    kStrip,         // Removes white space at either end.
  };
  Kind kind;
  std::string pattern{};                 // kReplace: the literal, when `regex` is null.
  std::shared_ptr<const Regex> regex{};  // kReplace
  std::string content{};                 // kReplace, kPrepend
  bool left = false;                   // kStrip
  bool right = false;                  // kStrip
};

// Buffers of one call of Normalizer::Apply. Not shared by threads.
struct NormalizerScratch {
  std::string buffers[2];
  std::vector<int32_t> code_points;
  RegexScratch* regex = nullptr;  // Set by the owner.
};

struct NormalizedText {
  absl::string_view text;  // The input, or in the scratch; until the next call with that scratch.
  // Whether the first character stems from the first character of the input: false once a step
  // removed something at the front.
  bool starts_at_origin = true;
};

// What happens to text before it is split. Immutable and thread-safe.
class Normalizer {
 public:
  Normalizer() = default;  // Leaves everything as it is.
  explicit Normalizer(std::vector<NormalizerStep> steps) : steps_(std::move(steps)) {}

  // Linear time, or n log n for long runs of combining marks. Only a regular expression can fail:
  // RESOURCE_EXHAUSTED. REQUIRES valid UTF-8 (the result is, too) and a scratch with a regex.
  absl::StatusOr<NormalizedText> Apply(absl::string_view text, NormalizerScratch& scratch) const;

  bool empty() const { return steps_.empty(); }

 private:
  std::vector<NormalizerStep> steps_;
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_NORMALIZER_H_
