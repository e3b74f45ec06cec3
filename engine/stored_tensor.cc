#include "engine/stored_tensor.h"

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace resa::engine {

const char* NameOf(StoredType type) {
  switch (type) {
    case StoredType::kF32:
      return "F32";
    case StoredType::kF16:
      return "F16";
    case StoredType::kBF16:
      return "BF16";
    case StoredType::kQ8_0:
      return "Q8_0";
    case StoredType::kQ4_0:
      return "Q4_0";
    case StoredType::kQ4_1:
      return "Q4_1";
  }
  return "?";
}

int64_t BlockElements(StoredType type) {
  switch (type) {
    case StoredType::kF32:
    case StoredType::kF16:
    case StoredType::kBF16:
      return 1;
    case StoredType::kQ8_0:
    case StoredType::kQ4_0:
    case StoredType::kQ4_1:
      return 32;
  }
  return 1;
}

int64_t BlockBytes(StoredType type) {
  switch (type) {
    case StoredType::kF32:
      return 4;
    case StoredType::kF16:
    case StoredType::kBF16:
      return 2;
    case StoredType::kQ8_0:
      return 34;
    case StoredType::kQ4_0:
      return 18;
    case StoredType::kQ4_1:
      return 20;
  }
  return 0;
}

std::optional<int64_t> StoredBytes(StoredType type, std::span<const int64_t> shape) {
  // Dimensions are checked one by one, so that a zero cannot hide an absurd one behind it.
  int64_t product = 1;
  bool empty = false;
  for (int64_t dim : shape) {
    if (dim < 0) return std::nullopt;
    if (dim == 0) {
      empty = true;
    } else if (__builtin_mul_overflow(product, dim, &product)) {
      return std::nullopt;
    }
  }
  const int64_t block = BlockElements(type);
  if (block > 1 && (shape.empty() || shape.back() % block != 0)) return std::nullopt;
  if (empty) return 0;
  int64_t bytes;
  if (__builtin_mul_overflow(product / block, BlockBytes(type), &bytes)) return std::nullopt;
  return bytes;
}

std::string ShapeString(std::span<const int64_t> shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

std::string Quoted(absl::string_view name) {
  constexpr size_t kMaxBytes = 120;
  const bool cut = name.size() > kMaxBytes;
  return absl::StrCat("'", absl::CHexEscape(name.substr(0, kMaxBytes)), cut ? "..." : "", "'");
}

}  // namespace resa::engine
