#include "engine/tokenizer_json.h"

#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/mapped_file.h"
#include "engine/status_macros.h"
#include "engine/tokenizer.h"

namespace resa::engine {
namespace {

using nlohmann::json;

constexpr char kFile[] = "tokenizer.json";
constexpr char kConfigFile[] = "tokenizer_config.json";
constexpr char kTemplateFile[] = "chat_template.jinja";

// Puts the path in front of an error that does not know it.
absl::Status At(absl::string_view where, const absl::Status& status) {
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat(where, ": ", status.message()));
}

std::string Path(absl::string_view section) { return absl::StrCat(kFile, ": ", section); }

absl::StatusOr<int32_t> TokenId(const json& value, absl::string_view where) {
  if (!value.is_number_unsigned() || value.get<uint64_t>() >= kMaxTokenIds) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, " must be a token id from 0 to ", kMaxTokenIds - 1));
  }
  return static_cast<int32_t>(value.get<uint64_t>());
}

// A merge is "left right" in older files, ["left", "right"] in newer ones.
absl::StatusOr<std::pair<std::string, std::string>> ParseMerge(const json& value,
                                                               const std::string& where) {
  if (value.is_string()) {
    const auto& text = value.get_ref<const std::string&>();
    const size_t space = text.find(' ');
    if (space != std::string::npos && space > 0 && space + 1 < text.size() &&
        text.find(' ', space + 1) == std::string::npos) {
      return std::pair(text.substr(0, space), text.substr(space + 1));
    }
  } else if (value.is_array() && value.size() == 2 && value[0].is_string() &&
             value[1].is_string()) {
    auto left = value[0].get<std::string>();
    auto right = value[1].get<std::string>();
    if (!left.empty() && !right.empty()) return std::pair(std::move(left), std::move(right));
  }
  return absl::InvalidArgumentError(
      absl::StrCat(where, " must be two tokens: \"left right\" or [\"left\", \"right\"]"));
}

absl::Status RefuseNonEmpty(const JsonFields& fields, const char* key) {
  RESA_ASSIGN_OR_RETURN(const std::optional<std::string> text, fields.String(key));
  if (!text.has_value() || text->empty()) return absl::OkStatus();
  return fields.Error(key, "is not supported; it must be null or empty");
}

absl::StatusOr<BpeConfig> ParseModel(const json& value) {
  const std::string where = Path("model");
  if (!value.is_object()) return absl::InvalidArgumentError(where + ": must be an object");
  // Old files leave the type of the one model with merges out.
  if (value.contains("type") || !value.contains("merges")) {
    RESA_ASSIGN_OR_RETURN(const std::string type, TypeOf(value, where));
    if (type != "BPE") return UnsupportedType(where, type, "BPE");
  }
  RESA_ASSIGN_OR_RETURN(const JsonFields fields,
                        CheckedObject(value, where,
                                      {"type", "dropout", "unk_token", "continuing_subword_prefix",
                                       "end_of_word_suffix", "fuse_unk", "byte_fallback",
                                       "ignore_merges", "vocab", "merges"}));
  // Dropout is for training: it would make tokens random.
  RESA_ASSIGN_OR_RETURN(const std::optional<double> dropout, fields.Number("dropout", 0, 0));
  static_cast<void>(dropout);
  RESA_RETURN_IF_ERROR(RefuseNonEmpty(fields, "continuing_subword_prefix"));
  RESA_RETURN_IF_ERROR(RefuseNonEmpty(fields, "end_of_word_suffix"));
  BpeConfig config;
  RESA_ASSIGN_OR_RETURN(config.unk_token, fields.String("unk_token"));
  RESA_ASSIGN_OR_RETURN(config.fuse_unk, BoolOr(fields, "fuse_unk", false));
  RESA_ASSIGN_OR_RETURN(config.byte_fallback, BoolOr(fields, "byte_fallback", false));
  RESA_ASSIGN_OR_RETURN(config.ignore_merges, BoolOr(fields, "ignore_merges", false));
  const json* vocab = fields.Find("vocab");
  if (vocab == nullptr || !vocab->is_object()) {
    return fields.Error("vocab", "must be an object of tokens and their ids");
  }
  config.vocab.reserve(vocab->size());
  for (const auto& [token, id] : vocab->items()) {
    RESA_ASSIGN_OR_RETURN(const int32_t number,
                          TokenId(id, absl::StrCat(where, ".vocab: the id of \"", token, "\"")));
    // The empty token never comes out of a text and has no text.
    if (!token.empty()) config.vocab.emplace_back(token, number);
  }
  const json* merges = fields.Find("merges");
  if (merges == nullptr || !merges->is_array()) return fields.Error("merges", "must be an array");
  config.merges.reserve(merges->size());
  for (size_t i = 0; i < merges->size(); ++i) {
    RESA_ASSIGN_OR_RETURN(auto merge,
                          ParseMerge((*merges)[i], absl::StrCat(where, ".merges[", i, "]")));
    config.merges.push_back(std::move(merge));
  }
  return config;
}

absl::StatusOr<std::vector<AddedToken>> ParseAddedTokens(const json& value) {
  std::vector<AddedToken> tokens;
  if (value.is_null()) return tokens;
  if (!value.is_array()) return absl::InvalidArgumentError(Path("added_tokens: must be an array"));
  for (size_t i = 0; i < value.size(); ++i) {
    const std::string where = Path(absl::StrCat("added_tokens[", i, "]"));
    RESA_ASSIGN_OR_RETURN(const JsonFields fields,
                          CheckedObject(value[i], where,
                                        {"id", "content", "single_word", "lstrip", "rstrip",
                                         "normalized", "special"}));
    AddedToken token;
    RESA_ASSIGN_OR_RETURN(const int64_t id, fields.RequiredInt("id", 0, kMaxTokenIds - 1));
    token.id = static_cast<int32_t>(id);
    RESA_ASSIGN_OR_RETURN(token.content, RequiredString(fields, "content"));
    RESA_ASSIGN_OR_RETURN(token.single_word, BoolOr(fields, "single_word", false));
    RESA_ASSIGN_OR_RETURN(token.lstrip, BoolOr(fields, "lstrip", false));
    RESA_ASSIGN_OR_RETURN(token.rstrip, BoolOr(fields, "rstrip", false));
    RESA_ASSIGN_OR_RETURN(token.special, BoolOr(fields, "special", false));
    RESA_ASSIGN_OR_RETURN(token.normalized, BoolOr(fields, "normalized", !token.special));
    tokens.push_back(std::move(token));
  }
  return tokens;
}

// The ids that a template puts before and after a text.
struct Surroundings {
  std::vector<int32_t> prefix;
  std::vector<int32_t> suffix;
};

absl::StatusOr<std::vector<int32_t>> TemplateTokenIds(const JsonFields& fields,
                                                      const std::string& name,
                                                      const std::string& where) {
  const json* tokens = fields.Find("special_tokens");
  if (tokens == nullptr || !tokens->is_object() || !tokens->contains(name)) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": \"", name, "\" is not among special_tokens"));
  }
  const std::string path = absl::StrCat(where, ".special_tokens[\"", name, "\"]");
  RESA_ASSIGN_OR_RETURN(const JsonFields token,
                        CheckedObject((*tokens)[name], path, {"id", "ids", "tokens"}));
  const json* ids = token.Find("ids");
  if (ids == nullptr || !ids->is_array()) return token.Error("ids", "must be an array");
  std::vector<int32_t> result;
  for (const json& id : *ids) {
    RESA_ASSIGN_OR_RETURN(const int32_t number, TokenId(id, path + ".ids"));
    result.push_back(number);
  }
  return result;
}

absl::StatusOr<Surroundings> ParseTemplate(const json& value, const std::string& where) {
  RESA_ASSIGN_OR_RETURN(const JsonFields fields,
                        CheckedObject(value, where, {"type", "single", "pair", "special_tokens"}));
  const json* single = fields.Find("single");
  if (single == nullptr || !single->is_array()) return fields.Error("single", "must be an array");
  Surroundings result;
  bool seen_text = false;
  for (size_t i = 0; i < single->size(); ++i) {
    const std::string path = absl::StrCat(where, ".single[", i, "]");
    RESA_ASSIGN_OR_RETURN(const JsonFields piece,
                          CheckedObject((*single)[i], path, {"SpecialToken", "Sequence"}));
    const char* const kind = piece.Has("SpecialToken") ? "SpecialToken" : "Sequence";
    const json* inner = piece.Find(kind);
    if (inner == nullptr || piece.Has("SpecialToken") == piece.Has("Sequence")) {
      return absl::InvalidArgumentError(path + ": must be a SpecialToken or a Sequence");
    }
    RESA_ASSIGN_OR_RETURN(const JsonFields named, CheckedObject(*inner, path, {"id", "type_id"}));
    RESA_ASSIGN_OR_RETURN(const std::string id, RequiredString(named, "id"));
    if (piece.Has("Sequence")) {
      if (id != "A" || seen_text) {
        return absl::InvalidArgumentError(path + ": the sequence must be A, and only once");
      }
      seen_text = true;
      continue;
    }
    RESA_ASSIGN_OR_RETURN(const std::vector<int32_t> ids, TemplateTokenIds(fields, id, where));
    std::vector<int32_t>& side = seen_text ? result.suffix : result.prefix;
    side.insert(side.end(), ids.begin(), ids.end());
  }
  if (!seen_text) return fields.Error("single", "has no Sequence A");
  return result;
}

// BertProcessing and RobertaProcessing: ["token", id] before and after.
absl::StatusOr<Surroundings> ParseClsSep(const json& value, const std::string& where) {
  RESA_ASSIGN_OR_RETURN(
      const JsonFields fields,
      CheckedObject(value, where, {"type", "sep", "cls", "trim_offsets", "add_prefix_space"}));
  Surroundings result;
  for (const auto& [key, side] : {std::pair("cls", &result.prefix), {"sep", &result.suffix}}) {
    const json* pair = fields.Find(key);
    if (pair == nullptr || !pair->is_array() || pair->size() != 2 || !(*pair)[0].is_string()) {
      return fields.Error(key, "must be a token and its id");
    }
    RESA_ASSIGN_OR_RETURN(const int32_t id, TokenId((*pair)[1], absl::StrCat(where, ".", key)));
    side->push_back(id);
  }
  return result;
}

absl::Status AddPostProcessor(const json& value, const std::string& where,
                              Surroundings* surroundings) {
  RESA_ASSIGN_OR_RETURN(const std::string type, TypeOf(value, where));
  Surroundings added;
  if (type == "Sequence") {
    RESA_ASSIGN_OR_RETURN(const JsonFields fields,
                          CheckedObject(value, where, {"type", "processors"}));
    const json* list = fields.Find("processors");
    if (list == nullptr || !list->is_array()) return fields.Error("processors", "must be an array");
    for (size_t i = 0; i < list->size(); ++i) {
      RESA_RETURN_IF_ERROR(
          AddPostProcessor((*list)[i], absl::StrCat(where, ".processors[", i, "]"), surroundings));
    }
  } else if (type == "TemplateProcessing") {
    RESA_ASSIGN_OR_RETURN(added, ParseTemplate(value, where));
  } else if (type == "BertProcessing" || type == "RobertaProcessing") {
    RESA_ASSIGN_OR_RETURN(added, ParseClsSep(value, where));
  } else if (type != "ByteLevel") {  // Which only concerns offsets.
    return UnsupportedType(
        where, type, "TemplateProcessing, ByteLevel, BertProcessing, RobertaProcessing, Sequence");
  }
  // A later processor's tokens go around those of an earlier one.
  added.prefix.insert(added.prefix.end(), surroundings->prefix.begin(), surroundings->prefix.end());
  surroundings->prefix = std::move(added.prefix);
  surroundings->suffix.insert(surroundings->suffix.end(), added.suffix.begin(), added.suffix.end());
  return absl::OkStatus();
}

absl::StatusOr<TokenizerParts> ParseTokenizer(absl::string_view text) {
  if (text.size() > Tokenizer::kMaxFileBytes) {
    return absl::InvalidArgumentError(Path("the file is too large"));
  }
  RESA_ASSIGN_OR_RETURN(const json root, ParseStrictJson(text, kFile));
  RESA_ASSIGN_OR_RETURN(
      const JsonFields fields,
      CheckedObject(root, kFile,
                    {"version", "truncation", "padding", "added_tokens", "normalizer",
                     "pre_tokenizer", "post_processor", "decoder", "model"}));
  RESA_ASSIGN_OR_RETURN(const std::optional<std::string> version, fields.String("version"));
  if (version.has_value() && *version != "1.0") {
    return fields.Error("version", absl::StrCat("is \"", *version, "\", not \"1.0\""));
  }
  static const json kNull;
  const auto section = [&fields](const char* key) -> const json& {
    const json* value = fields.Find(key);
    return value == nullptr ? kNull : *value;
  };
  TokenizerParts parts;
  RESA_ASSIGN_OR_RETURN(auto normalizer,
                        ParseNormalizer(section("normalizer"), Path("normalizer")));
  parts.normalizer = Normalizer(std::move(normalizer));
  RESA_ASSIGN_OR_RETURN(auto pre_tokenizer,
                        ParsePreTokenizer(section("pre_tokenizer"), Path("pre_tokenizer")));
  parts.pre_tokenizer = PreTokenizer(std::move(pre_tokenizer));
  RESA_ASSIGN_OR_RETURN(parts.decoder, ParseDecoder(section("decoder"), Path("decoder")));
  RESA_ASSIGN_OR_RETURN(parts.added_tokens, ParseAddedTokens(section("added_tokens")));
  Surroundings surroundings;
  if (fields.Has("post_processor")) {
    RESA_RETURN_IF_ERROR(
        AddPostProcessor(section("post_processor"), Path("post_processor"), &surroundings));
  }
  parts.prefix = std::move(surroundings.prefix);
  parts.suffix = std::move(surroundings.suffix);
  RESA_ASSIGN_OR_RETURN(BpeConfig model, ParseModel(section("model")));
  model.byte_level = parts.pre_tokenizer.byte_level();
  if (model.byte_level && model.byte_fallback) {
    return absl::InvalidArgumentError(
        Path("model: byte_fallback with a ByteLevel pre-tokenizer is not supported"));
  }
  absl::StatusOr<std::unique_ptr<const Bpe>> bpe = Bpe::Create(std::move(model));
  if (!bpe.ok()) return At(Path("model"), bpe.status());
  parts.model = *std::move(bpe);
  return parts;
}

// A token of tokenizer_config.json: "<s>", or an object with its content.
absl::StatusOr<std::optional<std::string>> ConfigToken(const JsonFields& fields, const char* key) {
  const json* value = fields.Find(key);
  if (value != nullptr && value->is_object()) {
    return JsonFields(*value, absl::StrCat(fields.where(), ": ", key)).String("content");
  }
  return fields.String(key);
}

// One template, or a list of named ones of which "default" is for plain chats.
absl::StatusOr<std::string> ConfigTemplate(const JsonFields& fields) {
  const json* value = fields.Find("chat_template");
  if (value == nullptr || !value->is_array()) {
    RESA_ASSIGN_OR_RETURN(std::optional<std::string> text, fields.String("chat_template"));
    return std::move(text).value_or("");
  }
  for (const json& entry : *value) {
    if (!entry.is_object()) return fields.Error("chat_template", "must hold objects");
    const JsonFields named(entry, absl::StrCat(fields.where(), ": chat_template"));
    RESA_ASSIGN_OR_RETURN(const std::string name, RequiredString(named, "name"));
    if (name == "default") return RequiredString(named, "template");
  }
  return std::string();
}

struct TokenizerConfig {
  std::optional<std::string> bos_token;
  std::optional<std::string> eos_token;
  std::string chat_template;
};

absl::StatusOr<TokenizerConfig> ParseConfig(absl::string_view text) {
  TokenizerConfig config;
  if (text.empty()) return config;
  RESA_ASSIGN_OR_RETURN(const json root, ParseStrictJson(text, kConfigFile));
  if (!root.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(kConfigFile, ": must be an object"));
  }
  const JsonFields fields(root, kConfigFile);
  RESA_ASSIGN_OR_RETURN(config.bos_token, ConfigToken(fields, "bos_token"));
  RESA_ASSIGN_OR_RETURN(config.eos_token, ConfigToken(fields, "eos_token"));
  RESA_ASSIGN_OR_RETURN(config.chat_template, ConfigTemplate(fields));
  return config;
}

// The id of BOS or EOS, which the model or the added tokens must have.
absl::StatusOr<std::optional<int32_t>> ResolveToken(const TokenizerParts& parts,
                                                    const std::optional<std::string>& token,
                                                    const char* key) {
  if (!token.has_value() || token->empty()) return std::nullopt;
  for (const AddedToken& added : parts.added_tokens) {
    if (added.content == *token) return added.id;
  }
  const std::optional<int32_t> id = parts.model->TokenToId(*token);
  if (id.has_value()) return id;
  return absl::InvalidArgumentError(absl::StrCat(kConfigFile, ": ", key, " is \"", *token,
                                                 "\", which is not in the vocabulary of ", kFile));
}

// nullopt when there is no such file.
absl::StatusOr<std::optional<std::string>> ReadFile(const std::string& path) {
  absl::StatusOr<std::string> text = ReadSmallFile(path, Tokenizer::kMaxFileBytes);
  if (text.ok()) return *std::move(text);
  if (absl::IsNotFound(text.status())) return std::nullopt;
  return text.status();
}

absl::StatusOr<std::unique_ptr<const Tokenizer>> Load(absl::string_view tokenizer_json,
                                                      TokenizerConfig config) {
  RESA_ASSIGN_OR_RETURN(TokenizerParts parts, ParseTokenizer(tokenizer_json));
  RESA_ASSIGN_OR_RETURN(parts.bos_id, ResolveToken(parts, config.bos_token, "bos_token"));
  RESA_ASSIGN_OR_RETURN(parts.eos_id, ResolveToken(parts, config.eos_token, "eos_token"));
  parts.chat_template = std::move(config.chat_template);
  absl::StatusOr<std::unique_ptr<const Tokenizer>> tokenizer =
      Tokenizer::FromParts(std::move(parts));
  if (!tokenizer.ok()) return At(kFile, tokenizer.status());
  return tokenizer;
}

}  // namespace

absl::StatusOr<std::unique_ptr<const Tokenizer>> Tokenizer::FromJson(
    absl::string_view tokenizer_json, absl::string_view tokenizer_config_json) {
  RESA_ASSIGN_OR_RETURN(TokenizerConfig config, ParseConfig(tokenizer_config_json));
  return Load(tokenizer_json, std::move(config));
}

absl::StatusOr<std::unique_ptr<const Tokenizer>> Tokenizer::FromDirectory(
    const std::string& model_dir) {
  const std::string path = absl::StrCat(model_dir, "/", kFile);
  RESA_ASSIGN_OR_RETURN(const std::optional<std::string> text, ReadFile(path));
  if (!text.has_value()) return absl::NotFoundError(absl::StrCat(path, ": there is no such file"));
  RESA_ASSIGN_OR_RETURN(const std::optional<std::string> config_text,
                        ReadFile(absl::StrCat(model_dir, "/", kConfigFile)));
  RESA_ASSIGN_OR_RETURN(std::optional<std::string> chat_template,
                        ReadFile(absl::StrCat(model_dir, "/", kTemplateFile)));
  absl::StatusOr<TokenizerConfig> config = ParseConfig(config_text.value_or(""));
  if (!config.ok()) return At(model_dir, config.status());
  if (chat_template.has_value()) config->chat_template = *std::move(chat_template);
  absl::StatusOr<std::unique_ptr<const Tokenizer>> tokenizer = Load(*text, *std::move(config));
  if (!tokenizer.ok()) return At(model_dir, tokenizer.status());
  return tokenizer;
}

}  // namespace resa::engine
