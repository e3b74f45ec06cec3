#include "engine/gguf.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace resa::engine {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr int kMaxArrayDepth = 4;
constexpr uint32_t kMaxDimensions = 4;
constexpr uint64_t kDefaultAlignment = 32;
constexpr uint64_t kMaxAlignment = 1 << 20;
// The least a metadata entry and a tensor entry can take; they bound the counts by the file's size.
constexpr uint64_t kMinMetadataBytes = 8 + 4 + 1;
constexpr uint64_t kMinTensorBytes = 8 + 4 + 8 + 4 + 8;

// Bytes of a scalar; 0 for strings and arrays.
size_t ScalarBytes(GgufType type) {
  switch (type) {
    case GgufType::kUint8:
    case GgufType::kInt8:
    case GgufType::kBool:
      return 1;
    case GgufType::kUint16:
    case GgufType::kInt16:
      return 2;
    case GgufType::kUint32:
    case GgufType::kInt32:
    case GgufType::kFloat32:
      return 4;
    case GgufType::kUint64:
    case GgufType::kInt64:
    case GgufType::kFloat64:
      return 8;
    case GgufType::kString:
    case GgufType::kArray:
      return 0;
  }
  return 0;
}

// Reads forward through the bytes; every read says whether there was enough.
class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : bytes_(bytes) {}

  size_t position() const { return position_; }
  size_t remaining() const { return bytes_.size() - position_; }

  template <typename T>
  bool Read(T* value) {
    if (remaining() < sizeof(T)) return false;
    std::memcpy(value, bytes_.data() + position_, sizeof(T));
    position_ += sizeof(T);
    return true;
  }
  bool ReadString(absl::string_view* value) {
    uint64_t length;
    if (!Read(&length) || length > remaining()) return false;
    *value = {reinterpret_cast<const char*>(bytes_.data()) + position_, length};
    position_ += length;
    return true;
  }
  bool ReadType(GgufType* type) {
    uint32_t number;
    if (!Read(&number) || number > static_cast<uint32_t>(GgufType::kFloat64)) return false;
    *type = static_cast<GgufType>(number);
    return true;
  }
  // Walks the array whose element type and count come next, strings and nested arrays included.
  bool ReadArray(GgufArray* array, int depth = 1) {
    if (depth > kMaxArrayDepth || !ReadType(&array->element) || !Read(&array->count)) return false;
    const size_t begin = position_;
    if (const size_t size = ScalarBytes(array->element); size > 0) {
      if (array->count > remaining() / size) return false;
      position_ += array->count * size;
    } else {
      // Each element takes at least 8 bytes, so the loop is bounded by the file's size.
      if (array->count > remaining() / 8) return false;
      for (uint64_t i = 0; i < array->count; ++i) {
        absl::string_view text;
        GgufArray nested;
        const bool ok =
            array->element == GgufType::kString ? ReadString(&text) : ReadArray(&nested, depth + 1);
        if (!ok) return false;
      }
    }
    array->bytes = bytes_.subspan(begin, position_ - begin);
    return true;
  }
  bool ReadValue(GgufValue* value) {
    GgufType type;
    return ReadType(&type) && ReadValueOf(type, value);
  }
  bool ReadValueOf(GgufType type, GgufValue* value) {
    switch (type) {
      case GgufType::kUint8:
        return Widen<uint8_t, uint64_t>(value);
      case GgufType::kUint16:
        return Widen<uint16_t, uint64_t>(value);
      case GgufType::kUint32:
        return Widen<uint32_t, uint64_t>(value);
      case GgufType::kUint64:
        return Widen<uint64_t, uint64_t>(value);
      case GgufType::kInt8:
        return Widen<int8_t, int64_t>(value);
      case GgufType::kInt16:
        return Widen<int16_t, int64_t>(value);
      case GgufType::kInt32:
        return Widen<int32_t, int64_t>(value);
      case GgufType::kInt64:
        return Widen<int64_t, int64_t>(value);
      case GgufType::kFloat32:
        return Widen<float, double>(value);
      case GgufType::kFloat64:
        return Widen<double, double>(value);
      case GgufType::kBool: {
        uint8_t byte;
        if (!Read(&byte) || byte > 1) return false;
        *value = byte == 1;
        return true;
      }
      case GgufType::kString: {
        absl::string_view text;
        if (!ReadString(&text)) return false;
        *value = text;
        return true;
      }
      case GgufType::kArray: {
        GgufArray array;
        if (!ReadArray(&array)) return false;
        *value = array;
        return true;
      }
    }
    return false;
  }

 private:
  template <typename Stored, typename Wide>
  bool Widen(GgufValue* value) {
    Stored stored;
    if (!Read(&stored)) return false;
    *value = static_cast<Wide>(stored);
    return true;
  }

  std::span<const std::byte> bytes_;
  size_t position_ = 0;
};

std::optional<StoredType> TensorType(uint32_t number) {
  switch (number) {
    case 0:
      return StoredType::kF32;
    case 1:
      return StoredType::kF16;
    case 2:
      return StoredType::kQ4_0;
    case 3:
      return StoredType::kQ4_1;
    case 8:
      return StoredType::kQ8_0;
    case 30:
      return StoredType::kBF16;
    default:
      return std::nullopt;
  }
}

// The names of the types that files in circulation use and we do not load.
std::string TensorTypeName(uint32_t number) {
  static constexpr std::pair<uint32_t, const char*> kNames[] = {
      {6, "Q5_0"},     {7, "Q5_1"},    {9, "Q8_1"},   {10, "Q2_K"},  {11, "Q3_K"},
      {12, "Q4_K"},    {13, "Q5_K"},   {14, "Q6_K"},  {15, "Q8_K"},  {16, "IQ2_XXS"},
      {17, "IQ2_XS"},  {20, "IQ4_NL"}, {21, "IQ3_S"}, {22, "IQ2_S"}, {23, "IQ4_XS"},
      {24, "I8"},      {25, "I16"},    {26, "I32"},   {27, "I64"},   {28, "F64"},
      {18, "IQ3_XXS"}, {19, "IQ1_S"},  {29, "IQ1_M"}, {34, "TQ1_0"}, {35, "TQ2_0"},
      {39, "MXFP4"}};
  for (const auto& [value, name] : kNames) {
    if (value == number) return name;
  }
  return absl::StrCat("number ", number);
}

// Where a tensor's data lies, relative to the data section.
struct Extent {
  uint64_t begin;
  uint64_t end;
  const std::string* name;
};

template <typename... Parts>
absl::Status ErrorIn(absl::string_view file, const Parts&... what) {
  return absl::InvalidArgumentError(absl::StrCat(file, ": ", what...));
}

absl::Status ReadMetadata(Reader& reader, uint64_t count, absl::string_view file,
                          std::map<absl::string_view, GgufValue>* metadata) {
  for (uint64_t i = 0; i < count; ++i) {
    absl::string_view key;
    if (!reader.ReadString(&key) || key.empty()) {
      return ErrorIn(file, "metadata entry ", i, " of ", count, ": its key is cut off or empty");
    }
    GgufValue value;
    if (!reader.ReadValue(&value)) {
      return ErrorIn(file, "metadata ", Quoted(key),
                     ": its type is unknown, its value is malformed or longer than the file");
    }
    if (!metadata->emplace(key, value).second) {
      return ErrorIn(file, "metadata ", Quoted(key), " stands twice");
    }
  }
  return absl::OkStatus();
}

// Reads one tensor entry; data is set by the caller, once the data section is known.
absl::Status ReadTensorEntry(Reader& reader, absl::string_view file, StoredTensor* tensor,
                             uint64_t* offset) {
  absl::string_view name;
  if (!reader.ReadString(&name) || name.empty()) {
    return ErrorIn(file, "a tensor's name is cut off or empty");
  }
  tensor->name = std::string(name);
  tensor->file = std::string(file);
  const std::string where = absl::StrCat("tensor ", Quoted(name), ": ");
  uint32_t dimensions;
  if (!reader.Read(&dimensions)) return ErrorIn(file, where, "its entry is cut off");
  if (dimensions == 0 || dimensions > kMaxDimensions) {
    return ErrorIn(file, where, dimensions, " dimensions; expected 1 to ", kMaxDimensions);
  }
  tensor->shape.resize(dimensions);
  for (uint32_t d = 0; d < dimensions; ++d) {
    uint64_t size;
    if (!reader.Read(&size)) return ErrorIn(file, where, "its entry is cut off");
    if (size == 0 || size > static_cast<uint64_t>(INT64_MAX)) {
      return ErrorIn(file, where, "dimension ", d, " is ", size, ", which is out of range");
    }
    tensor->shape[dimensions - 1 - d] = static_cast<int64_t>(size);
  }
  uint32_t type;
  if (!reader.Read(&type) || !reader.Read(offset)) {
    return ErrorIn(file, where, "its entry is cut off");
  }
  const std::optional<StoredType> known = TensorType(type);
  if (!known) {
    return ErrorIn(file, where, "type ", TensorTypeName(type),
                   " is not supported; expected F32, F16, BF16, Q8_0, Q4_0 or Q4_1");
  }
  tensor->type = *known;
  return absl::OkStatus();
}

absl::Status PlaceTensors(std::span<const std::byte> data, const std::vector<uint64_t>& offsets,
                          uint64_t alignment, absl::string_view file,
                          std::vector<StoredTensor>* tensors) {
  std::vector<Extent> extents;
  extents.reserve(tensors->size());
  for (size_t i = 0; i < tensors->size(); ++i) {
    StoredTensor& tensor = (*tensors)[i];
    const std::string where = absl::StrCat("tensor ", Quoted(tensor.name), ": ");
    const std::optional<int64_t> bytes = StoredBytes(tensor.type, tensor.shape);
    if (!bytes) {
      return ErrorIn(file, where, "shape ", ShapeString(tensor.shape), " of ", NameOf(tensor.type),
                     " overflows, or its rows are not whole blocks of ",
                     BlockElements(tensor.type));
    }
    const uint64_t size = static_cast<uint64_t>(*bytes);
    if (offsets[i] % alignment != 0) {
      return ErrorIn(file, where, "offset ", offsets[i], " is not a multiple of the alignment ",
                     alignment);
    }
    if (offsets[i] > data.size() || size > data.size() - offsets[i]) {
      return ErrorIn(file, where, size, " bytes at offset ", offsets[i], " do not lie within the ",
                     data.size(), " bytes of data; the file is truncated or damaged");
    }
    tensor.data = data.subspan(offsets[i], size);
    extents.push_back({offsets[i], offsets[i] + size, &tensor.name});
  }
  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].begin < extents[i - 1].end) {
      return ErrorIn(file, "tensors ", Quoted(*extents[i - 1].name), " and ",
                     Quoted(*extents[i].name), " overlap");
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<GgufFile> GgufFile::Parse(std::span<const std::byte> bytes, absl::string_view file) {
  Reader reader(bytes);
  char magic[4];
  uint32_t version;
  uint64_t tensor_count, metadata_count;
  if (!reader.Read(&magic) || std::memcmp(magic, "GGUF", 4) != 0) {
    return ErrorIn(file, "not a GGUF file (it does not begin with \"GGUF\")");
  }
  if (!reader.Read(&version)) return ErrorIn(file, "cut off in its header");
  if (version != 2 && version != 3) {
    return ErrorIn(file, "GGUF version ", version, " is not supported; expected 2 or 3",
                   (version & 0xffffu) == 0 ? " (is it a big-endian file?)" : "");
  }
  if (!reader.Read(&tensor_count) || !reader.Read(&metadata_count)) {
    return ErrorIn(file, "cut off in its header");
  }
  if (metadata_count > reader.remaining() / kMinMetadataBytes) {
    return ErrorIn(file, metadata_count, " metadata entries cannot fit in the file");
  }
  if (tensor_count > reader.remaining() / kMinTensorBytes) {
    return ErrorIn(file, tensor_count, " tensors cannot fit in the file");
  }

  GgufFile gguf;
  gguf.file_ = std::string(file);
  absl::Status status = ReadMetadata(reader, metadata_count, file, &gguf.metadata_);
  if (!status.ok()) return status;
  const auto alignment = gguf.Int("general.alignment", 1, kMaxAlignment);
  if (!alignment.ok()) return alignment.status();
  const uint64_t align = static_cast<uint64_t>(alignment->value_or(kDefaultAlignment));
  if (!std::has_single_bit(align)) {
    return gguf.Error("general.alignment", absl::StrCat("must be a power of two, not ", align));
  }

  std::vector<uint64_t> offsets(tensor_count);
  absl::flat_hash_set<absl::string_view> names;
  gguf.tensors_.resize(tensor_count);
  for (uint64_t i = 0; i < tensor_count; ++i) {
    status = ReadTensorEntry(reader, file, &gguf.tensors_[i], &offsets[i]);
    if (!status.ok()) return status;
    if (!names.insert(gguf.tensors_[i].name).second) {
      return ErrorIn(file, "tensor ", Quoted(gguf.tensors_[i].name), " is listed twice");
    }
  }
  const size_t padded = (reader.position() + align - 1) & ~(align - 1);
  status = PlaceTensors(bytes.subspan(std::min(padded, bytes.size())), offsets, align, file,
                        &gguf.tensors_);
  if (!status.ok()) return status;
  return gguf;
}

const StoredTensor* GgufFile::FindTensor(absl::string_view name) const {
  for (const StoredTensor& tensor : tensors_) {
    if (tensor.name == name) return &tensor;
  }
  return nullptr;
}

absl::Status GgufFile::Error(absl::string_view key, absl::string_view what) const {
  return ErrorIn(file_, "metadata ", Quoted(key), " ", what);
}

absl::StatusOr<std::optional<int64_t>> GgufFile::Int(absl::string_view key, int64_t min,
                                                     int64_t max) const {
  const auto it = metadata_.find(key);
  if (it == metadata_.end()) return std::nullopt;
  const std::string expected = absl::StrCat("must be an integer from ", min, " to ", max, ", not ");
  int64_t number;
  if (const auto* u = std::get_if<uint64_t>(&it->second)) {
    if (*u > static_cast<uint64_t>(INT64_MAX)) return Error(key, absl::StrCat(expected, *u));
    number = static_cast<int64_t>(*u);
  } else if (const auto* i = std::get_if<int64_t>(&it->second)) {
    number = *i;
  } else {
    return Error(key, absl::StrCat(expected, "a value of another type"));
  }
  if (number < min || number > max) return Error(key, absl::StrCat(expected, number));
  return number;
}

absl::StatusOr<std::optional<double>> GgufFile::Number(absl::string_view key, double min,
                                                       double max) const {
  const auto it = metadata_.find(key);
  if (it == metadata_.end()) return std::nullopt;
  const std::string expected = absl::StrCat("must be a number from ", min, " to ", max, ", not ");
  const auto* number = std::get_if<double>(&it->second);
  if (number == nullptr) return Error(key, absl::StrCat(expected, "a value of another type"));
  if (!(*number >= min && *number <= max)) return Error(key, absl::StrCat(expected, *number));
  return *number;
}

absl::StatusOr<std::optional<bool>> GgufFile::Bool(absl::string_view key) const {
  const auto it = metadata_.find(key);
  if (it == metadata_.end()) return std::nullopt;
  const auto* value = std::get_if<bool>(&it->second);
  if (value == nullptr) return Error(key, "must be a bool");
  return *value;
}

absl::StatusOr<std::optional<std::string>> GgufFile::String(absl::string_view key) const {
  const auto it = metadata_.find(key);
  if (it == metadata_.end()) return std::nullopt;
  const auto* value = std::get_if<absl::string_view>(&it->second);
  if (value == nullptr) return Error(key, "must be a string");
  return std::string(*value);
}

absl::StatusOr<const GgufArray*> GgufFile::Array(absl::string_view key, uint64_t max_count) const {
  const auto it = metadata_.find(key);
  if (it == metadata_.end()) return nullptr;
  const auto* array = std::get_if<GgufArray>(&it->second);
  if (array == nullptr) return Error(key, "must be an array");
  if (array->count > max_count) {
    return Error(
        key, absl::StrCat("has ", array->count, " elements; at most ", max_count, " are accepted"));
  }
  return array;
}

absl::StatusOr<std::vector<std::string>> GgufFile::Strings(absl::string_view key,
                                                           uint64_t max_count) const {
  absl::StatusOr<const GgufArray*> array = Array(key, max_count);
  if (!array.ok()) return array.status();
  std::vector<std::string> strings;
  if (*array == nullptr) return strings;
  if ((*array)->element != GgufType::kString) return Error(key, "must be an array of strings");
  strings.reserve((*array)->count);
  Reader reader((*array)->bytes);
  absl::string_view text;
  while (reader.remaining() > 0 && reader.ReadString(&text)) strings.emplace_back(text);
  return strings;
}

absl::StatusOr<std::vector<float>> GgufFile::Floats(absl::string_view key,
                                                    uint64_t max_count) const {
  absl::StatusOr<const GgufArray*> array = Array(key, max_count);
  if (!array.ok()) return array.status();
  std::vector<float> floats;
  if (*array == nullptr) return floats;
  if ((*array)->element != GgufType::kFloat32) return Error(key, "must be an array of float32");
  floats.resize((*array)->count);
  if (!floats.empty()) std::memcpy(floats.data(), (*array)->bytes.data(), floats.size() * 4);
  return floats;
}

absl::StatusOr<std::vector<int32_t>> GgufFile::Ints(absl::string_view key,
                                                    uint64_t max_count) const {
  absl::StatusOr<const GgufArray*> array = Array(key, max_count);
  if (!array.ok()) return array.status();
  std::vector<int32_t> ints;
  if (*array == nullptr) return ints;
  const GgufType element = (*array)->element;
  if (element != GgufType::kInt32 && element != GgufType::kUint32) {
    return Error(key, "must be an array of int32 or uint32");
  }
  ints.resize((*array)->count);
  if (!ints.empty()) std::memcpy(ints.data(), (*array)->bytes.data(), ints.size() * 4);
  if (element == GgufType::kUint32 &&
      std::any_of(ints.begin(), ints.end(), [](int32_t value) { return value < 0; })) {
    return Error(key, "has an element beyond 2147483647");
  }
  return ints;
}

}  // namespace resa::engine
