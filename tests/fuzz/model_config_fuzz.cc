// Any bytes as config.json and generation_config.json (separated by the first NUL): a configuration
// that is accepted is one that can be computed with.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>

#include "engine/model_config.h"
#include "kernels/check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace resa::engine;  // NOLINT(google-build-using-namespace): one function.
  const std::string input(reinterpret_cast<const char*>(data), size);
  const size_t cut = input.find('\0');
  const std::string generation = cut == input.npos ? "" : input.substr(cut + 1);
  const auto config = ModelConfigFromJson(input.substr(0, cut), "config.json", generation,
                                          "generation_config.json");
  if (!config.ok()) {
    RESA_CHECK(!config.status().message().empty());
    return 0;
  }
  RESA_CHECK(ValidateModelConfig(*config, "fuzz").ok());
  RESA_CHECK(config->GroupSize() >= 1 && config->GroupSize() <= 16);
  for (float frequency : RopeInverseFrequencies(*config)) {
    RESA_CHECK(std::isfinite(frequency) && frequency > 0) << frequency;
  }
  RESA_CHECK(std::isfinite(RopeAttentionFactor(*config)));
  return 0;
}
