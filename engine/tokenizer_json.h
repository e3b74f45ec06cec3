#ifndef RESA_ENGINE_TOKENIZER_JSON_H_
#define RESA_ENGINE_TOKENIZER_JSON_H_

// tokenizer.json in parts. Everything in it is checked for type and range; what is not implemented
// is refused by name, with what is. `where` is the path of the value ("tokenizer.json: decoder"),
// for messages. The functions here are those of Tokenizer::FromJson (tokenizer_json.cc).

#include <initializer_list>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "engine/normalizer.h"
#include "engine/pre_tokenizer.h"
#include "engine/strict_json.h"
#include "engine/token_decoder.h"

namespace resa::engine {

// INVALID_ARGUMENT when `value` is not an object, or has members other than `known`.
absl::StatusOr<JsonFields> CheckedObject(const nlohmann::json& value, std::string where,
                                         std::initializer_list<absl::string_view> known);
// The member "type" of an object; INVALID_ARGUMENT when there is none.
absl::StatusOr<std::string> TypeOf(const nlohmann::json& value, const std::string& where);
// INVALID_ARGUMENT saying that this type is not supported and which are.
absl::Status UnsupportedType(const std::string& where, absl::string_view type,
                             absl::string_view supported);
absl::StatusOr<std::string> RequiredString(const JsonFields& fields, const char* key);
absl::StatusOr<bool> BoolOr(const JsonFields& fields, const char* key, bool otherwise);

// The sections; null yields no steps, or no decoder.
absl::StatusOr<std::vector<NormalizerStep>> ParseNormalizer(const nlohmann::json& value,
                                                            const std::string& where);
absl::StatusOr<std::vector<PreTokenizerStep>> ParsePreTokenizer(const nlohmann::json& value,
                                                                const std::string& where);
absl::StatusOr<TokenDecoderConfig> ParseDecoder(const nlohmann::json& value,
                                                const std::string& where);

}  // namespace resa::engine

#endif  // RESA_ENGINE_TOKENIZER_JSON_H_
