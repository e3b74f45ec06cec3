#ifndef RESA_ENGINE_TOKEN_DECODER_H_
#define RESA_ENGINE_TOKEN_DECODER_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace resa::engine {

// How tokens become text; the names are those of tokenizer.json. The supported decoders are, in
// this order, each optional:
//   1. per-token steps: Replace (a literal), Strip, Metaspace
//   2. ByteFallback: runs of byte tokens become the characters they spell
//   3. Fuse, then one Strip at the beginning of the whole text
// or ByteLevel alone, or none (tokens joined by spaces).
struct TokenDecoderConfig {
  struct Step {
    enum class Kind : uint8_t { kReplace, kStrip, kMetaspace };
    Kind kind;
    std::string pattern{};  // kReplace; kStrip and kMetaspace: the one character.
    std::string content{};  // kReplace
    int64_t start = 0;      // kStrip: how many at most, at the front and at the end of the token.
    int64_t stop = 0;
    bool drop_first = false;  // kMetaspace: the first token's replacements vanish.
  };
  enum class Kind : uint8_t { kByteLevel, kSteps, kNone };
  Kind kind = Kind::kNone;
  std::vector<Step> steps;
  bool byte_fallback = false;
  std::string strip_text;        // One character, removed from the front of the whole text
  int64_t strip_text_count = 0;  // at most so many times.
};

// The text of every token, worked out once. Immutable and thread-safe.
class TokenDecoder {
 public:
  TokenDecoder() = default;
  // `tokens` by id; an empty one is no token and decodes to nothing.
  // REQUIRES valid UTF-8 in `tokens`.
  TokenDecoder(TokenDecoderConfig config, const std::vector<std::string>& tokens);

 private:
  friend class DecodeStream;
  struct Piece {
    uint32_t offset = 0;  // Into bytes_.
    uint32_t length = 0;
    // As the first token of a text; differs from the other for Metaspace only.
    uint32_t first_offset = 0;
    uint32_t first_length = 0;
    bool exists = false;
    bool is_fallback_byte = false;  // One byte of a character.
  };
  absl::string_view Text(const Piece& piece, bool first) const {
    const absl::string_view bytes(bytes_);
    return first ? bytes.substr(piece.first_offset, piece.first_length)
                 : bytes.substr(piece.offset, piece.length);
  }

  TokenDecoderConfig config_;
  std::string bytes_;
  std::vector<Piece> pieces_;  // By id.
};

// Decodes one text token by token. What it has given out never changes: bytes of a split character
// wait for the rest. Single-threaded; `decoder` outlives it.
//
// Ill-formed bytes become U+FFFD as in the `tokenizers` library: with ByteLevel one per maximal
// ill-formed subpart; with ByteFallback one per byte of the whole run of byte tokens, valid
// characters of the run included. So such a run waits until it ends, but no longer than
// kMaxHeldBytes: then its characters are given out, and if ill-formed bytes follow, only the rest
// of the run is replaced.
class DecodeStream {
 public:
  static constexpr size_t kMaxHeldBytes = 256;

  // `max_held_bytes`: kMaxHeldBytes where text should flow, SIZE_MAX where only the whole counts.
  DecodeStream(const TokenDecoder* decoder, size_t max_held_bytes);

  // Appends the text that `id` completes. Ids outside the vocabulary are skipped.
  void Push(int32_t id, std::string* out);
  // Appends what was waiting; nothing may be pushed afterwards.
  void Finish(std::string* out);

 private:
  void PushByteLevel(absl::string_view bytes, std::string* out);
  void PushFallbackByte(char byte, std::string* out);
  void FlushRun(std::string* out);
  // Appends whole text, minus what is stripped from the front.
  void Emit(absl::string_view text, std::string* out);

  const TokenDecoder* decoder_;
  const size_t max_held_bytes_;
  std::string held_;                // ByteLevel: part of a character. ByteFallback: the open run.
  size_t held_valid_ = 0;           // ByteFallback: bytes of held_ that are whole characters.
  bool run_is_ill_formed_ = false;  // ByteFallback: the open run's bytes are replaced.
  int64_t strip_left_ = 0;          // Characters that may still be stripped.
  bool first_ = true;
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_TOKEN_DECODER_H_
