#include "engine/bpe.h"

#include <cstring>

#include "absl/hash/hash.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/status_macros.h"
#include "engine/utf8.h"
#include "kernels/check.h"

namespace resa::engine {
namespace {

constexpr bool StandsForItself(int byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

constexpr std::array<char32_t, 256> MakeByteLevelAlphabet() {
  std::array<char32_t, 256> alphabet{};
  char32_t next = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    alphabet[byte] = StandsForItself(byte) ? static_cast<char32_t>(byte) : next++;
  }
  return alphabet;
}

constexpr std::array<char32_t, 256> kByteLevelAlphabet = MakeByteLevelAlphabet();

std::string Shown(absl::string_view token) {
  return absl::StrCat("\"", token.substr(0, 64), token.size() > 64 ? "...\"" : "\"");
}

char32_t FirstCharacter(absl::string_view text) {
  size_t length = 0;
  return DecodeValid(text, &length);
}

char32_t LastCharacter(absl::string_view text) {
  return FirstCharacter(text.substr(text.size() - LastCharacterBytes(text)));
}

}  // namespace

char32_t ByteLevelCharacter(uint8_t byte) { return kByteLevelAlphabet[byte]; }

std::optional<std::string> ByteLevelBytes(absl::string_view token) {
  std::string bytes;
  for (size_t at = 0, length = 0; at < token.size(); at += length) {
    const char32_t c = DecodeValid(token.substr(at), &length);
    if (c < 0x100 && StandsForItself(static_cast<int>(c))) {
      bytes.push_back(static_cast<char>(c));
      continue;
    }
    // The others run from U+0100 through the bytes that don't stand for themselves: 0x00 to 0x20,
    // 0x7F to 0xA0, 0xAD.
    if (c < 0x100 || c > 0x143) return std::nullopt;
    const char32_t rank = c - 0x100;
    bytes.push_back(static_cast<char>(rank <= 0x20   ? rank
                                      : rank <= 0x42 ? 0x7F + (rank - 0x21)
                                                     : 0xAD));
  }
  return bytes;
}

std::optional<uint8_t> Bpe::FallbackByte(absl::string_view token) {
  if (token.size() != 6 || token.substr(0, 3) != "<0x" || token[5] != '>') return std::nullopt;
  int value = 0;
  for (const char c : token.substr(3, 2)) {
    if (c >= '0' && c <= '9') {
      value = value * 16 + (c - '0');
    } else if (c >= 'A' && c <= 'F') {
      value = value * 16 + (c - 'A' + 10);
    } else if (c >= 'a' && c <= 'f') {
      value = value * 16 + (c - 'a' + 10);
    } else {
      return std::nullopt;
    }
  }
  return static_cast<uint8_t>(value);
}

BpeScratch::BpeScratch() : cache_(kCachedWords) {}

absl::StatusOr<std::unique_ptr<const Bpe>> Bpe::Create(BpeConfig config) {
  std::unique_ptr<Bpe> bpe(new Bpe());
  bpe->fuse_unk_ = config.fuse_unk;
  bpe->byte_fallback_ = config.byte_fallback;
  bpe->ignore_merges_ = config.ignore_merges;
  bpe->byte_level_ = config.byte_level;
  RESA_RETURN_IF_ERROR(bpe->AddVocab(config));
  RESA_RETURN_IF_ERROR(bpe->AddMerges(config));
  bpe->PrepareCuts(config);
  return std::unique_ptr<const Bpe>(std::move(bpe));
}

absl::Status Bpe::AddVocab(BpeConfig& config) {
  int32_t limit = 0;
  for (const auto& [token, id] : config.vocab) {
    if (id < 0 || id >= kMaxTokenIds) {
      return absl::InvalidArgumentError(absl::StrCat("the token ", Shown(token), " has the id ", id,
                                                     ", which is not from 0 to ",
                                                     kMaxTokenIds - 1));
    }
    if (token.empty()) {
      return absl::InvalidArgumentError(absl::StrCat("the token with the id ", id, " is empty"));
    }
    limit = std::max(limit, id + 1);
  }
  tokens_.resize(limit);
  ids_.reserve(config.vocab.size());
  for (auto& [token, id] : config.vocab) {
    if (!tokens_[id].empty()) {
      return absl::InvalidArgumentError(absl::StrCat("the tokens ", Shown(tokens_[id]), " and ",
                                                     Shown(token), " share the id ", id));
    }
    tokens_[id] = std::move(token);
    if (!ids_.emplace(tokens_[id], id).second) {
      return absl::InvalidArgumentError(absl::StrCat("the token ", Shown(tokens_[id]),
                                                     " is there twice, as ", ids_.at(tokens_[id]),
                                                     " and as ", id));
    }
  }
  if (config.unk_token.has_value()) {
    unk_id_ = TokenToId(*config.unk_token);
    if (!unk_id_.has_value()) {
      return absl::InvalidArgumentError(absl::StrCat("the unknown token ", Shown(*config.unk_token),
                                                     " is not in the vocabulary"));
    }
  }
  ascii_ids_.fill(-1);
  byte_ids_.fill(-1);
  for (int32_t id = 0; id < limit; ++id) {
    const std::string& token = tokens_[id];
    if (token.empty()) continue;
    if (!IsValidUtf8(token)) {
      return absl::InvalidArgumentError(
          absl::StrCat("the token with the id ", id, " is not valid UTF-8"));
    }
    size_t length = 0;
    const char32_t c = DecodeValid(token, &length);
    if (length == token.size()) {
      if (c < 128) {
        ascii_ids_[c] = id;
      } else {
        character_ids_.emplace(c, id);
      }
    }
    if (byte_level_ && ignore_merges_) {
      if (std::optional<std::string> bytes = ByteLevelBytes(token)) {
        byte_words_.emplace(*std::move(bytes), id);
      }
    }
  }
  for (int byte = 0; byte < 256; ++byte) {
    if (byte_level_) {
      byte_ids_[byte] = CharacterId(ByteLevelCharacter(static_cast<uint8_t>(byte)));
    } else if (byte_fallback_) {
      byte_ids_[byte] = TokenToId(absl::StrFormat("<0x%02X>", byte)).value_or(-1);
    }
  }
  return absl::OkStatus();
}

absl::Status Bpe::AddMerges(const BpeConfig& config) {
  merges_.Reset(config.merges.size());
  std::string joined;
  for (size_t rank = 0; rank < config.merges.size(); ++rank) {
    const auto& [left, right] = config.merges[rank];
    joined = left + right;
    const std::optional<int32_t> left_id = TokenToId(left);
    const std::optional<int32_t> right_id = TokenToId(right);
    const std::optional<int32_t> result = TokenToId(joined);
    for (const auto& [id, token] : {std::pair(left_id, absl::string_view(left)),
                                    std::pair(right_id, absl::string_view(right)),
                                    std::pair(result, absl::string_view(joined))}) {
      if (id.has_value()) continue;
      return absl::InvalidArgumentError(
          absl::StrCat("merge ", rank, " of ", Shown(left), " and ", Shown(right),
                       " needs the token ", Shown(token), ", which is not in the vocabulary"));
    }
    merges_.Add(*left_id, *right_id, {static_cast<uint32_t>(rank), *result});
  }
  return absl::OkStatus();
}

// Every merge joins two tokens at a place between two characters: the last of the left token and
// the first of the right one. So no merge ever reaches across a place between two characters that
// no merge joins. This holds as long as the symbols are characters: byte and unknown tokens are
// not.
void Bpe::PrepareCuts(const BpeConfig& config) {
  can_cut_ = !byte_level_ && !ignore_merges_;
  for (const auto& [left, right] : config.merges) {
    if (!can_cut_) return;
    for (const absl::string_view token : {absl::string_view(left), absl::string_view(right)}) {
      const bool is_byte = byte_fallback_ && FallbackByte(token).has_value();
      if (is_byte || TokenToId(token) == unk_id_) can_cut_ = false;
    }
    const int32_t last = CharacterId(LastCharacter(left));
    const int32_t first = CharacterId(FirstCharacter(right));
    if (last >= 0 && first >= 0) joinable_.emplace(last, first);
  }
}

std::optional<int32_t> Bpe::TokenToId(absl::string_view token) const {
  const auto it = ids_.find(token);
  if (it == ids_.end()) return std::nullopt;
  return it->second;
}

absl::string_view Bpe::IdToToken(int32_t id) const {
  if (id < 0 || id >= id_limit()) return {};
  return tokens_[id];
}

int32_t Bpe::CharacterId(char32_t c) const {
  if (c < 128) return ascii_ids_[c];
  const auto it = character_ids_.find(c);
  return it == character_ids_.end() ? -1 : it->second;
}

void Bpe::Encode(absl::string_view word, BpeScratch& scratch, std::vector<int32_t>* ids) const {
  if (word.empty()) return;
  if (ignore_merges_) {
    if (byte_level_) {
      if (const auto it = byte_words_.find(word); it != byte_words_.end()) {
        ids->push_back(it->second);
        return;
      }
    } else if (const std::optional<int32_t> id = TokenToId(word)) {
      ids->push_back(*id);
      return;
    }
  }
  if (!can_cut_) {
    EncodeCached(word, scratch, ids);
    return;
  }
  size_t begin = 0;
  int32_t previous = -1;
  for (size_t at = 0, length = 0; at < word.size(); at += length) {
    const int32_t id = CharacterId(DecodeValid(word.substr(at), &length));
    if (at > begin && previous >= 0 && id >= 0 && !MayJoin(previous, id)) {
      EncodeCached(word.substr(begin, at - begin), scratch, ids);
      begin = at;
    }
    previous = id;
  }
  EncodeCached(word.substr(begin), scratch, ids);
}

void Bpe::EncodeCached(absl::string_view word, BpeScratch& scratch,
                       std::vector<int32_t>* ids) const {
  using CachedWord = BpeScratch::CachedWord;
  CachedWord* entry = nullptr;
  if (word.size() <= CachedWord::kMaxBytes) {
    entry = &scratch.cache_[absl::HashOf(word) % BpeScratch::kCachedWords];
    if (entry->bytes == word.size() && std::memcmp(entry->word, word.data(), word.size()) == 0) {
      ids->insert(ids->end(), entry->ids, entry->ids + entry->tokens);
      return;
    }
  }
  std::vector<int32_t>& symbols = scratch.symbols_;
  InitialSymbols(word, &symbols);
  scratch.merger_.Merge(merges_, &symbols);
  ids->insert(ids->end(), symbols.begin(), symbols.end());
  if (entry != nullptr && symbols.size() <= CachedWord::kMaxTokens) {
    entry->bytes = static_cast<uint8_t>(word.size());
    entry->tokens = static_cast<uint8_t>(symbols.size());
    std::memcpy(entry->word, word.data(), word.size());
    std::copy(symbols.begin(), symbols.end(), entry->ids);
  }
}

// An unknown token waits until the next known character, so that its neighbours can join it; a
// character that falls back to bytes does not end the wait (as in the library).
void Bpe::InitialSymbols(absl::string_view word, std::vector<int32_t>* symbols) const {
  symbols->clear();
  bool unknown_waits = false;
  size_t length = 1;
  for (size_t at = 0; at < word.size(); at += length) {
    int32_t id = -1;
    if (byte_level_) {
      id = byte_ids_[static_cast<uint8_t>(word[at])];
    } else {
      id = CharacterId(DecodeValid(word.substr(at), &length));
    }
    if (id >= 0) {
      if (unknown_waits) symbols->push_back(*unk_id_);
      unknown_waits = false;
      symbols->push_back(id);
      continue;
    }
    if (byte_fallback_ && !byte_level_) {
      bool all_bytes = true;
      for (const char c : word.substr(at, length)) {
        all_bytes = all_bytes && byte_ids_[static_cast<uint8_t>(c)] >= 0;
      }
      if (all_bytes) {
        for (const char c : word.substr(at, length)) {
          symbols->push_back(byte_ids_[static_cast<uint8_t>(c)]);
        }
        continue;
      }
    }
    if (!unk_id_.has_value()) continue;
    if (unknown_waits && !fuse_unk_) symbols->push_back(*unk_id_);
    unknown_waits = true;
  }
  if (unknown_waits) symbols->push_back(*unk_id_);
}

}  // namespace resa::engine
