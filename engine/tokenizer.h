#ifndef RESA_ENGINE_TOKENIZER_H_
#define RESA_ENGINE_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "engine/added_tokens.h"
#include "engine/bpe.h"
#include "engine/gguf_vocab.h"
#include "engine/normalizer.h"
#include "engine/pre_tokenizer.h"
#include "engine/token_decoder.h"

namespace resa::engine {

// What a tokenizer is made of; the loaders fill it (tokenizer_json.cc, tokenizer_gguf.cc).
struct TokenizerParts {
  std::unique_ptr<const Bpe> model;
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  std::vector<AddedToken> added_tokens;
  TokenDecoderConfig decoder;
  std::vector<int32_t> prefix;  // Special tokens that Encode puts around a text, such as BOS.
  std::vector<int32_t> suffix;
  std::optional<int32_t> bos_id;
  std::optional<int32_t> eos_id;
  std::string chat_template;
};

// From text to tokens and back, identical to the `tokenizers` library (PyPI, 0.23) for byte pair
// encoding: byte-level (GPT-2, Qwen, Llama 3, SmolLM) and SentencePiece-style with byte fallback
// (Llama 2, Mistral).
//
// A text goes this way: ill-formed UTF-8 becomes U+FFFD; added tokens that are not normalised are
// cut out; the pieces between are normalised; added tokens that are normalised are cut out; the
// pieces between are split into words (pre-tokenized); each word is merged (engine/bpe.h); special
// tokens such as BOS go around the whole.
//
// Truncation and padding settings of tokenizer.json do not apply: a server does neither. All
// else that is in the file and not implemented is refused when loading, by name.
//
// Immutable and thread-safe. Calls borrow their buffers from a pool inside, which grows to as many
// (about 2 MiB each) as calls ever ran at once; a text beyond kPooledTextBytes gets its own.
class Tokenizer {
 public:
  static constexpr size_t kPooledTextBytes = size_t{256} << 10;
  // Texts and files beyond these are refused.
  static constexpr size_t kMaxTextBytes = size_t{256} << 20;
  static constexpr size_t kMaxFileBytes = size_t{256} << 20;

  // Reads tokenizer.json and, where they exist, tokenizer_config.json (BOS and EOS, chat template)
  // and chat_template.jinja (which takes precedence over the template in the former).
  // NOT_FOUND without a tokenizer.json, INVALID_ARGUMENT with file and field when something in them
  // is wrong or not supported.
  static absl::StatusOr<std::unique_ptr<const Tokenizer>> FromDirectory(
      const std::string& model_dir);
  // The same from memory. `tokenizer_config_json` may be empty.
  static absl::StatusOr<std::unique_ptr<const Tokenizer>> FromJson(
      absl::string_view tokenizer_json, absl::string_view tokenizer_config_json);
  // INVALID_ARGUMENT with the metadata key when something is wrong or not supported.
  static absl::StatusOr<std::unique_ptr<const Tokenizer>> FromGguf(const GgufVocab& vocab);

  // INVALID_ARGUMENT when ids of the parts are not in the vocabulary or contradict it.
  static absl::StatusOr<std::unique_ptr<const Tokenizer>> FromParts(TokenizerParts parts);

  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;
  ~Tokenizer();

  struct EncodeOptions {
    // Put the tokenizer's special tokens (BOS) around the text.
    bool add_special_tokens = true;
    // Recognise special tokens in the text. False: "<|im_end|>" is text like any other, so user
    // text cannot pretend to be a control token. Added tokens that are not special are found either
    // way.
    bool parse_special = true;
  };
  // INVALID_ARGUMENT for a text beyond kMaxTextBytes; RESOURCE_EXHAUSTED when a pattern of the
  // tokenizer needs too much work on it. Never for what the text says.
  absl::StatusOr<std::vector<int32_t>> Encode(absl::string_view text, EncodeOptions options) const;
  absl::StatusOr<std::vector<int32_t>> Encode(absl::string_view text) const {
    return Encode(text, EncodeOptions());
  }

  // One part of a prompt put together by us: a token, or text in which special tokens are text.
  struct Part {
    std::optional<int32_t> token;
    absl::string_view text;  // When there is no token.
  };
  // Encodes the parts as if they were one text whose special tokens had been found. Puts nothing
  // around them. Errors as Encode; INVALID_ARGUMENT too when text would yield a token of the other
  // parts, or a special one other than the unknown token: no content can forge a control token.
  // REQUIRES ids of the vocabulary.
  absl::StatusOr<std::vector<int32_t>> EncodeParts(absl::Span<const Part> parts) const;

  // Valid UTF-8 whatever the ids (token_decoder.h says what becomes of ill-formed bytes). Ids
  // outside the vocabulary are skipped. Special tokens are known by their ids, so one that is
  // normalised is skipped, too (the library, which compares spellings, keeps it).
  std::string Decode(absl::Span<const int32_t> ids, bool skip_special_tokens) const;

  // The longest spelling in the vocabulary. No token stands for more bytes of text, the unknown
  // token and those that swallow white space apart.
  size_t max_token_bytes() const { return max_token_bytes_; }
  // Largest id + 1. A model's logits may have more columns than that, never fewer.
  int32_t vocab_size() const { return static_cast<int32_t>(tokens_.size()); }
  std::optional<int32_t> bos_id() const { return parts_.bos_id; }
  std::optional<int32_t> eos_id() const { return parts_.eos_id; }
  // True for special added tokens; false for ids outside the vocabulary.
  bool IsSpecial(int32_t id) const;
  std::optional<int32_t> TokenToId(absl::string_view token) const;
  // The token as the vocabulary spells it ("Ġthe"); nullopt when no token has this id.
  std::optional<absl::string_view> IdToToken(int32_t id) const;
  // The Jinja source of the chat template; empty when there is none.
  const std::string& chat_template() const { return parts_.chat_template; }
  const TokenDecoder& decoder() const { return decoder_; }

 private:
  struct Scratch;
  class ScratchLease;

  explicit Tokenizer(TokenizerParts parts);
  absl::Status AddTokens(std::vector<std::string>* spelling);
  absl::Status EncodeText(absl::string_view text, bool at_origin, bool parse_special,
                          Scratch& scratch, std::vector<int32_t>* ids) const;
  absl::Status EncodePiece(absl::string_view text, bool at_origin, bool parse_special,
                           Scratch& scratch, std::vector<int32_t>* ids) const;

  TokenizerParts parts_;
  std::vector<std::string> tokens_;  // By id: the model's, overlaid by the added ones.
  std::vector<bool> special_;        // By id.
  size_t max_token_bytes_ = 0;
  absl::flat_hash_map<absl::string_view, const AddedToken*> added_by_content_;
  absl::flat_hash_map<int32_t, const AddedToken*> added_by_id_;
  AddedTokenMatcher matcher_;             // Of the raw text.
  AddedTokenMatcher normalized_matcher_;  // Of the normalised text.
  TokenDecoder decoder_;

  mutable absl::Mutex mutex_;
  mutable std::vector<std::unique_ptr<Scratch>> idle_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_TOKENIZER_H_
