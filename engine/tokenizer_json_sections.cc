#include <algorithm>
#include <iterator>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status_macros.h"
#include "engine/tokenizer_json.h"
#include "engine/utf8.h"

namespace resa::engine {
namespace {

using nlohmann::json;

// A sequence may hold sequences; ParseStrictJson bounds how deep.
template <typename Parse>
absl::Status ForEachMember(const JsonFields& fields, const char* key, Parse parse) {
  const json* list = fields.Find(key);
  if (list == nullptr || !list->is_array()) return fields.Error(key, "must be an array");
  for (size_t i = 0; i < list->size(); ++i) {
    RESA_RETURN_IF_ERROR(parse((*list)[i], absl::StrCat(fields.where(), ".", key, "[", i, "]")));
  }
  return absl::OkStatus();
}

bool IsOneCharacter(const std::string& text) {
  return !text.empty() && LastCharacterBytes(text) == text.size();
}

absl::StatusOr<std::string> RequiredCharacter(const JsonFields& fields, const char* key) {
  RESA_ASSIGN_OR_RETURN(std::string text, RequiredString(fields, key));
  if (!IsOneCharacter(text)) return fields.Error(key, "must be one character");
  return text;
}

// {"String": "..."} or {"Regex": "..."}: exactly one of the two results is set.
struct Pattern {
  std::string literal;
  std::shared_ptr<const Regex> regex;
};

absl::StatusOr<Pattern> ParsePattern(const JsonFields& parent) {
  const json* value = parent.Find("pattern");
  if (value == nullptr) return parent.Error("pattern", "is missing");
  const std::string where = absl::StrCat(parent.where(), ".pattern");
  RESA_ASSIGN_OR_RETURN(const JsonFields fields, CheckedObject(*value, where, {"String", "Regex"}));
  if (fields.Has("String") == fields.Has("Regex")) {
    return parent.Error("pattern", "must have either String or Regex");
  }
  Pattern pattern;
  if (fields.Has("String")) {
    RESA_ASSIGN_OR_RETURN(pattern.literal, RequiredString(fields, "String"));
    if (pattern.literal.empty()) return parent.Error("pattern", "is empty");
    return pattern;
  }
  RESA_ASSIGN_OR_RETURN(const std::string source, RequiredString(fields, "Regex"));
  absl::StatusOr<std::unique_ptr<const Regex>> regex = Regex::Compile(source);
  if (!regex.ok()) return parent.Error("pattern", regex.status().message());
  pattern.regex = *std::move(regex);
  return pattern;
}

absl::Status AddNormalizer(const json& value, const std::string& where,
                           std::vector<NormalizerStep>* steps) {
  using Kind = NormalizerStep::Kind;
  static constexpr std::pair<absl::string_view, Kind> kPlain[] = {
      {"NFC", Kind::kNfc},
      {"NFD", Kind::kNfd},
      {"NFKC", Kind::kNfkc},
      {"NFKD", Kind::kNfkd},
      {"Lowercase", Kind::kLowercase},
      {"StripAccents", Kind::kStripAccents}};
  RESA_ASSIGN_OR_RETURN(const std::string type, TypeOf(value, where));
  const auto plain = std::find_if(std::begin(kPlain), std::end(kPlain),
                                  [&](const auto& entry) { return entry.first == type; });
  if (plain != std::end(kPlain)) {
    RESA_RETURN_IF_ERROR(CheckedObject(value, where, {"type"}).status());
    steps->push_back({.kind = plain->second});
    return absl::OkStatus();
  }
  if (type == "Sequence") {
    RESA_ASSIGN_OR_RETURN(const JsonFields fields,
                          CheckedObject(value, where, {"type", "normalizers"}));
    return ForEachMember(fields, "normalizers", [&](const json& member, const std::string& path) {
      return AddNormalizer(member, path, steps);
    });
  }
  if (type == "Replace") {
    RESA_ASSIGN_OR_RETURN(const JsonFields fields,
                          CheckedObject(value, where, {"type", "pattern", "content"}));
    NormalizerStep step{.kind = Kind::kReplace};
    RESA_ASSIGN_OR_RETURN(Pattern pattern, ParsePattern(fields));
    step.pattern = std::move(pattern.literal);
    step.regex = std::move(pattern.regex);
    RESA_ASSIGN_OR_RETURN(step.content, RequiredString(fields, "content"));
    steps->push_back(std::move(step));
    return absl::OkStatus();
  }
  if (type == "Prepend") {
    RESA_ASSIGN_OR_RETURN(const JsonFields fields,
                          CheckedObject(value, where, {"type", "prepend"}));
    NormalizerStep step{.kind = Kind::kPrepend};
    RESA_ASSIGN_OR_RETURN(step.content, RequiredString(fields, "prepend"));
    steps->push_back(std::move(step));
    return absl::OkStatus();
  }
  if (type == "Strip") {
    RESA_ASSIGN_OR_RETURN(const JsonFields fields,
                          CheckedObject(value, where, {"type", "strip_left", "strip_right"}));
    NormalizerStep step{.kind = Kind::kStrip};
    RESA_ASSIGN_OR_RETURN(step.left, BoolOr(fields, "strip_left", true));
    RESA_ASSIGN_OR_RETURN(step.right, BoolOr(fields, "strip_right", true));
    steps->push_back(std::move(step));
    return absl::OkStatus();
  }
  return UnsupportedType(
      where, type,
      "NFC, NFD, NFKC, NFKD, Lowercase, StripAccents, Replace, Prepend, Strip, Sequence");
}

absl::StatusOr<PreTokenizerStep> ParseSplit(const json& value, const std::string& where) {
  static constexpr std::pair<absl::string_view, SplitBehavior> kBehaviors[] = {
      {"Removed", SplitBehavior::kRemoved},
      {"Isolated", SplitBehavior::kIsolated},
      {"MergedWithPrevious", SplitBehavior::kMergedWithPrevious},
      {"MergedWithNext", SplitBehavior::kMergedWithNext},
      {"Contiguous", SplitBehavior::kContiguous}};
  RESA_ASSIGN_OR_RETURN(const JsonFields fields,
                        CheckedObject(value, where, {"type", "pattern", "behavior", "invert"}));
  PreTokenizerStep step{.kind = PreTokenizerStep::Kind::kSplit};
  RESA_ASSIGN_OR_RETURN(Pattern pattern, ParsePattern(fields));
  step.literal = std::move(pattern.literal);
  step.regex = std::move(pattern.regex);
  RESA_ASSIGN_OR_RETURN(const std::string behavior, RequiredString(fields, "behavior"));
  const auto known = std::find_if(std::begin(kBehaviors), std::end(kBehaviors),
                                  [&](const auto& entry) { return entry.first == behavior; });
  if (known == std::end(kBehaviors)) {
    return fields.Error("behavior", absl::StrCat("is \"", behavior,
                                                 "\", not Removed, Isolated, MergedWithPrevious, "
                                                 "MergedWithNext or Contiguous"));
  }
  step.behavior = known->second;
  RESA_ASSIGN_OR_RETURN(step.invert, BoolOr(fields, "invert", false));
  return step;
}

absl::StatusOr<PrependScheme> ParsePrependScheme(const JsonFields& fields) {
  RESA_ASSIGN_OR_RETURN(const std::optional<std::string> name, fields.String("prepend_scheme"));
  RESA_ASSIGN_OR_RETURN(const std::optional<bool> add_prefix, fields.Bool("add_prefix_space"));
  if (!name.has_value()) {
    return add_prefix.value_or(true) ? PrependScheme::kAlways : PrependScheme::kNever;
  }
  if (*name != "always" && *name != "never" && *name != "first") {
    return fields.Error("prepend_scheme",
                        absl::StrCat("is \"", *name, "\", not always, never or first"));
  }
  if (add_prefix.has_value() && *add_prefix != (*name != "never")) {
    return fields.Error("prepend_scheme", "contradicts add_prefix_space");
  }
  return *name == "always"  ? PrependScheme::kAlways
         : *name == "first" ? PrependScheme::kFirst
                            : PrependScheme::kNever;
}

absl::StatusOr<PreTokenizerStep> ParseMetaspace(const json& value, const std::string& where) {
  RESA_ASSIGN_OR_RETURN(const JsonFields fields,
                        CheckedObject(value, where,
                                      {"type", "replacement", "prepend_scheme", "split",
                                       "add_prefix_space", "str_rep"}));
  PreTokenizerStep step{.kind = PreTokenizerStep::Kind::kMetaspace};
  RESA_ASSIGN_OR_RETURN(step.replacement, RequiredCharacter(fields, "replacement"));
  RESA_ASSIGN_OR_RETURN(step.prepend_scheme, ParsePrependScheme(fields));
  RESA_ASSIGN_OR_RETURN(step.split_words, BoolOr(fields, "split", true));
  return step;
}

absl::StatusOr<PreTokenizerStep> ParseByteLevel(const json& value, const std::string& where) {
  RESA_ASSIGN_OR_RETURN(
      const JsonFields fields,
      CheckedObject(value, where, {"type", "add_prefix_space", "trim_offsets", "use_regex"}));
  PreTokenizerStep step{.kind = PreTokenizerStep::Kind::kByteLevel};
  RESA_ASSIGN_OR_RETURN(step.add_prefix_space, BoolOr(fields, "add_prefix_space", true));
  RESA_ASSIGN_OR_RETURN(const bool use_regex, BoolOr(fields, "use_regex", true));
  if (use_regex) {
    RESA_ASSIGN_OR_RETURN(step.regex, Regex::Compile(kGpt2Pattern));
  }
  return step;
}

absl::Status AddPreTokenizer(const json& value, const std::string& where,
                             std::vector<PreTokenizerStep>* steps) {
  RESA_ASSIGN_OR_RETURN(const std::string type, TypeOf(value, where));
  if (type == "Sequence") {
    RESA_ASSIGN_OR_RETURN(const JsonFields fields,
                          CheckedObject(value, where, {"type", "pretokenizers"}));
    return ForEachMember(fields, "pretokenizers", [&](const json& member, const std::string& path) {
      return AddPreTokenizer(member, path, steps);
    });
  }
  if (!steps->empty() && steps->back().kind == PreTokenizerStep::Kind::kByteLevel) {
    return absl::InvalidArgumentError(absl::StrCat(
        where, ": ", type, " after ByteLevel is not supported: ByteLevel must be last"));
  }
  PreTokenizerStep step{};
  if (type == "Split") {
    RESA_ASSIGN_OR_RETURN(step, ParseSplit(value, where));
  } else if (type == "Digits") {
    RESA_ASSIGN_OR_RETURN(const JsonFields fields,
                          CheckedObject(value, where, {"type", "individual_digits"}));
    step.kind = PreTokenizerStep::Kind::kDigits;
    RESA_ASSIGN_OR_RETURN(step.individual_digits, BoolOr(fields, "individual_digits", false));
  } else if (type == "Metaspace") {
    RESA_ASSIGN_OR_RETURN(step, ParseMetaspace(value, where));
  } else if (type == "ByteLevel") {
    RESA_ASSIGN_OR_RETURN(step, ParseByteLevel(value, where));
  } else {
    return UnsupportedType(where, type, "ByteLevel, Split, Digits, Metaspace, Sequence");
  }
  steps->push_back(std::move(step));
  return absl::OkStatus();
}

// How far a decoder's sequence has come: each stage allows those after it only.
enum class DecoderStage { kTokens, kBytesDone, kFused, kStripped };

struct DecoderBuilder {
  TokenDecoderConfig config;
  DecoderStage stage = DecoderStage::kTokens;
  int members = 0;
};

absl::Status OutOfOrder(const std::string& where, absl::string_view type) {
  return absl::InvalidArgumentError(absl::StrCat(
      where, ": ", type,
      " is not supported at this place; supported is ByteLevel alone, or Replace, Strip and "
      "Metaspace, then ByteFallback, then Fuse, then one Strip with stop 0"));
}

absl::Status AddStripDecoder(const json& value, const std::string& where, DecoderBuilder* builder) {
  RESA_ASSIGN_OR_RETURN(const JsonFields fields,
                        CheckedObject(value, where, {"type", "content", "start", "stop"}));
  RESA_ASSIGN_OR_RETURN(std::string content, RequiredCharacter(fields, "content"));
  RESA_ASSIGN_OR_RETURN(const int64_t start, fields.RequiredInt("start", 0, 1 << 20));
  RESA_ASSIGN_OR_RETURN(const int64_t stop, fields.RequiredInt("stop", 0, 1 << 20));
  if (builder->stage == DecoderStage::kTokens) {
    builder->config.steps.push_back({.kind = TokenDecoderConfig::Step::Kind::kStrip,
                                     .pattern = std::move(content),
                                     .content = {},
                                     .start = start,
                                     .stop = stop});
    return absl::OkStatus();
  }
  if (builder->stage != DecoderStage::kFused || stop != 0) return OutOfOrder(where, "Strip");
  builder->config.strip_text = std::move(content);
  builder->config.strip_text_count = start;
  builder->stage = DecoderStage::kStripped;
  return absl::OkStatus();
}

absl::Status AddTokenStep(const json& value, const std::string& where, const std::string& type,
                          DecoderBuilder* builder) {
  TokenDecoderConfig::Step step{};
  if (type == "Replace") {
    RESA_ASSIGN_OR_RETURN(const JsonFields fields,
                          CheckedObject(value, where, {"type", "pattern", "content"}));
    RESA_ASSIGN_OR_RETURN(Pattern pattern, ParsePattern(fields));
    if (pattern.regex != nullptr) {
      return fields.Error("pattern", "must be a String here: Regex is not supported in a decoder");
    }
    step.kind = TokenDecoderConfig::Step::Kind::kReplace;
    step.pattern = std::move(pattern.literal);
    RESA_ASSIGN_OR_RETURN(step.content, RequiredString(fields, "content"));
  } else {
    RESA_ASSIGN_OR_RETURN(PreTokenizerStep metaspace, ParseMetaspace(value, where));
    step.kind = TokenDecoderConfig::Step::Kind::kMetaspace;
    step.pattern = std::move(metaspace.replacement);
    step.drop_first = metaspace.prepend_scheme != PrependScheme::kNever;
  }
  if (builder->stage != DecoderStage::kTokens) return OutOfOrder(where, type);
  builder->config.steps.push_back(std::move(step));
  return absl::OkStatus();
}

absl::Status AddDecoder(const json& value, const std::string& where, DecoderBuilder* builder) {
  RESA_ASSIGN_OR_RETURN(const std::string type, TypeOf(value, where));
  if (type == "Sequence") {
    RESA_ASSIGN_OR_RETURN(const JsonFields fields,
                          CheckedObject(value, where, {"type", "decoders"}));
    return ForEachMember(fields, "decoders", [&](const json& member, const std::string& path) {
      return AddDecoder(member, path, builder);
    });
  }
  const bool first = builder->members++ == 0;
  if (!first && builder->config.kind == TokenDecoderConfig::Kind::kByteLevel) {
    return OutOfOrder(where, type);
  }
  builder->config.kind = TokenDecoderConfig::Kind::kSteps;
  if (type == "ByteLevel") {
    if (!first) return OutOfOrder(where, type);
    builder->config.kind = TokenDecoderConfig::Kind::kByteLevel;
    return CheckedObject(value, where, {"type", "add_prefix_space", "trim_offsets", "use_regex"})
        .status();
  }
  if (type == "Replace" || type == "Metaspace") return AddTokenStep(value, where, type, builder);
  if (type == "Strip") return AddStripDecoder(value, where, builder);
  if (type == "ByteFallback") {
    if (builder->stage != DecoderStage::kTokens) return OutOfOrder(where, type);
    builder->config.byte_fallback = true;
    builder->stage = DecoderStage::kBytesDone;
    return CheckedObject(value, where, {"type"}).status();
  }
  if (type == "Fuse") {
    if (builder->stage > DecoderStage::kFused) return OutOfOrder(where, type);
    builder->stage = DecoderStage::kFused;
    return CheckedObject(value, where, {"type"}).status();
  }
  return UnsupportedType(where, type,
                         "ByteLevel, Replace, Strip, Metaspace, ByteFallback, Fuse, Sequence");
}

}  // namespace

absl::StatusOr<JsonFields> CheckedObject(const json& value, std::string where,
                                         std::initializer_list<absl::string_view> known) {
  if (!value.is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": must be an object, not ", value.type_name()));
  }
  for (const auto& [key, member] : value.items()) {
    if (std::find(known.begin(), known.end(), key) == known.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": the member \"", key, "\" is not known"));
    }
  }
  return JsonFields(value, std::move(where));
}

absl::StatusOr<std::string> TypeOf(const json& value, const std::string& where) {
  if (!value.is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": must be an object, not ", value.type_name()));
  }
  return RequiredString(JsonFields(value, where), "type");
}

absl::Status UnsupportedType(const std::string& where, absl::string_view type,
                             absl::string_view supported) {
  return absl::InvalidArgumentError(
      absl::StrCat(where, ": the type \"", type, "\" is not supported; supported are ", supported));
}

absl::StatusOr<std::string> RequiredString(const JsonFields& fields, const char* key) {
  RESA_ASSIGN_OR_RETURN(std::optional<std::string> text, fields.String(key));
  if (!text.has_value()) return fields.Error(key, "is missing");
  return *std::move(text);
}

absl::StatusOr<bool> BoolOr(const JsonFields& fields, const char* key, bool otherwise) {
  RESA_ASSIGN_OR_RETURN(const std::optional<bool> value, fields.Bool(key));
  return value.value_or(otherwise);
}

absl::StatusOr<std::vector<NormalizerStep>> ParseNormalizer(const json& value,
                                                            const std::string& where) {
  std::vector<NormalizerStep> steps;
  if (!value.is_null()) RESA_RETURN_IF_ERROR(AddNormalizer(value, where, &steps));
  return steps;
}

absl::StatusOr<std::vector<PreTokenizerStep>> ParsePreTokenizer(const json& value,
                                                                const std::string& where) {
  std::vector<PreTokenizerStep> steps;
  if (!value.is_null()) RESA_RETURN_IF_ERROR(AddPreTokenizer(value, where, &steps));
  return steps;
}

absl::StatusOr<TokenDecoderConfig> ParseDecoder(const json& value, const std::string& where) {
  DecoderBuilder builder;
  if (!value.is_null()) RESA_RETURN_IF_ERROR(AddDecoder(value, where, &builder));
  return builder.config;
}

}  // namespace resa::engine
