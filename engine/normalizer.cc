#include "engine/normalizer.h"

#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "engine/status_macros.h"
#include "engine/unicode_data.h"
#include "engine/unicode_normalization.h"
#include "engine/utf8.h"
#include "kernels/check.h"

namespace resa::engine {
namespace {

using Kind = NormalizerStep::Kind;

// What one step made of its input: `changed` false means *out was not written.
struct StepResult {
  bool changed = false;
  bool front_removed = false;
};

StepResult StripAccents(absl::string_view text, std::string* out) {
  StepResult result;
  out->clear();
  for (size_t at = 0, length = 0; at < text.size(); at += length) {
    const char32_t c = DecodeValid(text.substr(at), &length);
    if (IsCombiningMark(c)) {
      result.changed = true;
      if (out->empty()) result.front_removed = true;
    } else {
      absl::StrAppend(out, text.substr(at, length));
    }
  }
  return result;
}

StepResult Lowercase(absl::string_view text, std::string* out) {
  out->clear();
  for (size_t at = 0, length = 0; at < text.size(); at += length) {
    AppendLowercase(DecodeValid(text.substr(at), &length), out);
  }
  return {.changed = *out != text};
}

StepResult Strip(const NormalizerStep& step, absl::string_view text, std::string* out) {
  size_t begin = 0;
  size_t end = text.size();
  size_t length = 0;
  while (step.left && begin < end && IsWhitespace(DecodeValid(text.substr(begin), &length))) {
    begin += length;
  }
  while (step.right && end > begin) {
    length = LastCharacterBytes(text.substr(begin, end - begin));
    size_t ignored = 0;
    if (!IsWhitespace(DecodeValid(text.substr(end - length), &ignored))) break;
    end -= length;
  }
  if (begin == 0 && end == text.size()) return {};
  out->assign(text.data() + begin, end - begin);
  return {.changed = true, .front_removed = begin > 0};
}

absl::StatusOr<StepResult> Replace(const NormalizerStep& step, absl::string_view text,
                                   std::string* out, RegexScratch& scratch) {
  StepResult result;
  size_t copied = 0;
  while (copied < text.size()) {
    size_t begin = 0;
    size_t end = 0;
    if (step.regex != nullptr) {
      RESA_ASSIGN_OR_RETURN(const Regex::Match match, step.regex->Find(text, copied, scratch));
      if (!match.found) break;
      begin = match.begin;
      end = match.end;
    } else {
      begin = text.find(step.pattern, copied);
      if (begin == absl::string_view::npos) break;
      end = begin + step.pattern.size();
    }
    if (!result.changed) out->clear();
    result.changed = true;
    if (begin == 0 && step.content.empty()) result.front_removed = true;
    absl::StrAppend(out, text.substr(copied, begin - copied));
    absl::StrAppend(out, step.content);
    copied = end;
  }
  if (result.changed) absl::StrAppend(out, text.substr(copied));
  return result;
}

absl::StatusOr<StepResult> ApplyStep(const NormalizerStep& step, absl::string_view text,
                                     std::string* out, NormalizerScratch& scratch) {
  const auto unicode = [&](UnicodeForm form) {
    return StepResult{.changed = NormalizeUnicode(form, text, out, &scratch.code_points)};
  };
  switch (step.kind) {
    case Kind::kNfc:
      return unicode(UnicodeForm::kNfc);
    case Kind::kNfd:
      return unicode(UnicodeForm::kNfd);
    case Kind::kNfkc:
      return unicode(UnicodeForm::kNfkc);
    case Kind::kNfkd:
      return unicode(UnicodeForm::kNfkd);
    case Kind::kLowercase:
      return Lowercase(text, out);
    case Kind::kStripAccents:
      return StripAccents(text, out);
    case Kind::kReplace:
      return Replace(step, text, out, *scratch.regex);
    case Kind::kPrepend:
      if (text.empty()) return StepResult{};
      *out = step.content;
      absl::StrAppend(out, text);
      return StepResult{.changed = true};
    case Kind::kStrip:
      return Strip(step, text, out);
  }
  return StepResult{};
}

}  // namespace

absl::StatusOr<NormalizedText> Normalizer::Apply(absl::string_view text,
                                                 NormalizerScratch& scratch) const {
  RESA_CHECK(scratch.regex != nullptr);
  NormalizedText result{.text = text};
  int target = 0;
  for (const NormalizerStep& step : steps_) {
    // The text may live in the other buffer, never in the target.
    RESA_ASSIGN_OR_RETURN(const StepResult changed,
                          ApplyStep(step, result.text, &scratch.buffers[target], scratch));
    if (!changed.changed) continue;
    result.text = scratch.buffers[target];
    result.starts_at_origin = result.starts_at_origin && !changed.front_removed;
    target = 1 - target;
  }
  return result;
}

}  // namespace resa::engine
