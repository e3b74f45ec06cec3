#include "engine/pre_tokenizer.h"

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/status_macros.h"
#include "engine/unicode_data.h"
#include "engine/utf8.h"
#include "kernels/check.h"

namespace resa::engine {
namespace {

using Kind = PreTokenizerStep::Kind;
using Spans = std::vector<std::pair<uint32_t, uint32_t>>;

// A piece's cut into parts: the end of each and whether it is a match. They cover the piece.
using Parts = std::vector<std::pair<uint32_t, bool>>;

void AddPart(size_t end, bool is_match, size_t begin, Parts* parts) {
  const size_t last = parts->empty() ? begin : parts->back().first;
  if (end > last) parts->emplace_back(static_cast<uint32_t>(end), is_match);
}

// Cuts [begin, end) of `text` by the step's pattern. The pattern sees this piece only, as if it
// were a text of its own: look-ahead does not reach beyond it.
absl::Status FindParts(const PreTokenizerStep& step, absl::string_view text, size_t begin,
                       size_t end, RegexScratch& scratch, Parts* parts) {
  parts->clear();
  const absl::string_view piece = text.substr(begin, end - begin);
  size_t at = 0;
  while (at < piece.size()) {
    size_t match_begin = 0;
    size_t match_end = 0;
    if (step.regex != nullptr) {
      RESA_ASSIGN_OR_RETURN(const Regex::Match match, step.regex->Find(piece, at, scratch));
      if (!match.found) break;
      match_begin = match.begin;
      match_end = match.end;
    } else {
      match_begin = piece.find(step.literal, at);
      if (match_begin == absl::string_view::npos) break;
      match_end = match_begin + step.literal.size();
    }
    AddPart(begin + match_begin, step.invert, begin, parts);
    AddPart(begin + match_end, !step.invert, begin, parts);
    at = match_end;
  }
  AddPart(end, step.invert, begin, parts);
  return absl::OkStatus();
}

void FindDigits(absl::string_view text, size_t begin, size_t end, Parts* parts) {
  parts->clear();
  size_t part_begin = begin;
  for (size_t at = begin, length = 0; at < end; at += length) {
    if (!IsNumeric(DecodeValid(text.substr(at), &length))) continue;
    if (at > part_begin) parts->emplace_back(static_cast<uint32_t>(at), false);
    part_begin = at + length;
    parts->emplace_back(static_cast<uint32_t>(part_begin), true);
  }
  if (end > part_begin) parts->emplace_back(static_cast<uint32_t>(end), false);
}

// Turns the parts of a piece that begins at `begin` into pieces.
void Assemble(const Parts& parts, uint32_t begin, SplitBehavior behavior, Spans* spans) {
  const size_t first = spans->size();
  bool previous_is_match = false;
  for (size_t i = 0; i < parts.size(); ++i) {
    const auto [end, is_match] = parts[i];
    bool joins_previous = false;
    switch (behavior) {
      case SplitBehavior::kRemoved:
      case SplitBehavior::kIsolated:
        break;
      case SplitBehavior::kMergedWithPrevious:
        joins_previous = is_match && !previous_is_match;
        break;
      case SplitBehavior::kMergedWithNext:
        // The match before this part joins it, unless it is itself followed by a match.
        joins_previous = previous_is_match && !is_match;
        break;
      case SplitBehavior::kContiguous:
        joins_previous = is_match == previous_is_match;
        break;
    }
    if (joins_previous && spans->size() > first) {
      spans->back().second = end;
    } else if (behavior != SplitBehavior::kRemoved || !is_match) {
      spans->emplace_back(begin, end);
    }
    begin = end;
    previous_is_match = is_match;
  }
}

// The text of all pieces with spaces replaced and the prefix put where it belongs.
void RewriteMetaspace(const PreTokenizerStep& step, PreTokens* tokens, Spans* scratch,
                      std::string* out) {
  out->clear();
  scratch->clear();
  bool first = true;
  for (const auto& [begin, end] : tokens->spans) {
    const absl::string_view piece = tokens->text.substr(begin, end - begin);
    const bool prepend =
        step.prepend_scheme == PrependScheme::kAlways ||
        (step.prepend_scheme == PrependScheme::kFirst && first && tokens->first_at_origin);
    const auto new_begin = static_cast<uint32_t>(out->size());
    if (prepend && piece[0] != ' ' && !absl::StartsWith(piece, step.replacement)) {
      out->append(step.replacement);
    }
    for (size_t at = 0; at < piece.size();) {
      const size_t space = std::min(piece.find(' ', at), piece.size());
      absl::StrAppend(out, piece.substr(at, space - at));
      if (space < piece.size()) out->append(step.replacement);
      at = space + 1;
    }
    scratch->emplace_back(new_begin, static_cast<uint32_t>(out->size()));
    first = false;
  }
  tokens->text = *out;
  tokens->spans.swap(*scratch);
}

// The text of all pieces, each with a space in front unless it has one.
void RewriteWithPrefixSpace(PreTokens* tokens, Spans* scratch, std::string* out) {
  out->clear();
  scratch->clear();
  for (const auto& [begin, end] : tokens->spans) {
    const auto new_begin = static_cast<uint32_t>(out->size());
    if (tokens->text[begin] != ' ') out->push_back(' ');
    absl::StrAppend(out, tokens->text.substr(begin, end - begin));
    scratch->emplace_back(new_begin, static_cast<uint32_t>(out->size()));
  }
  tokens->text = *out;
  tokens->spans.swap(*scratch);
}

absl::Status SplitPieces(const PreTokenizerStep& step, PreTokenizerScratch& scratch,
                         PreTokens* tokens) {
  scratch.spans.clear();
  const uint32_t origin = tokens->spans.empty() ? 0 : tokens->spans.front().first;
  for (const auto& [begin, end] : tokens->spans) {
    if (step.kind == Kind::kDigits) {
      FindDigits(tokens->text, begin, end, &scratch.parts);
      Assemble(scratch.parts, begin,
               step.individual_digits ? SplitBehavior::kIsolated : SplitBehavior::kContiguous,
               &scratch.spans);
    } else {
      RESA_RETURN_IF_ERROR(
          FindParts(step, tokens->text, begin, end, *scratch.regex, &scratch.parts));
      Assemble(scratch.parts, begin, step.behavior, &scratch.spans);
    }
  }
  tokens->first_at_origin =
      tokens->first_at_origin && !scratch.spans.empty() && scratch.spans.front().first == origin;
  tokens->spans.swap(scratch.spans);
  return absl::OkStatus();
}

}  // namespace

PreTokenizer::PreTokenizer(std::vector<PreTokenizerStep> steps) : steps_(std::move(steps)) {
  for (size_t i = 0; i + 1 < steps_.size(); ++i) RESA_CHECK(steps_[i].kind != Kind::kByteLevel);
}

bool PreTokenizer::byte_level() const {
  return !steps_.empty() && steps_.back().kind == Kind::kByteLevel;
}

absl::Status PreTokenizer::Run(absl::string_view text, bool at_origin, PreTokenizerScratch& scratch,
                               PreTokens* tokens) const {
  RESA_CHECK_LT(text.size(), size_t{1} << 31);
  tokens->text = text;
  tokens->first_at_origin = at_origin;
  tokens->spans.clear();
  if (text.empty()) return absl::OkStatus();
  tokens->spans.emplace_back(0, static_cast<uint32_t>(text.size()));
  int target = 0;  // The buffer that the text does not live in.
  for (const PreTokenizerStep& step : steps_) {
    switch (step.kind) {
      case Kind::kSplit:
      case Kind::kDigits:
        RESA_RETURN_IF_ERROR(SplitPieces(step, scratch, tokens));
        break;
      case Kind::kMetaspace: {
        RewriteMetaspace(step, tokens, &scratch.spans, &scratch.buffers[target]);
        target = 1 - target;
        if (!step.split_words) break;
        PreTokenizerStep words{.kind = Kind::kSplit};
        words.literal = step.replacement;
        words.behavior = SplitBehavior::kMergedWithNext;
        RESA_RETURN_IF_ERROR(SplitPieces(words, scratch, tokens));
        break;
      }
      case Kind::kByteLevel:
        if (step.add_prefix_space) {
          RewriteWithPrefixSpace(tokens, &scratch.spans, &scratch.buffers[target]);
          target = 1 - target;
        }
        if (step.regex != nullptr) RESA_RETURN_IF_ERROR(SplitPieces(step, scratch, tokens));
        break;
    }
  }
  return absl::OkStatus();
}

}  // namespace resa::engine
