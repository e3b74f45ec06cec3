#ifndef RESA_ENGINE_GGUF_H_
#define RESA_ENGINE_GGUF_H_

// The GGUF container, versions 2 and 3, little endian:
//   "GGUF", u32 version, u64 tensor count, u64 metadata count,
//   metadata: key (u64 length + bytes), u32 type, value;
//   tensors:  name, u32 dimensions, u64 size each (the contiguous one first), u32 type, u64 offset;
//   padding to general.alignment (32 unless given), then the data that offsets count from.

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "engine/stored_tensor.h"

namespace resa::engine {

// The format's numbers.
enum class GgufType : uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};

// An array as it lies in the file, already walked once and known to be whole. Decode it with
// GgufFile::Strings and its siblings.
struct GgufArray {
  GgufType element = GgufType::kUint8;
  uint64_t count = 0;
  std::span<const std::byte> bytes;
};

// Unsigned and signed integers of every width, floats of both, bool, string, array.
using GgufValue = std::variant<uint64_t, int64_t, double, bool, absl::string_view, GgufArray>;

// A parsed file: metadata and tensors, both pointing into the bytes it was parsed from.
class GgufFile {
 public:
  // Parses a whole file in memory; `file` is for messages.
  //
  // INVALID_ARGUMENT, naming key or tensor, for whatever the format forbids (wrong magic, another
  // version, big endian, lengths and counts beyond the file, repeated keys or names, more than 4
  // dimensions, offsets unaligned, overlapping or outside the data, sizes that overflow), and for
  // a tensor type other than F32, F16, BF16, Q8_0, Q4_0 and Q4_1.
  static absl::StatusOr<GgufFile> Parse(std::span<const std::byte> bytes, absl::string_view file);

  const std::string& file() const { return file_; }
  // Shapes are row-major, the reverse of the file's order.
  const std::vector<StoredTensor>& tensors() const { return tensors_; }
  const StoredTensor* FindTensor(absl::string_view name) const;

  const std::map<absl::string_view, GgufValue>& metadata() const { return metadata_; }
  bool Has(absl::string_view key) const { return metadata_.contains(key); }
  // Typed access. Absent keys are empty optionals (empty vectors for arrays); a value of another
  // kind, or an integer out of range, is INVALID_ARGUMENT. Any integer width is accepted.
  absl::StatusOr<std::optional<int64_t>> Int(absl::string_view key, int64_t min, int64_t max) const;
  absl::StatusOr<std::optional<double>> Number(absl::string_view key, double min, double max) const;
  absl::StatusOr<std::optional<bool>> Bool(absl::string_view key) const;
  absl::StatusOr<std::optional<std::string>> String(absl::string_view key) const;
  absl::StatusOr<std::vector<std::string>> Strings(absl::string_view key, uint64_t max_count) const;
  absl::StatusOr<std::vector<float>> Floats(absl::string_view key, uint64_t max_count) const;
  absl::StatusOr<std::vector<int32_t>> Ints(absl::string_view key, uint64_t max_count) const;

  absl::Status Error(absl::string_view key, absl::string_view what) const;

 private:
  GgufFile() = default;
  absl::StatusOr<const GgufArray*> Array(absl::string_view key, uint64_t max_count) const;

  std::string file_;
  std::map<absl::string_view, GgufValue> metadata_;
  std::vector<StoredTensor> tensors_;
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_GGUF_H_
