#include "engine/safetensors.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"

namespace resa::engine {
namespace {

constexpr size_t kMaxDimensions = 8;

std::optional<StoredType> TypeFromName(absl::string_view name) {
  if (name == "F32") return StoredType::kF32;
  if (name == "F16") return StoredType::kF16;
  if (name == "BF16") return StoredType::kBF16;
  return std::nullopt;
}

struct HeaderEntry {
  std::string name;
  std::optional<StoredType> type;
  std::optional<std::vector<int64_t>> shape;
  std::vector<int64_t> offsets;  // [begin, end]
  bool has_offsets = false;
};

// Reads the header from the parser's events, without building a document: memory stays
// proportional to the tensors, whatever the header holds. Returning false stops the parser.
class HeaderReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  bool null() override { return Unexpected("null"); }
  bool boolean(bool) override { return Unexpected("a boolean"); }
  bool number_integer(number_integer_t value) override {
    // The parser calls this for negative numbers only.
    return Unexpected(absl::StrCat("the negative number ", value));
  }
  bool number_float(number_float_t, const string_t& text) override {
    return Unexpected(absl::StrCat("the number ", text.substr(0, 40)));
  }
  bool binary(binary_t&) override { return Unexpected("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (state_ != State::kShape && state_ != State::kOffsets) return Unexpected("a number");
    if (value > static_cast<uint64_t>(INT64_MAX)) {
      return Fail(absl::StrCat(Here(), field_, " has ", value, ", which is out of range"));
    }
    std::vector<int64_t>& list =
        state_ == State::kShape ? *entries.back().shape : entries.back().offsets;
    if (list.size() == (state_ == State::kShape ? kMaxDimensions : 2)) {
      return Fail(absl::StrCat(Here(), field_, " has more than ", list.size(), " elements"));
    }
    list.push_back(static_cast<int64_t>(value));
    return true;
  }

  bool string(string_t& value) override {
    if (state_ == State::kMetadata) return true;
    if (state_ != State::kTensor || field_ != "dtype") return Unexpected("a string");
    entries.back().type = TypeFromName(value);
    if (!entries.back().type) {
      return Fail(absl::StrCat(Here(), "dtype ", Quoted(value),
                               " is not supported; expected F32, F16 or BF16"));
    }
    return true;
  }

  bool start_object(std::size_t) override {
    switch (state_) {
      case State::kStart:
        state_ = State::kTop;
        return true;
      case State::kTop:
        state_ = field_ == "__metadata__" ? State::kMetadata : State::kTensor;
        if (state_ == State::kTensor) entries.emplace_back().name = field_;
        fields_seen_.clear();
        return true;
      default:
        return Unexpected("an object");
    }
  }

  bool end_object() override {
    if (state_ == State::kTop) {
      state_ = State::kDone;
      return true;
    }
    if (state_ == State::kTensor) {
      const HeaderEntry& entry = entries.back();
      field_.clear();
      if (!entry.type) return Fail(absl::StrCat(Here(), "dtype is missing"));
      if (!entry.shape) return Fail(absl::StrCat(Here(), "shape is missing"));
      if (!entry.has_offsets) return Fail(absl::StrCat(Here(), "data_offsets is missing"));
    }
    state_ = State::kTop;
    return true;
  }

  bool start_array(std::size_t) override {
    if (state_ == State::kTensor && field_ == "shape") {
      entries.back().shape.emplace();
      state_ = State::kShape;
      return true;
    }
    if (state_ == State::kTensor && field_ == "data_offsets") {
      entries.back().has_offsets = true;
      state_ = State::kOffsets;
      return true;
    }
    return Unexpected("an array");
  }

  bool end_array() override {
    if (state_ == State::kOffsets && entries.back().offsets.size() != 2) {
      return Fail(absl::StrCat(Here(), "data_offsets must be [begin, end]"));
    }
    state_ = State::kTensor;
    return true;
  }

  bool key(string_t& name) override {
    auto& seen = state_ == State::kTop ? names_seen_ : fields_seen_;
    if (!seen.insert(name).second) {
      return Fail(state_ == State::kTop
                      ? absl::StrCat("tensor ", Quoted(name), " is listed twice")
                      : absl::StrCat(Here(), "key ", Quoted(name), " stands twice"));
    }
    if (state_ == State::kTensor && name != "dtype" && name != "shape" && name != "data_offsets") {
      return Fail(absl::StrCat(Here(), "unknown key ", Quoted(name),
                               "; expected dtype, shape and data_offsets"));
    }
    field_ = std::move(name);
    return true;
  }

  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception&) override {
    return Fail(absl::StrCat("the header is not valid JSON at its byte ", position));
  }

  std::vector<HeaderEntry> entries;
  std::string error;

 private:
  enum class State { kStart, kTop, kMetadata, kTensor, kShape, kOffsets, kDone };

  bool Fail(std::string message) {
    error = std::move(message);
    return false;
  }
  std::string Here() const {
    const bool in_tensor = state_ != State::kStart && state_ != State::kTop &&
                           state_ != State::kMetadata && !entries.empty();
    return in_tensor ? absl::StrCat("tensor ", Quoted(entries.back().name), ": ") : "header: ";
  }
  bool Unexpected(absl::string_view what) {
    return Fail(absl::StrCat(Here(), field_.empty() ? "" : absl::StrCat(Quoted(field_), " "),
                             "has ", what, ", which is not expected there"));
  }

  State state_ = State::kStart;
  std::string field_;  // The key read last.
  absl::flat_hash_set<std::string> names_seen_;
  absl::flat_hash_set<std::string> fields_seen_;
};

absl::Status CheckLayout(const std::vector<HeaderEntry>& entries, int64_t data_bytes,
                         absl::string_view file) {
  const auto error = [&](const HeaderEntry& entry, const auto&... what) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, ": tensor ", Quoted(entry.name), ": ", what...));
  };
  std::vector<const HeaderEntry*> order;
  order.reserve(entries.size());
  for (const HeaderEntry& entry : entries) {
    const int64_t begin = entry.offsets[0], end = entry.offsets[1];
    if (begin > end || end > data_bytes) {
      return error(entry, "data_offsets [", begin, ", ", end, "] do not lie within the ",
                   data_bytes, " bytes of data; the file is truncated or damaged");
    }
    const std::optional<int64_t> bytes = StoredBytes(*entry.type, *entry.shape);
    if (!bytes || *bytes != end - begin) {
      return error(
          entry, "shape ", ShapeString(*entry.shape), " of ", NameOf(*entry.type),
          bytes ? absl::StrCat(" needs ", *bytes, " bytes") : std::string(" has an absurd size"),
          ", but data_offsets span ", end - begin);
    }
    order.push_back(&entry);
  }
  std::sort(order.begin(), order.end(),
            [](const HeaderEntry* a, const HeaderEntry* b) { return a->offsets < b->offsets; });
  int64_t expected = 0;
  for (const HeaderEntry* entry : order) {
    if (entry->offsets[0] != expected) {
      return error(*entry, "data begins at ", entry->offsets[0], " but the data before it ends at ",
                   expected, "; tensors must neither overlap nor leave holes");
    }
    expected = entry->offsets[1];
  }
  if (expected != data_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, ": ", data_bytes - expected, " bytes after the last tensor's data"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<StoredTensor>> ParseSafetensors(std::span<const std::byte> bytes,
                                                           absl::string_view file) {
  if (bytes.size() < 8) {
    return absl::InvalidArgumentError(absl::StrCat(
        file, ": ", bytes.size(), " bytes are too few for a safetensors file; it is truncated"));
  }
  uint64_t header_bytes = 0;
  for (int i = 7; i >= 0; --i)
    header_bytes = header_bytes << 8 | std::to_integer<uint64_t>(bytes[i]);
  if (header_bytes > kMaxSafetensorsHeaderBytes || header_bytes > bytes.size() - 8) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, ": header length ", header_bytes, " exceeds the ",
                     header_bytes > bytes.size() - 8
                         ? absl::StrCat("file's remaining ", bytes.size() - 8, " bytes")
                         : absl::StrCat("limit of ", kMaxSafetensorsHeaderBytes),
                     "; not a safetensors file, or a truncated one"));
  }
  const char* text = reinterpret_cast<const char*>(bytes.data()) + 8;
  HeaderReader reader;
  if (!nlohmann::json::sax_parse(text, text + header_bytes, &reader)) {
    return absl::InvalidArgumentError(absl::StrCat(
        file, ": ", reader.error.empty() ? "the header is not valid JSON" : reader.error));
  }
  const std::span<const std::byte> data = bytes.subspan(8 + header_bytes);
  absl::Status layout = CheckLayout(reader.entries, static_cast<int64_t>(data.size()), file);
  if (!layout.ok()) return layout;

  std::vector<StoredTensor> tensors;
  tensors.reserve(reader.entries.size());
  for (HeaderEntry& entry : reader.entries) {
    tensors.push_back(
        StoredTensor{.name = std::move(entry.name),
                     .type = *entry.type,
                     .shape = std::move(*entry.shape),
                     .data = data.subspan(entry.offsets[0], entry.offsets[1] - entry.offsets[0]),
                     .file = std::string(file)});
  }
  return tensors;
}

}  // namespace resa::engine
