// Any bytes as a GGUF file, through everything that a model goes through when it is loaded: parsed
// or refused, configuration, vocabulary, weights. Nothing may crash, read outside the file or take
// memory out of proportion to it.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

#include "engine/gguf.h"
#include "engine/model_config.h"
#include "engine/model_files.h"
#include "engine/weights.h"
#include "kernels/check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace resa::engine;  // NOLINT(google-build-using-namespace): one function.
  const auto file = GgufFile::Parse(std::as_bytes(std::span(data, size)), "fuzz.gguf");
  if (!file.ok()) {
    RESA_CHECK(!file.status().message().empty());
    return 0;
  }
  for (const StoredTensor& tensor : file->tensors()) {
    RESA_CHECK(tensor.data.size() <= size);
    RESA_CHECK(StoredBytes(tensor.type, tensor.shape) == static_cast<int64_t>(tensor.data.size()));
  }
  const auto vocab = ReadGgufVocab(*file);
  RESA_CHECK(!vocab.ok() || vocab->tokens.size() <= size);
  const auto config = ModelConfigFromGguf(*file);
  if (!config.ok()) return 0;
  for (float frequency : RopeInverseFrequencies(*config)) RESA_CHECK(std::isfinite(frequency));
  const auto weights = LoadWeights(*config, WeightNames::kGguf, file->tensors(), {});
  if (!weights.ok()) return 0;
  // The worst growth is Q4_0 to bf16, 18 bytes to 64, and 64 bytes of alignment for each tensor.
  RESA_CHECK(weights->converted_bytes <= 4 * size + 64 * file->tensors().size());
  return 0;
}
