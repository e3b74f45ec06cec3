#ifndef RESA_ENGINE_STRICT_JSON_H_
#define RESA_ENGINE_STRICT_JSON_H_

// JSON of model files, read without trust: a parser that refuses what JSON leaves open, and a
// reader of typed fields whose errors name the file and the field.

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "nlohmann/json.hpp"

namespace resa::engine {

// Parses `text`. INVALID_ARGUMENT with `file` and the byte position when it is not JSON, repeats a
// key within an object, or nests deeper than 64 levels.
absl::StatusOr<nlohmann::json> ParseStrictJson(absl::string_view text, absl::string_view file);

// Typed access to the members of one JSON object. A missing member and a null are the same thing:
// absent. Looks at the object only during its own lifetime.
class JsonFields {
 public:
  // `where` starts every message: "config.json" or "config.json: rope_scaling".
  // REQUIRES object.is_object().
  JsonFields(const nlohmann::json& object, std::string where);

  bool Has(const char* key) const;
  // True for an explicit null too.
  bool Contains(const char* key) const { return object_.contains(key); }
  // INVALID_ARGUMENT when the member has another type or lies outside [min, max] (NaN does).
  absl::StatusOr<std::optional<int64_t>> Int(const char* key, int64_t min, int64_t max) const;
  absl::StatusOr<std::optional<double>> Number(const char* key, double min, double max) const;
  absl::StatusOr<std::optional<bool>> Bool(const char* key) const;
  absl::StatusOr<std::optional<std::string>> String(const char* key) const;
  // As above, but absent is an error too.
  absl::StatusOr<int64_t> RequiredInt(const char* key, int64_t min, int64_t max) const;
  absl::StatusOr<double> RequiredNumber(const char* key, double min, double max) const;

  // The member, or null when absent. For what has no typed accessor.
  const nlohmann::json* Find(const char* key) const;
  absl::Status Error(const char* key, absl::string_view what) const;
  const std::string& where() const { return where_; }

 private:
  const nlohmann::json& object_;
  const std::string where_;
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_STRICT_JSON_H_
