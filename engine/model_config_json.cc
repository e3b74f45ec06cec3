// ModelConfigFromJson: config.json and generation_config.json of a Hugging Face directory.

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "engine/model_config.h"
#include "engine/status_macros.h"
#include "engine/stored_tensor.h"
#include "engine/strict_json.h"

namespace resa::engine {
namespace {

using nlohmann::json;

constexpr int64_t kIntMax = std::numeric_limits<int32_t>::max();
constexpr double kHuge = 1e18;

struct Architecture {
  const char* class_name;
  const char* model_type;
  std::optional<int32_t> default_head_dim;  // Unset: hidden_size / num_attention_heads.
};
constexpr Architecture kArchitectures[] = {{"Qwen2ForCausalLM", "qwen2", {}},
                                           {"Qwen3ForCausalLM", "qwen3", 128},
                                           {"LlamaForCausalLM", "llama", {}},
                                           {"MistralForCausalLM", "mistral", {}}};
constexpr char kSupported[] =
    "Qwen2ForCausalLM, Qwen3ForCausalLM, LlamaForCausalLM and MistralForCausalLM";

absl::StatusOr<Architecture> FindArchitecture(const JsonFields& fields) {
  std::string class_name;
  if (const json* list = fields.Find("architectures"); list != nullptr) {
    if (!list->is_array() || list->size() != 1 || !list->front().is_string()) {
      return fields.Error("architectures", "must be a list of one string");
    }
    class_name = list->front().get<std::string>();
  }
  RESA_ASSIGN_OR_RETURN(const std::optional<std::string> model_type, fields.String("model_type"));
  for (const Architecture& known : kArchitectures) {
    if (class_name.empty() ? model_type == known.model_type : class_name == known.class_name) {
      return known;
    }
  }
  return fields.Error(
      "architectures",
      absl::StrCat("says ", Quoted(class_name.empty() ? model_type.value_or("") : class_name),
                   ", which is not supported; supported are ", kSupported));
}

// What would change the computation and is not implemented.
absl::Status RefuseUnsupported(const JsonFields& fields) {
  if (fields.Has("quantization_config")) {
    return fields.Error("quantization_config",
                        "is set, but quantised safetensors are not supported; use the bf16, f16 or "
                        "f32 weights, or a GGUF file");
  }
  for (const char* key : {"hidden_act", "hidden_activation"}) {
    RESA_ASSIGN_OR_RETURN(const std::optional<std::string> activation, fields.String(key));
    if (activation && *activation != "silu" && *activation != "swish") {
      return fields.Error(key, absl::StrCat("is ", Quoted(*activation), "; expected 'silu'"));
    }
  }
  RESA_ASSIGN_OR_RETURN(const std::optional<double> partial,
                        fields.Number("partial_rotary_factor", 0, 1));
  if (partial && *partial != 1.0) {
    return fields.Error("partial_rotary_factor", "must be 1: partial rotation is not supported");
  }
  return absl::OkStatus();
}

absl::Status ReadShape(const JsonFields& fields, const Architecture& architecture,
                       ModelConfig& config) {
  const struct {
    const char* key;
    int32_t* field;
  } required[] = {{"vocab_size", &config.vocab_size},
                  {"hidden_size", &config.hidden_size},
                  {"intermediate_size", &config.intermediate_size},
                  {"num_hidden_layers", &config.num_layers},
                  {"num_attention_heads", &config.num_heads},
                  {"max_position_embeddings", &config.max_position}};
  for (const auto& [key, field] : required) {
    RESA_ASSIGN_OR_RETURN(*field, fields.RequiredInt(key, 1, kIntMax));
  }
  RESA_ASSIGN_OR_RETURN(const auto kv_heads, fields.Int("num_key_value_heads", 1, kIntMax));
  config.num_kv_heads = static_cast<int32_t>(kv_heads.value_or(config.num_heads));
  RESA_ASSIGN_OR_RETURN(const auto head_dim, fields.Int("head_dim", 1, kIntMax));
  if (head_dim) {
    config.head_dim = static_cast<int32_t>(*head_dim);
  } else if (architecture.default_head_dim) {
    config.head_dim = *architecture.default_head_dim;
  } else if (config.hidden_size % config.num_heads == 0) {
    config.head_dim = config.hidden_size / config.num_heads;
  } else {
    return fields.Error(
        "head_dim", absl::StrCat("is missing, and hidden_size ", config.hidden_size,
                                 " is not a multiple of num_attention_heads ", config.num_heads));
  }
  RESA_ASSIGN_OR_RETURN(config.rms_norm_eps, fields.RequiredNumber("rms_norm_eps", 0, 1));
  return absl::OkStatus();
}

absl::Status ReadBiases(const JsonFields& fields, ModelConfig& config) {
  RESA_ASSIGN_OR_RETURN(const auto tie, fields.Bool("tie_word_embeddings"));
  config.tie_embeddings = tie.value_or(false);
  if (config.model_type == "qwen2") {
    config.qkv_bias = true;
  } else if (config.model_type == "llama" || config.model_type == "qwen3") {
    RESA_ASSIGN_OR_RETURN(const auto bias, fields.Bool("attention_bias"));
    config.qkv_bias = config.o_bias = bias.value_or(false);
  }
  if (config.model_type == "llama") {
    RESA_ASSIGN_OR_RETURN(const auto bias, fields.Bool("mlp_bias"));
    config.mlp_bias = bias.value_or(false);
  }
  config.qk_norm = config.model_type == "qwen3";
  return absl::OkStatus();
}

// YaRN's magnitude correction (arXiv 2309.00071, section 3.4), with the weight some configs give
// it.
double YarnMagnitude(double factor, double weight) {
  return factor <= 1.0 ? 1.0 : 0.1 * weight * std::log(factor) + 1.0;
}

absl::Status ReadYarn(const JsonFields& rope, bool has_factor, RopeScaling& scaling,
                      ModelConfig& config) {
  if (!has_factor) {
    scaling.factor = static_cast<double>(config.max_position) /
                     static_cast<double>(std::max<int64_t>(1, scaling.original_max_position));
  }
  RESA_ASSIGN_OR_RETURN(const auto fast, rope.Number("beta_fast", 0, kHuge));
  RESA_ASSIGN_OR_RETURN(const auto slow, rope.Number("beta_slow", 0, kHuge));
  scaling.beta_fast = fast.value_or(0) == 0 ? 32.0 : *fast;
  scaling.beta_slow = slow.value_or(0) == 0 ? 1.0 : *slow;
  RESA_ASSIGN_OR_RETURN(const auto truncate, rope.Bool("truncate"));
  scaling.truncate = truncate.value_or(true);
  RESA_ASSIGN_OR_RETURN(const auto given, rope.Number("attention_factor", 0, kHuge));
  RESA_ASSIGN_OR_RETURN(const auto mscale, rope.Number("mscale", 0, kHuge));
  RESA_ASSIGN_OR_RETURN(const auto mscale_all, rope.Number("mscale_all_dim", 0, kHuge));
  if (given) {
    scaling.attention_factor = *given;
  } else if (mscale.value_or(0) != 0 && mscale_all.value_or(0) != 0) {
    scaling.attention_factor =
        YarnMagnitude(scaling.factor, *mscale) / YarnMagnitude(scaling.factor, *mscale_all);
  } else {
    scaling.attention_factor = YarnMagnitude(scaling.factor, 1.0);
  }
  // Qwen2.5's configs keep max_position_embeddings at the trained length: the factor extends it.
  const double reach = static_cast<double>(scaling.original_max_position) * scaling.factor;
  if (reach <= static_cast<double>(kIntMax)) {
    config.max_position = std::max(config.max_position, static_cast<int32_t>(reach));
  }
  return absl::OkStatus();
}

absl::Status ReadScaling(const JsonFields& rope, const std::string& type,
                         std::optional<int64_t> top_level_original, ModelConfig& config) {
  RopeScaling& scaling = config.rope_scaling;
  using Kind = RopeScaling::Kind;
  scaling.kind = type == "linear" ? Kind::kLinear : type == "llama3" ? Kind::kLlama3 : Kind::kYarn;
  RESA_ASSIGN_OR_RETURN(const auto factor, rope.Number("factor", 1, kHuge));
  if (!factor && scaling.kind != Kind::kYarn) return rope.Error("factor", "is missing");
  scaling.factor = factor.value_or(1.0);
  if (scaling.kind == Kind::kLinear) return absl::OkStatus();
  RESA_ASSIGN_OR_RETURN(const auto original,
                        rope.Int("original_max_position_embeddings", 1, kIntMax));
  scaling.original_max_position =
      top_level_original ? *top_level_original : original.value_or(config.max_position);
  if (scaling.kind == Kind::kYarn) return ReadYarn(rope, factor.has_value(), scaling, config);
  RESA_ASSIGN_OR_RETURN(scaling.low_freq_factor, rope.RequiredNumber("low_freq_factor", 0, kHuge));
  RESA_ASSIGN_OR_RETURN(scaling.high_freq_factor,
                        rope.RequiredNumber("high_freq_factor", 0, kHuge));
  return absl::OkStatus();
}

absl::Status ReadRope(const JsonFields& fields, ModelConfig& config) {
  RESA_ASSIGN_OR_RETURN(auto theta, fields.Number("rope_theta", 0, kHuge));
  RESA_ASSIGN_OR_RETURN(const auto top_level_original,
                        fields.Int("original_max_position_embeddings", 1, kIntMax));
  // transformers 4 writes rope_theta and rope_scaling, 5 writes rope_parameters with both inside.
  // rope_scaling wins where both stand, as there.
  const char* key = fields.Has("rope_scaling") ? "rope_scaling" : "rope_parameters";
  const json* object = fields.Find(key);
  if (object != nullptr) {
    if (!object->is_object()) return fields.Error(key, "must be an object or null");
    const JsonFields rope(*object, absl::StrCat(fields.where(), ": ", key));
    for (const auto& [name, value] : object->items()) {
      if (value.is_object()) {
        return rope.Error(name.c_str(),
                          "is an object: rotary parameters per layer type are not "
                          "supported");
      }
    }
    if (rope.Has("mrope_section")) {
      return rope.Error("mrope_section", "is set: multimodal rotation is not supported");
    }
    RESA_RETURN_IF_ERROR(RefuseUnsupported(rope));
    RESA_ASSIGN_OR_RETURN(const auto inner_theta, rope.Number("rope_theta", 0, kHuge));
    if (inner_theta) theta = inner_theta;
    RESA_ASSIGN_OR_RETURN(std::optional<std::string> type, rope.String("rope_type"));
    if (!type) {
      RESA_ASSIGN_OR_RETURN(type, rope.String("type"));
    }
    if (type == "linear" || type == "llama3" || type == "yarn") {
      RESA_RETURN_IF_ERROR(ReadScaling(rope, *type, top_level_original, config));
    } else if (type.value_or("default") != "default") {
      return rope.Error("rope_type", absl::StrCat("is ", Quoted(*type),
                                                  "; supported are default, linear, llama3, yarn"));
    }
  }
  config.rope_theta = theta.value_or(10000.0);
  return absl::OkStatus();
}

absl::StatusOr<bool> HasSlidingLayers(const JsonFields& fields, const ModelConfig& config) {
  // Mistral's window, when there is one, goes for all layers.
  if (config.model_type == "mistral") {
    return !fields.Contains("sliding_window") || fields.Has("sliding_window");
  }
  if (const json* types = fields.Find("layer_types"); types != nullptr) {
    if (!types->is_array() || static_cast<int64_t>(types->size()) != config.num_layers) {
      return fields.Error("layer_types", absl::StrCat("must be a list of ", config.num_layers,
                                                      " entries, one for each layer"));
    }
    bool any = false;
    for (const json& type : *types) {
      if (type != "full_attention" && type != "sliding_attention") {
        return fields.Error("layer_types", "has an entry other than 'full_attention'");
      }
      any = any || type == "sliding_attention";
    }
    return any;
  }
  if (config.model_type == "llama") return false;
  RESA_ASSIGN_OR_RETURN(const auto use, fields.Bool("use_sliding_window"));
  RESA_ASSIGN_OR_RETURN(const auto first, fields.Int("max_window_layers", 0, kIntMax));
  return use.value_or(false) && first.value_or(28) < config.num_layers;
}

// Sliding layers are fine as long as the window holds the whole context: then they see everything.
absl::Status CheckSlidingWindow(const JsonFields& fields, const ModelConfig& config) {
  RESA_ASSIGN_OR_RETURN(const bool sliding, HasSlidingLayers(fields, config));
  if (!sliding) return absl::OkStatus();
  RESA_ASSIGN_OR_RETURN(const auto given, fields.Int("sliding_window", 1, kIntMax));
  const int64_t window = given.value_or(4096);  // transformers' default.
  if (window >= config.max_position) return absl::OkStatus();
  return fields.Error(
      "sliding_window",
      absl::StrCat("is ", window, ", below the context of ", config.max_position,
                   " tokens, and sliding-window attention is not supported; set it to null, or "
                   "max_position_embeddings to ",
                   window, ", if the model allows it"));
}

absl::Status ReadTokenIds(const JsonFields& fields, ModelConfig& config) {
  if (const json* eos = fields.Find("eos_token_id"); eos != nullptr) {
    std::vector<int32_t> ids;
    const json list = eos->is_array() ? *eos : json::array({*eos});
    for (const json& id : list) {
      if (!id.is_number_unsigned() || id.get<uint64_t>() > static_cast<uint64_t>(kIntMax)) {
        return fields.Error("eos_token_id", "must be a token id or a list of them");
      }
      ids.push_back(id.get<int32_t>());
    }
    config.eos_ids = std::move(ids);
  }
  // Old configs write -1 for "none".
  RESA_ASSIGN_OR_RETURN(const auto bos, fields.Int("bos_token_id", -1, kIntMax));
  if (bos && *bos >= 0) config.bos_id = static_cast<int32_t>(*bos);
  return absl::OkStatus();
}

absl::StatusOr<json> ParseObject(absl::string_view text, absl::string_view file) {
  RESA_ASSIGN_OR_RETURN(json object, ParseStrictJson(text, file));
  if (!object.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(file, ": must hold a JSON object"));
  }
  return object;
}

}  // namespace

absl::StatusOr<ModelConfig> ModelConfigFromJson(absl::string_view text, absl::string_view file,
                                                absl::string_view generation_text,
                                                absl::string_view generation_file) {
  RESA_ASSIGN_OR_RETURN(const json object, ParseObject(text, file));
  const JsonFields fields(object, std::string(file));
  RESA_ASSIGN_OR_RETURN(const Architecture architecture, FindArchitecture(fields));
  ModelConfig config;
  config.architecture = architecture.class_name;
  config.model_type = architecture.model_type;
  RESA_RETURN_IF_ERROR(RefuseUnsupported(fields));
  RESA_RETURN_IF_ERROR(ReadShape(fields, architecture, config));
  RESA_RETURN_IF_ERROR(ReadBiases(fields, config));
  RESA_RETURN_IF_ERROR(ReadRope(fields, config));
  RESA_RETURN_IF_ERROR(CheckSlidingWindow(fields, config));
  RESA_RETURN_IF_ERROR(ReadTokenIds(fields, config));
  if (!generation_text.empty()) {
    RESA_ASSIGN_OR_RETURN(const json generation, ParseObject(generation_text, generation_file));
    // Its sampling defaults are not taken: a request's are those of the API, whatever the model.
    RESA_RETURN_IF_ERROR(
        ReadTokenIds(JsonFields(generation, std::string(generation_file)), config));
  }
  RESA_RETURN_IF_ERROR(ValidateModelConfig(config, file));
  return config;
}

}  // namespace resa::engine
