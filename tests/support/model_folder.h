#ifndef RESA_TESTS_SUPPORT_MODEL_FOLDER_H_
#define RESA_TESTS_SUPPORT_MODEL_FOLDER_H_

// A random model as a Hugging Face directory, for tests that need real files with a tokenizer.

#include <cstdint>
#include <string>

#include "tests/support/file_builders.h"
#include "tests/support/tiny_model.h"

namespace resa::testing {

// The byte-level tokenizer of a ModelFolder: token b is the byte b, then a few merges and the
// special tokens.
inline constexpr int32_t kTheToken = 257;  // "the"
inline constexpr int32_t kEosToken = 259;  // "<|endoftext|>"
inline constexpr int32_t kImStartToken = 260;
inline constexpr int32_t kImEndToken = 261;
inline constexpr int32_t kTokenizerSize = 262;
inline constexpr int32_t kModelVocabSize = 264;  // Two ids beyond the tokenizer's.

// config.json, model.safetensors, tokenizer.json and, with a chat template, tokenizer_config.json;
// removed with the object.
class ModelFolder {
 public:
  // Overrides options.vocab_size. `chat_template` empty: none.
  ModelFolder(TinyModelOptions options, uint64_t seed, const std::string& chat_template);

  std::string path() const { return folder_.path(); }

 private:
  TempFolder folder_;
};

// ChatML, as its models spell it.
extern const char kChatMlTemplate[];

}  // namespace resa::testing

#endif  // RESA_TESTS_SUPPORT_MODEL_FOLDER_H_
