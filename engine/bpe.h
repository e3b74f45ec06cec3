#ifndef RESA_ENGINE_BPE_H_
#define RESA_ENGINE_BPE_H_

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "engine/bpe_merge_table.h"

namespace resa::engine {

// No vocabulary has an id at or above this; ids index vectors.
inline constexpr int32_t kMaxTokenIds = 1 << 21;

// The 256 characters that stand for bytes in byte-level vocabularies (GPT-2's alphabet): printable
// Latin-1 characters for themselves, U+0100 and up for the rest, in order.
char32_t ByteLevelCharacter(uint8_t byte);
// The bytes that a byte-level token stands for; nullopt when a character is not of the alphabet.
std::optional<std::string> ByteLevelBytes(absl::string_view token);

struct BpeConfig {
  std::vector<std::pair<std::string, int32_t>> vocab;       // Token and id, in any order.
  std::vector<std::pair<std::string, std::string>> merges;  // Best first.
  std::optional<std::string> unk_token;
  bool fuse_unk = false;       // Neighbouring unknown characters become one unknown token.
  bool byte_fallback = false;  // An unknown character becomes its bytes' tokens, "<0x0A>".
  bool ignore_merges = false;  // A word that is a token is that token, whatever the merges say.
  bool byte_level = false;     // Words are plain bytes; tokens are spelt in GPT-2's alphabet.
};

// Buffers and a cache of words for calls of Bpe::Encode, always of the same Bpe. Not shared by
// threads. About 1 MiB.
class BpeScratch {
 public:
  BpeScratch();

 private:
  friend class Bpe;
  // One word and its tokens, one cache line. A newer word takes the place of an older one.
  struct CachedWord {
    static constexpr size_t kMaxBytes = 30;
    static constexpr size_t kMaxTokens = 8;
    uint8_t bytes = 0;  // 0: empty entry.
    uint8_t tokens = 0;
    char word[kMaxBytes];
    int32_t ids[kMaxTokens];
  };
  static constexpr size_t kCachedWords = 1 << 14;

  std::vector<CachedWord> cache_;
  std::vector<int32_t> symbols_;
  BpeMerger merger_;
};

// Byte pair encoding as the `tokenizers` library does it: a word is cut into characters (or bytes),
// and the neighbouring pair of best rank, leftmost first, is merged until none can be.
// Immutable and thread-safe.
class Bpe {
 public:
  // INVALID_ARGUMENT: an id out of range or used twice, a merge of tokens that don't exist or whose
  // result doesn't, an unknown token that doesn't exist.
  static absl::StatusOr<std::unique_ptr<const Bpe>> Create(BpeConfig config);

  // Appends the tokens of one word. O(n log n) in its bytes; a text of any length without a
  // possible cut is one word. Characters that the vocabulary cannot express and that have no
  // unknown token vanish, as in the library.
  // REQUIRES valid UTF-8 unless byte-level.
  void Encode(absl::string_view word, BpeScratch& scratch, std::vector<int32_t>* ids) const;

  std::optional<int32_t> TokenToId(absl::string_view token) const;
  // Empty for ids that are not in the vocabulary.
  absl::string_view IdToToken(int32_t id) const;
  // Largest id + 1.
  int32_t id_limit() const { return static_cast<int32_t>(tokens_.size()); }
  bool byte_level() const { return byte_level_; }
  bool byte_fallback() const { return byte_fallback_; }
  std::optional<int32_t> unk_id() const { return unk_id_; }
  // The byte that this token stands for, when the vocabulary falls back to bytes and it is one of
  // those tokens.
  static std::optional<uint8_t> FallbackByte(absl::string_view token);

 private:
  Bpe() = default;
  absl::Status AddVocab(BpeConfig& config);
  absl::Status AddMerges(const BpeConfig& config);
  void PrepareCuts(const BpeConfig& config);

  int32_t CharacterId(char32_t c) const;
  void EncodeCached(absl::string_view word, BpeScratch& scratch, std::vector<int32_t>* ids) const;
  void InitialSymbols(absl::string_view word, std::vector<int32_t>* symbols) const;
  bool MayJoin(int32_t left, int32_t right) const {
    return joinable_.contains(std::pair(left, right));
  }

  std::vector<std::string> tokens_;                      // By id; empty where there is none.
  absl::flat_hash_map<absl::string_view, int32_t> ids_;  // Views into tokens_.
  // Plain bytes of every byte-level token; filled only when whole words are looked up.
  absl::flat_hash_map<std::string, int32_t> byte_words_;
  BpeMergeTable merges_;
  // Ids of single characters, -1 where there is none: ASCII, and the others.
  std::array<int32_t, 128> ascii_ids_;
  absl::flat_hash_map<char32_t, int32_t> character_ids_;
  // Byte-level: the byte's token; with byte_fallback: its "<0xNN>" token. -1 where there is none.
  std::array<int32_t, 256> byte_ids_;
  // Pairs of characters (as ids) that some merge brings together: everywhere else between two known
  // characters a word can be cut in two without changing its tokens.
  absl::flat_hash_set<std::pair<int32_t, int32_t>> joinable_;
  bool can_cut_ = false;
  std::optional<int32_t> unk_id_;
  bool fuse_unk_ = false;
  bool byte_fallback_ = false;
  bool ignore_merges_ = false;
  bool byte_level_ = false;
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_BPE_H_
