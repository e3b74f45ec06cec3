#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "engine/status_macros.h"
#include "engine/tokenizer.h"
#include "engine/tokenizer_patterns.h"
#include "engine/utf8.h"

namespace resa::engine {
namespace {

absl::Status Error(absl::string_view key, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("GGUF metadata tokenizer.ggml.", key, ": ", what));
}

// What a name in tokenizer.ggml.pre stands for: the tokenizer.json that the model came with.
struct NamedPreTokenizer {
  absl::string_view name;
  absl::string_view pattern;  // Split by it; empty: GPT-2's, after `digits`.
  bool digits;                // Every digit is a word.
  bool nfc;
  bool ignore_merges;
  bool add_bos;  // Unless the file says otherwise.
};

constexpr NamedPreTokenizer kPreTokenizers[] = {
    {"gpt-2", "", false, false, false, false},
    {"smollm", "", true, false, false, false},
    {"starcoder", "", true, false, false, false},
    {"qwen2", kQwen2Pattern, false, true, false, false},
    {"deepseek-r1-qwen", kQwen2Pattern, false, true, false, false},
    {"llama-bpe", kLlama3Pattern, false, false, true, true},
    {"llama3", kLlama3Pattern, false, false, true, true},
    {"llama-v3", kLlama3Pattern, false, false, true, true},
    {"tekken", kTekkenPattern, false, false, true, true},
};

absl::StatusOr<NamedPreTokenizer> FindPreTokenizer(const std::string& name) {
  std::string known;
  for (const NamedPreTokenizer& entry : kPreTokenizers) {
    if (entry.name == name) return entry;
    absl::StrAppend(&known, known.empty() ? "" : ", ", entry.name);
  }
  return Error("pre", absl::StrCat("\"", name, "\" is not supported; supported are ", known));
}

absl::Status CheckTokens(const GgufVocab& vocab) {
  if (vocab.tokens.empty()) return Error("tokens", "is missing or empty");
  if (vocab.tokens.size() > static_cast<size_t>(kMaxTokenIds)) {
    return Error("tokens", absl::StrCat("has more than ", kMaxTokenIds, " tokens"));
  }
  if (!vocab.token_types.empty() && vocab.token_types.size() != vocab.tokens.size()) {
    return Error("token_type", absl::StrCat("has ", vocab.token_types.size(), " entries for ",
                                            vocab.tokens.size(), " tokens"));
  }
  for (size_t id = 0; id < vocab.tokens.size(); ++id) {
    if (!IsValidUtf8(vocab.tokens[id])) {
      return Error("tokens", absl::StrCat("token ", id, " is not valid UTF-8"));
    }
  }
  const std::pair<const char*, std::optional<int32_t>> ids[] = {{"bos_token_id", vocab.bos_id},
                                                                {"eos_token_id", vocab.eos_id},
                                                                {"unknown_token_id", vocab.unk_id},
                                                                {"padding_token_id", vocab.pad_id}};
  for (const auto& [key, id] : ids) {
    if (id.has_value() && (*id < 0 || static_cast<size_t>(*id) >= vocab.tokens.size())) {
      return Error(key, absl::StrCat(*id, " is not the id of a token"));
    }
  }
  return absl::OkStatus();
}

int32_t TypeOfToken(const GgufVocab& vocab, size_t id) {
  return vocab.token_types.empty() ? GgufVocab::kNormal : vocab.token_types[id];
}

std::vector<AddedToken> AddedTokens(const GgufVocab& vocab) {
  std::vector<AddedToken> added;
  for (size_t id = 0; id < vocab.tokens.size(); ++id) {
    const int32_t type = TypeOfToken(vocab, id);
    const bool special = type == GgufVocab::kControl || type == GgufVocab::kUnknown;
    if (!special && type != GgufVocab::kUserDefined) continue;
    AddedToken token;
    token.id = static_cast<int32_t>(id);
    token.content = vocab.tokens[id];
    token.special = special;
    added.push_back(std::move(token));
  }
  return added;
}

void FillVocab(const GgufVocab& vocab, BpeConfig* config) {
  config->vocab.reserve(vocab.tokens.size());
  for (size_t id = 0; id < vocab.tokens.size(); ++id) {
    if (vocab.tokens[id].empty()) continue;
    config->vocab.emplace_back(vocab.tokens[id], static_cast<int32_t>(id));
  }
}

absl::Status FillMerges(const GgufVocab& vocab, BpeConfig* config) {
  config->merges.reserve(vocab.merges.size());
  for (size_t i = 0; i < vocab.merges.size(); ++i) {
    const std::string& merge = vocab.merges[i];
    // Tokens have no space within, so the one space that is not at the front separates them.
    const size_t space = merge.find(' ', 1);
    if (space == std::string::npos || space + 1 == merge.size()) {
      return Error("merges", absl::StrCat("entry ", i, " is not two tokens"));
    }
    config->merges.emplace_back(merge.substr(0, space), merge.substr(space + 1));
  }
  return absl::OkStatus();
}

// SentencePiece's BPE merges the pair whose result has the best score. As a list of merges: every
// way to put a token together from two others, by falling score; for equal scores the order that
// Hugging Face's conversion gives them (longer left part first, then smaller ids).
absl::Status MergesFromScores(const GgufVocab& vocab, BpeConfig* config) {
  if (vocab.scores.size() != vocab.tokens.size()) {
    return Error("scores", absl::StrCat("has ", vocab.scores.size(), " entries for ",
                                        vocab.tokens.size(), " tokens"));
  }
  absl::flat_hash_map<absl::string_view, int32_t> ids;
  for (size_t id = 0; id < vocab.tokens.size(); ++id) {
    if (TypeOfToken(vocab, id) != GgufVocab::kNormal) continue;
    // A NaN has no place in an order.
    if (vocab.scores[id] != vocab.scores[id]) {
      return Error("scores", absl::StrCat("the score of token ", id, " is not a number"));
    }
    ids.emplace(vocab.tokens[id], static_cast<int32_t>(id));
  }
  struct Candidate {
    float score;
    int32_t left_characters;
    int32_t left;
    int32_t right;
    bool operator<(const Candidate& other) const {
      return std::tie(other.score, other.left_characters, left, right) <
             std::tie(score, left_characters, other.left, other.right);
    }
  };
  std::vector<Candidate> candidates;
  for (const auto& [token, id] : ids) {
    int32_t characters = 0;
    for (size_t at = 0, length = 0; at < token.size(); at += length, ++characters) {
      DecodeValid(token.substr(at), &length);
      if (at == 0) continue;
      const auto left = ids.find(token.substr(0, at));
      const auto right = ids.find(token.substr(at));
      if (left == ids.end() || right == ids.end()) continue;
      candidates.push_back({vocab.scores[id], characters, left->second, right->second});
    }
  }
  std::sort(candidates.begin(), candidates.end());
  config->merges.reserve(candidates.size());
  for (const Candidate& candidate : candidates) {
    config->merges.emplace_back(vocab.tokens[candidate.left], vocab.tokens[candidate.right]);
  }
  return absl::OkStatus();
}

absl::Status FillByteLevel(const GgufVocab& vocab, TokenizerParts* parts, BpeConfig* config,
                           bool* add_bos) {
  RESA_ASSIGN_OR_RETURN(const NamedPreTokenizer pre, FindPreTokenizer(vocab.pre));
  RESA_RETURN_IF_ERROR(FillMerges(vocab, config));
  config->byte_level = true;
  config->ignore_merges = pre.ignore_merges;
  *add_bos = pre.add_bos;
  if (pre.nfc) parts->normalizer = Normalizer({{.kind = NormalizerStep::Kind::kNfc}});
  std::vector<PreTokenizerStep> steps;
  if (pre.digits) {
    steps.push_back({.kind = PreTokenizerStep::Kind::kDigits});
    steps.back().individual_digits = true;
  }
  RESA_ASSIGN_OR_RETURN(std::shared_ptr<const Regex> regex,
                        Regex::Compile(pre.pattern.empty() ? kGpt2Pattern : pre.pattern));
  steps.push_back({.kind = PreTokenizerStep::Kind::kByteLevel});
  steps.back().regex = std::move(regex);
  parts->pre_tokenizer = PreTokenizer(std::move(steps));
  parts->decoder.kind = TokenDecoderConfig::Kind::kByteLevel;
  return absl::OkStatus();
}

absl::Status FillSentencePiece(const GgufVocab& vocab, TokenizerParts* parts, BpeConfig* config) {
  config->byte_fallback = true;
  config->fuse_unk = true;
  if (vocab.unk_id.has_value()) config->unk_token = vocab.tokens[*vocab.unk_id];
  if (vocab.merges.empty()) {
    RESA_RETURN_IF_ERROR(MergesFromScores(vocab, config));
  } else {
    RESA_RETURN_IF_ERROR(FillMerges(vocab, config));
  }
  const bool add_space = vocab.add_space_prefix.value_or(true);
  const std::string space(kSentencePieceSpace);
  std::vector<NormalizerStep> steps;
  if (add_space) {
    steps.push_back({.kind = NormalizerStep::Kind::kPrepend});
    steps.back().content = space;
  }
  steps.push_back({.kind = NormalizerStep::Kind::kReplace});
  steps.back().pattern = " ";
  steps.back().content = space;
  parts->normalizer = Normalizer(std::move(steps));
  parts->decoder.kind = TokenDecoderConfig::Kind::kSteps;
  parts->decoder.steps.push_back(
      {.kind = TokenDecoderConfig::Step::Kind::kReplace, .pattern = space, .content = " "});
  parts->decoder.byte_fallback = true;
  if (add_space) {
    parts->decoder.strip_text = " ";
    parts->decoder.strip_text_count = 1;
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<const Tokenizer>> Tokenizer::FromGguf(const GgufVocab& vocab) {
  RESA_RETURN_IF_ERROR(CheckTokens(vocab));
  TokenizerParts parts;
  BpeConfig config;
  FillVocab(vocab, &config);
  bool add_bos = false;
  if (vocab.model == "gpt2") {
    RESA_RETURN_IF_ERROR(FillByteLevel(vocab, &parts, &config, &add_bos));
  } else if (vocab.model == "llama") {
    add_bos = true;
    RESA_RETURN_IF_ERROR(FillSentencePiece(vocab, &parts, &config));
  } else {
    return Error("model", absl::StrCat("\"", vocab.model,
                                       "\" is not supported; supported are gpt2 and llama"));
  }
  parts.added_tokens = AddedTokens(vocab);
  parts.bos_id = vocab.bos_id;
  parts.eos_id = vocab.eos_id;
  parts.chat_template = vocab.chat_template;
  if (vocab.add_bos.value_or(add_bos)) {
    if (!vocab.bos_id.has_value()) return Error("bos_token_id", "is missing, but is to be added");
    parts.prefix.push_back(*vocab.bos_id);
  }
  if (vocab.add_eos.value_or(false)) {
    if (!vocab.eos_id.has_value()) return Error("eos_token_id", "is missing, but is to be added");
    parts.suffix.push_back(*vocab.eos_id);
  }
  absl::StatusOr<std::unique_ptr<const Bpe>> model = Bpe::Create(std::move(config));
  if (!model.ok()) return Error("tokens", model.status().message());
  parts.model = *std::move(model);
  return FromParts(std::move(parts));
}

}  // namespace resa::engine
