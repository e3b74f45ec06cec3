#ifndef RESA_ENGINE_STORED_TENSOR_H_
#define RESA_ENGINE_STORED_TENSOR_H_

// A tensor as it lies in a model file, whatever the file's format.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace resa::engine {

// Element types that can be loaded. The last three are GGUF's blocks of 32 (gguf_dequant.h).
enum class StoredType : uint8_t { kF32, kF16, kBF16, kQ8_0, kQ4_0, kQ4_1 };

const char* NameOf(StoredType type);
// Elements per block (1 for plain types), and bytes per block.
int64_t BlockElements(StoredType type);
int64_t BlockBytes(StoredType type);

// Row-major; the last dimension is contiguous (for a matrix: [out, in]).
struct StoredTensor {
  std::string name;
  StoredType type = StoredType::kF32;
  std::vector<int64_t> shape;       // Each >= 0; a product of at most INT64_MAX.
  std::span<const std::byte> data;  // Inside the file's map. Exactly StoredBytes(type, shape).
  std::string file;                 // For messages.
};

// Bytes of a tensor; empty when a dimension is negative, the product overflows int64, or the last
// dimension is not whole blocks.
std::optional<int64_t> StoredBytes(StoredType type, std::span<const int64_t> shape);

// "[192, 64]"
std::string ShapeString(std::span<const int64_t> shape);

// A name out of a file, safe to put in a message: in single quotes, escaped, cut at 120 bytes.
std::string Quoted(absl::string_view name);

}  // namespace resa::engine

#endif  // RESA_ENGINE_STORED_TENSOR_H_
