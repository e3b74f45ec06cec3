#ifndef RESA_ENGINE_MODEL_FILES_H_
#define RESA_ENGINE_MODEL_FILES_H_

// Opens a model: a Hugging Face directory as it is downloaded, or one GGUF file.

#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "engine/gguf.h"
#include "engine/gguf_vocab.h"
#include "engine/model_config.h"
#include "engine/weights.h"

namespace resa::engine {

struct LoadedModel {
  ModelConfig config;
  ModelWeights weights;                 // Own their memory: the model's files may be deleted.
  std::optional<GgufVocab> gguf_vocab;  // Set for a GGUF file. A directory has tokenizer.json.
};

// `path` is one of
//   a directory with config.json, optionally generation_config.json, and model.safetensors or
//     model.safetensors.index.json with the shards that it names (the single file wins);
//   a file that begins with "GGUF", whatever it is called.
// INVALID_ARGUMENT, NOT_FOUND or PERMISSION_DENIED name the file and say what was expected; see
// safetensors.h, gguf.h, model_config.h and weights.h for what is refused. Blocks while it reads
// and converts; touches nothing outside the model's own files.
absl::StatusOr<LoadedModel> LoadModel(const std::string& path);

// The tokenizer's metadata of a GGUF file, as it stands there; the tokenizer validates it. At most
// 4M tokens and 8M merges.
absl::StatusOr<GgufVocab> ReadGgufVocab(const GgufFile& gguf);

}  // namespace resa::engine

#endif  // RESA_ENGINE_MODEL_FILES_H_
