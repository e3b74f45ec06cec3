// Any bytes as a safetensors file: parsed or refused. What is accepted must be readable to its last
// byte, and its parts must account for the whole file.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/gguf_dequant.h"
#include "engine/safetensors.h"
#include "kernels/check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace resa::engine;  // NOLINT(google-build-using-namespace): one function.
  const auto tensors = ParseSafetensors(std::as_bytes(std::span(data, size)), "fuzz.safetensors");
  if (!tensors.ok()) {
    RESA_CHECK(!tensors.status().message().empty());
    return 0;
  }
  size_t total = 0;
  for (const StoredTensor& tensor : *tensors) {
    RESA_CHECK(StoredBytes(tensor.type, tensor.shape) == static_cast<int64_t>(tensor.data.size()));
    std::vector<float> values(tensor.data.size() / BlockBytes(tensor.type));
    DecodeToFloat(tensor.type, tensor.data, values);
    total += tensor.data.size();
  }
  RESA_CHECK(total + 8 <= size);
  return 0;
}
