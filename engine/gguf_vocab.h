#ifndef RESA_ENGINE_GGUF_VOCAB_H_
#define RESA_ENGINE_GGUF_VOCAB_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace resa::engine {

// The `tokenizer.*` metadata of a GGUF file, as read: engine/gguf.h fills it, Tokenizer::FromGguf
// consumes and validates it. Nothing here is trusted: lists may disagree in length and ids may be
// out of range.
struct GgufVocab {
  // Values of tokenizer.ggml.token_type.
  static constexpr int32_t kNormal = 1;
  static constexpr int32_t kUnknown = 2;
  static constexpr int32_t kControl = 3;
  static constexpr int32_t kUserDefined = 4;
  static constexpr int32_t kUnused = 5;
  static constexpr int32_t kByte = 6;

  std::string model;                 // tokenizer.ggml.model: "gpt2" or "llama"
  std::string pre;                   // tokenizer.ggml.pre: "smollm", "qwen2", "llama-bpe", ...
  std::vector<std::string> tokens;   // tokenizer.ggml.tokens, indexed by token id
  std::vector<float> scores;         // tokenizer.ggml.scores; empty when the file has none
  std::vector<int32_t> token_types;  // tokenizer.ggml.token_type; empty when the file has none
  std::vector<std::string> merges;   // tokenizer.ggml.merges, "left right", best first

  std::optional<int32_t> bos_id;         // tokenizer.ggml.bos_token_id
  std::optional<int32_t> eos_id;         // tokenizer.ggml.eos_token_id
  std::optional<int32_t> unk_id;         // tokenizer.ggml.unknown_token_id
  std::optional<int32_t> pad_id;         // tokenizer.ggml.padding_token_id
  std::optional<bool> add_bos;           // tokenizer.ggml.add_bos_token
  std::optional<bool> add_eos;           // tokenizer.ggml.add_eos_token
  std::optional<bool> add_space_prefix;  // tokenizer.ggml.add_space_prefix
  std::string chat_template;             // tokenizer.chat_template; Jinja source, may be empty
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_GGUF_VOCAB_H_
