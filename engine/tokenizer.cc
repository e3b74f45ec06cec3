#include "engine/tokenizer.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "engine/status_macros.h"
#include "engine/unicode_data.h"
#include "engine/utf8.h"
#include "kernels/check.h"

namespace resa::engine {

// Everything that a call of Encode writes to.
struct Tokenizer::Scratch {
  Scratch() {
    normalizer.regex = &regex;
    pre_tokenizer.regex = &regex;
  }

  RegexScratch regex;
  NormalizerScratch normalizer;
  PreTokenizerScratch pre_tokenizer;
  BpeScratch bpe;
  PreTokens words;
  std::vector<AddedTokenPiece> pieces;
  std::vector<AddedTokenPiece> normalized_pieces;
  std::string valid_text;
};

// Takes a scratch from the pool, or makes one, and gives it back. Its buffers grow with the text,
// so that of a giant is not kept.
class Tokenizer::ScratchLease {
 public:
  ScratchLease(const Tokenizer& tokenizer, size_t text_bytes)
      : tokenizer_(tokenizer), pooled_(text_bytes <= kPooledTextBytes) {
    if (!pooled_) return;
    absl::MutexLock lock(&tokenizer_.mutex_);
    if (tokenizer_.idle_.empty()) return;
    scratch_ = std::move(tokenizer_.idle_.back());
    tokenizer_.idle_.pop_back();
  }
  ~ScratchLease() {
    if (scratch_ == nullptr || !pooled_) return;
    absl::MutexLock lock(&tokenizer_.mutex_);
    tokenizer_.idle_.push_back(std::move(scratch_));
  }
  Scratch& get() {
    if (scratch_ == nullptr) scratch_ = std::make_unique<Scratch>();
    return *scratch_;
  }

 private:
  const Tokenizer& tokenizer_;
  const bool pooled_;
  std::unique_ptr<Scratch> scratch_;
};

namespace {

absl::Status CheckSize(size_t bytes) {
  if (bytes <= Tokenizer::kMaxTextBytes) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("the text has ", bytes, " bytes; at most ",
                                                 Tokenizer::kMaxTextBytes, " are accepted"));
}

// The text itself when it is valid, else a repaired copy in *buffer.
absl::string_view ValidText(absl::string_view text, std::string* buffer) {
  if (IsValidUtf8(text)) return text;
  buffer->clear();
  AppendReplacingIllFormed(text, buffer);
  return *buffer;
}

absl::string_view WithoutLeadingSpace(absl::string_view text) {
  size_t length = 0;
  while (!text.empty() && IsWhitespace(DecodeValid(text, &length))) text.remove_prefix(length);
  return text;
}

absl::string_view WithoutTrailingSpace(absl::string_view text) {
  while (!text.empty()) {
    const size_t length = LastCharacterBytes(text);
    size_t ignored = 0;
    if (!IsWhitespace(DecodeValid(text.substr(text.size() - length), &ignored))) break;
    text.remove_suffix(length);
  }
  return text;
}

}  // namespace

Tokenizer::Tokenizer(TokenizerParts parts) : parts_(std::move(parts)) {}
Tokenizer::~Tokenizer() = default;

absl::StatusOr<std::unique_ptr<const Tokenizer>> Tokenizer::FromParts(TokenizerParts parts) {
  RESA_CHECK(parts.model != nullptr);
  RESA_CHECK(parts.model->byte_level() == parts.pre_tokenizer.byte_level());
  std::unique_ptr<Tokenizer> tokenizer(new Tokenizer(std::move(parts)));
  std::vector<std::string> spelling;
  RESA_RETURN_IF_ERROR(tokenizer->AddTokens(&spelling));
  tokenizer->decoder_ = TokenDecoder(tokenizer->parts_.decoder, spelling);
  const TokenizerParts& own = tokenizer->parts_;
  std::vector<int32_t> used = own.prefix;
  used.insert(used.end(), own.suffix.begin(), own.suffix.end());
  if (own.bos_id.has_value()) used.push_back(*own.bos_id);
  if (own.eos_id.has_value()) used.push_back(*own.eos_id);
  for (const int32_t id : used) {
    if (!tokenizer->IdToToken(id).has_value()) {
      return absl::InvalidArgumentError(
          absl::StrCat("the special token id ", id, " is not in the vocabulary"));
    }
  }
  return std::unique_ptr<const Tokenizer>(std::move(tokenizer));
}

// Lays the added tokens over the model's vocabulary and makes them findable. Fills *spelling with
// what the decoder is to take each id for: the token, but a normalised one in its normalised form.
absl::Status Tokenizer::AddTokens(std::vector<std::string>* spelling) {
  int32_t limit = parts_.model->id_limit();
  for (const AddedToken& token : parts_.added_tokens) {
    if (token.id < 0 || token.id >= kMaxTokenIds) {
      return absl::InvalidArgumentError(
          absl::StrCat("the added token \"", token.content, "\" has the id ", token.id,
                       ", which is not from 0 to ", kMaxTokenIds - 1));
    }
    limit = std::max(limit, token.id + 1);
  }
  tokens_.resize(limit);
  special_.resize(limit);
  for (int32_t id = 0; id < parts_.model->id_limit(); ++id) {
    tokens_[id] = std::string(parts_.model->IdToToken(id));
  }
  *spelling = tokens_;
  Scratch scratch;
  for (const AddedToken& token : parts_.added_tokens) {
    if (token.content.empty()) continue;
    const std::optional<int32_t> known = TokenToId(token.content);
    std::string& slot = tokens_[token.id];
    if ((known.has_value() && *known != token.id) || (!slot.empty() && slot != token.content)) {
      return absl::InvalidArgumentError(
          absl::StrCat("the added token \"", token.content, "\" has the id ", token.id, ", but ",
                       known.has_value() ? absl::StrCat("the vocabulary has it as ", *known)
                                         : absl::StrCat("this id is that of \"", slot, "\"")));
    }
    slot = token.content;
    (*spelling)[token.id] = token.content;
    special_[token.id] = special_[token.id] || token.special;
    added_by_id_[token.id] = &token;
    if (!added_by_content_.emplace(token.content, &token).second) continue;
    if (!token.normalized) {
      matcher_.Add(token.content, &token);
      continue;
    }
    RESA_ASSIGN_OR_RETURN(const NormalizedText pattern,
                          parts_.normalizer.Apply(token.content, scratch.normalizer));
    if (pattern.text.empty()) {
      return absl::InvalidArgumentError(absl::StrCat("nothing is left of the added token \"",
                                                     token.content, "\" once it is normalised"));
    }
    normalized_matcher_.Add(pattern.text, &token);
    (*spelling)[token.id] = std::string(pattern.text);
  }
  for (const std::string& token : tokens_) {
    max_token_bytes_ = std::max(max_token_bytes_, token.size());
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> Tokenizer::Encode(absl::string_view text,
                                                       EncodeOptions options) const {
  RESA_RETURN_IF_ERROR(CheckSize(text.size()));
  ScratchLease lease(*this, text.size());
  Scratch& scratch = lease.get();
  std::vector<int32_t> ids;
  if (options.add_special_tokens) ids = parts_.prefix;
  RESA_RETURN_IF_ERROR(EncodeText(ValidText(text, &scratch.valid_text), /*at_origin=*/true,
                                  options.parse_special, scratch, &ids));
  if (options.add_special_tokens) {
    ids.insert(ids.end(), parts_.suffix.begin(), parts_.suffix.end());
  }
  return ids;
}

absl::StatusOr<std::vector<int32_t>> Tokenizer::EncodeParts(absl::Span<const Part> parts) const {
  size_t bytes = 0;
  for (const Part& part : parts) bytes += part.text.size();
  RESA_RETURN_IF_ERROR(CheckSize(bytes));
  ScratchLease lease(*this, bytes);
  Scratch& scratch = lease.get();
  // The added token at a position, which may swallow the white space beside it.
  const auto added_token = [&](size_t i) -> const AddedToken* {
    if (i >= parts.size() || !parts[i].token.has_value()) return nullptr;
    const auto it = added_by_id_.find(*parts[i].token);
    return it == added_by_id_.end() ? nullptr : it->second;
  };
  absl::flat_hash_set<int32_t> control_ids;
  for (const Part& part : parts) {
    if (part.token.has_value()) control_ids.insert(*part.token);
  }
  std::vector<int32_t> ids;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (parts[i].token.has_value()) {
      RESA_CHECK(IdToToken(*parts[i].token).has_value()) << "no token has this id";
      ids.push_back(*parts[i].token);
      continue;
    }
    absl::string_view text = ValidText(parts[i].text, &scratch.valid_text);
    const AddedToken* before = i > 0 ? added_token(i - 1) : nullptr;
    const AddedToken* after = added_token(i + 1);
    if (before != nullptr && before->rstrip) text = WithoutLeadingSpace(text);
    if (after != nullptr && after->lstrip) text = WithoutTrailingSpace(text);
    const size_t first = ids.size();
    RESA_RETURN_IF_ERROR(
        EncodeText(text, /*at_origin=*/i == 0, /*parse_special=*/false, scratch, &ids));
    for (size_t j = first; j < ids.size(); ++j) {
      const int32_t id = ids[j];
      const bool is_control =
          (IsSpecial(id) && id != parts_.model->unk_id()) || control_ids.contains(id);
      if (!is_control) continue;
      return absl::InvalidArgumentError(
          absl::StrCat("the text contains \"", *IdToToken(id),
                       "\", which this model's tokenizer cannot tell from a control token"));
    }
  }
  return ids;
}

absl::Status Tokenizer::EncodeText(absl::string_view text, bool at_origin, bool parse_special,
                                   Scratch& scratch, std::vector<int32_t>* ids) const {
  scratch.pieces.clear();
  matcher_.Split(text, parse_special, &scratch.pieces);
  for (const AddedTokenPiece& piece : scratch.pieces) {
    if (piece.token != nullptr) {
      ids->push_back(piece.token->id);
      continue;
    }
    const bool piece_at_origin = at_origin && piece.text.data() == text.data();
    RESA_RETURN_IF_ERROR(EncodePiece(piece.text, piece_at_origin, parse_special, scratch, ids));
  }
  return absl::OkStatus();
}

// Encodes text in which the added tokens that are not normalised have been found.
absl::Status Tokenizer::EncodePiece(absl::string_view text, bool at_origin, bool parse_special,
                                    Scratch& scratch, std::vector<int32_t>* ids) const {
  RESA_ASSIGN_OR_RETURN(const NormalizedText normalized,
                        parts_.normalizer.Apply(text, scratch.normalizer));
  scratch.normalized_pieces.clear();
  normalized_matcher_.Split(normalized.text, parse_special, &scratch.normalized_pieces);
  for (const AddedTokenPiece& piece : scratch.normalized_pieces) {
    if (piece.token != nullptr) {
      ids->push_back(piece.token->id);
      continue;
    }
    const bool piece_at_origin =
        at_origin && normalized.starts_at_origin && piece.text.data() == normalized.text.data();
    RESA_RETURN_IF_ERROR(parts_.pre_tokenizer.Run(piece.text, piece_at_origin,
                                                  scratch.pre_tokenizer, &scratch.words));
    for (const auto& [begin, end] : scratch.words.spans) {
      parts_.model->Encode(scratch.words.text.substr(begin, end - begin), scratch.bpe, ids);
    }
  }
  return absl::OkStatus();
}

std::string Tokenizer::Decode(absl::Span<const int32_t> ids, bool skip_special_tokens) const {
  std::string text;
  DecodeStream stream(&decoder_, SIZE_MAX);
  for (const int32_t id : ids) {
    if (skip_special_tokens && IsSpecial(id)) continue;
    stream.Push(id, &text);
  }
  stream.Finish(&text);
  return text;
}

bool Tokenizer::IsSpecial(int32_t id) const { return id >= 0 && id < vocab_size() && special_[id]; }

std::optional<int32_t> Tokenizer::TokenToId(absl::string_view token) const {
  if (const auto it = added_by_content_.find(token); it != added_by_content_.end()) {
    return it->second->id;
  }
  return parts_.model->TokenToId(token);
}

std::optional<absl::string_view> Tokenizer::IdToToken(int32_t id) const {
  if (id < 0 || id >= vocab_size() || tokens_[id].empty()) return std::nullopt;
  return tokens_[id];
}

}  // namespace resa::engine
