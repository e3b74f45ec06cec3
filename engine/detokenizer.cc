#include "engine/detokenizer.h"

#include <algorithm>
#include <utility>

#include "engine/utf8.h"
#include "kernels/check.h"

namespace resa::engine {
namespace {

std::vector<uint32_t> Borders(const std::string& text) {
  std::vector<uint32_t> borders(text.size(), 0);
  for (size_t i = 1; i < text.size(); ++i) {
    uint32_t length = borders[i - 1];
    while (length > 0 && text[i] != text[length]) length = borders[length - 1];
    if (text[i] == text[length]) ++length;
    borders[i] = length;
  }
  return borders;
}

}  // namespace

Detokenizer::Detokenizer(const Tokenizer* tokenizer, Options options)
    : tokenizer_(tokenizer),
      skip_special_tokens_(options.skip_special_tokens),
      include_stop_(options.include_stop),
      stream_(&tokenizer->decoder(), DecodeStream::kMaxHeldBytes) {
  for (std::string& stop : options.stop_strings) {
    RESA_CHECK(!stop.empty() && IsValidUtf8(stop)) << "a stop string is empty or not UTF-8";
    std::vector<uint32_t> borders = Borders(stop);
    patterns_.push_back({std::move(stop), std::move(borders)});
  }
}

std::optional<size_t> Detokenizer::Match(char byte) {
  std::optional<size_t> complete;
  for (size_t i = 0; i < patterns_.size(); ++i) {
    Pattern& pattern = patterns_[i];
    while (pattern.matched > 0 && pattern.text[pattern.matched] != byte) {
      pattern.matched = pattern.borders[pattern.matched - 1];
    }
    if (pattern.text[pattern.matched] == byte) ++pattern.matched;
    if (pattern.matched < pattern.text.size()) continue;
    if (!complete.has_value() || pattern.text.size() > patterns_[*complete].text.size()) {
      complete = i;
    }
  }
  return complete;
}

size_t Detokenizer::LongestPartialMatch() const {
  size_t longest = 0;
  for (const Pattern& pattern : patterns_) longest = std::max<size_t>(longest, pattern.matched);
  return longest;
}

Detokenizer::Step Detokenizer::Advance(std::string decoded, bool may_stop) {
  Step step;
  if (patterns_.empty()) {
    step.text = std::move(decoded);
    return step;
  }
  if (!may_stop) {
    for (Pattern& pattern : patterns_) pattern.matched = 0;
    step.text = std::exchange(held_, {}) + decoded;
    return step;
  }
  for (size_t i = 0; i < decoded.size(); ++i) {
    const std::optional<size_t> complete = Match(decoded[i]);
    if (!complete.has_value()) continue;
    const std::string& stop = patterns_[*complete].text;
    step.text = std::exchange(held_, {}) + decoded.substr(0, i + 1);
    if (!include_stop_) step.text.resize(step.text.size() - stop.size());
    step.matched_stop = stop;
    stopped_ = true;
    return step;
  }
  // The longest end of the text that begins a stop string waits. It is made of whole characters:
  // it begins as the stop string does and ends where the text does.
  held_ += decoded;
  const size_t waiting = LongestPartialMatch();
  step.text = held_.substr(0, held_.size() - waiting);
  held_.erase(0, held_.size() - waiting);
  return step;
}

Detokenizer::Step Detokenizer::Push(int32_t id, bool may_stop) {
  RESA_CHECK(!stopped_) << "the text has ended at a stop string";
  std::string decoded;
  if (!skip_special_tokens_ || !tokenizer_->IsSpecial(id)) stream_.Push(id, &decoded);
  return Advance(std::move(decoded), may_stop);
}

std::string Detokenizer::Finish() {
  if (stopped_) return {};
  // Bytes still waiting in the stream are an unfinished character, or a run of byte tokens that may
  // complete a stop string after all.
  std::string decoded;
  stream_.Finish(&decoded);
  const Step step = Advance(std::move(decoded), /*may_stop=*/true);
  std::string text = step.text + std::exchange(held_, {});
  stopped_ = true;
  return text;
}

}  // namespace resa::engine
