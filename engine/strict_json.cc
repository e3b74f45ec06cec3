#include "engine/strict_json.h"

#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/stored_tensor.h"
#include "kernels/check.h"

namespace resa::engine {
namespace {

using nlohmann::json;

constexpr size_t kMaxDepth = 64;

// Builds the document from the parser's events; returning false stops the parser.
class StrictBuilder : public nlohmann::json_sax<json> {
 public:
  bool null() override { return Add(nullptr); }
  bool boolean(bool value) override { return Add(value); }
  bool number_integer(number_integer_t value) override { return Add(value); }
  bool number_unsigned(number_unsigned_t value) override { return Add(value); }
  bool number_float(number_float_t value, const string_t&) override { return Add(value); }
  bool string(string_t& value) override { return Add(std::move(value)); }
  bool binary(binary_t&) override { return Fail("binary value"); }
  bool start_object(std::size_t) override { return Open(json::object()); }
  bool start_array(std::size_t) override { return Open(json::array()); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }
  bool key(string_t& name) override {
    if (open_.back()->contains(name)) {
      return Fail(absl::StrCat("key ", Quoted(name), " stands twice in one object"));
    }
    key_ = std::move(name);
    return true;
  }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception& error) override {
    // The library's message starts with "[json.exception.parse_error.101] ".
    absl::string_view what = error.what();
    if (const size_t end = what.find("] "); end != what.npos) what.remove_prefix(end + 2);
    return Fail(absl::StrCat("not valid JSON at byte ", position, ": ", what));
  }

  json root;
  std::string error;

 private:
  bool Fail(std::string message) {
    error = std::move(message);
    return false;
  }
  json* Place(json value) {
    if (open_.empty()) {
      root = std::move(value);
      return &root;
    }
    json& parent = *open_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return &parent.back();
    }
    json& slot = parent[key_];
    slot = std::move(value);
    return &slot;
  }
  bool Add(json value) {
    Place(std::move(value));
    return true;
  }
  bool Open(json container) {
    if (open_.size() == kMaxDepth) {
      return Fail(absl::StrCat("nested deeper than ", kMaxDepth, " levels"));
    }
    open_.push_back(Place(std::move(container)));
    return true;
  }
  bool Close() {
    open_.pop_back();
    return true;
  }

  // Containers not yet closed. A parent does not move while its child is open: only the innermost
  // one grows.
  std::vector<json*> open_;
  std::string key_;
};

}  // namespace

absl::StatusOr<json> ParseStrictJson(absl::string_view text, absl::string_view file) {
  StrictBuilder builder;
  if (!json::sax_parse(text.begin(), text.end(), &builder)) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, ": ", builder.error.empty() ? "not valid JSON" : builder.error));
  }
  return std::move(builder.root);
}

JsonFields::JsonFields(const json& object, std::string where)
    : object_(object), where_(std::move(where)) {
  RESA_CHECK(object_.is_object());
}

const json* JsonFields::Find(const char* key) const {
  const auto it = object_.find(key);
  return it == object_.end() || it->is_null() ? nullptr : &*it;
}

bool JsonFields::Has(const char* key) const { return Find(key) != nullptr; }

absl::Status JsonFields::Error(const char* key, absl::string_view what) const {
  return absl::InvalidArgumentError(absl::StrCat(where_, ": ", key, " ", what));
}

absl::StatusOr<std::optional<int64_t>> JsonFields::Int(const char* key, int64_t min,
                                                       int64_t max) const {
  const json* value = Find(key);
  if (value == nullptr) return std::nullopt;
  const std::string expected = absl::StrCat("must be an integer from ", min, " to ", max, ", not ");
  if (!value->is_number_integer()) return Error(key, absl::StrCat(expected, value->type_name()));
  if (value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) {
    return Error(key, absl::StrCat(expected, value->get<uint64_t>()));
  }
  const int64_t number = value->get<int64_t>();
  if (number < min || number > max) return Error(key, absl::StrCat(expected, number));
  return number;
}

absl::StatusOr<std::optional<double>> JsonFields::Number(const char* key, double min,
                                                         double max) const {
  const json* value = Find(key);
  if (value == nullptr) return std::nullopt;
  const std::string expected = absl::StrCat("must be a number from ", min, " to ", max, ", not ");
  if (!value->is_number()) return Error(key, absl::StrCat(expected, value->type_name()));
  const double number = value->get<double>();
  if (!(number >= min && number <= max)) return Error(key, absl::StrCat(expected, number));
  return number;
}

absl::StatusOr<std::optional<bool>> JsonFields::Bool(const char* key) const {
  const json* value = Find(key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_boolean()) {
    return Error(key, absl::StrCat("must be true or false, not ", value->type_name()));
  }
  return value->get<bool>();
}

absl::StatusOr<std::optional<std::string>> JsonFields::String(const char* key) const {
  const json* value = Find(key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_string()) {
    return Error(key, absl::StrCat("must be a string, not ", value->type_name()));
  }
  return value->get<std::string>();
}

absl::StatusOr<int64_t> JsonFields::RequiredInt(const char* key, int64_t min, int64_t max) const {
  absl::StatusOr<std::optional<int64_t>> value = Int(key, min, max);
  if (!value.ok()) return value.status();
  if (!value->has_value()) return Error(key, "is missing");
  return **value;
}

absl::StatusOr<double> JsonFields::RequiredNumber(const char* key, double min, double max) const {
  absl::StatusOr<std::optional<double>> value = Number(key, min, max);
  if (!value.ok()) return value.status();
  if (!value->has_value()) return Error(key, "is missing");
  return **value;
}

}  // namespace resa::engine
