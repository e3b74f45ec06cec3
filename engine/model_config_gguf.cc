// ModelConfigFromGguf: metadata "<architecture>.*" and what the tensor list tells.

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "engine/gguf_dequant.h"
#include "engine/model_config.h"
#include "engine/status_macros.h"

namespace resa::engine {
namespace {

constexpr int64_t kIntMax = std::numeric_limits<int32_t>::max();
constexpr double kHuge = 1e18;

// The keys of one architecture: Int("block_count") reads "llama.block_count".
class ArchFields {
 public:
  ArchFields(const GgufFile& gguf, std::string arch) : gguf_(gguf), arch_(std::move(arch)) {}
  std::string Key(absl::string_view name) const { return absl::StrCat(arch_, ".", name); }

  absl::StatusOr<std::optional<int64_t>> Int(absl::string_view name, int64_t min) const {
    return gguf_.Int(Key(name), min, kIntMax);
  }
  absl::StatusOr<int32_t> RequiredInt(absl::string_view name) const {
    RESA_ASSIGN_OR_RETURN(const auto value, Int(name, 1));
    if (!value) return gguf_.Error(Key(name), "is missing");
    return static_cast<int32_t>(*value);
  }
  absl::StatusOr<std::optional<double>> Number(absl::string_view name, double min,
                                               double max = kHuge) const {
    return gguf_.Number(Key(name), min, max);
  }
  absl::Status Error(absl::string_view name, absl::string_view what) const {
    return gguf_.Error(Key(name), what);
  }

 private:
  const GgufFile& gguf_;
  const std::string arch_;
};

absl::Status ReadShape(const GgufFile& gguf, const ArchFields& fields, ModelConfig& config) {
  RESA_ASSIGN_OR_RETURN(config.num_layers, fields.RequiredInt("block_count"));
  RESA_ASSIGN_OR_RETURN(config.max_position, fields.RequiredInt("context_length"));
  RESA_ASSIGN_OR_RETURN(config.hidden_size, fields.RequiredInt("embedding_length"));
  RESA_ASSIGN_OR_RETURN(config.intermediate_size, fields.RequiredInt("feed_forward_length"));
  RESA_ASSIGN_OR_RETURN(config.num_heads, fields.RequiredInt("attention.head_count"));
  RESA_ASSIGN_OR_RETURN(const auto kv_heads, fields.Int("attention.head_count_kv", 1));
  config.num_kv_heads = static_cast<int32_t>(kv_heads.value_or(config.num_heads));
  RESA_ASSIGN_OR_RETURN(const auto eps, fields.Number("attention.layer_norm_rms_epsilon", 0, 1));
  if (!eps) return fields.Error("attention.layer_norm_rms_epsilon", "is missing");
  config.rms_norm_eps = static_cast<float>(*eps);

  RESA_ASSIGN_OR_RETURN(const auto key_length, fields.Int("attention.key_length", 1));
  if (!key_length && config.hidden_size % config.num_heads != 0) {
    return fields.Error("attention.key_length",
                        "is missing, and embedding_length is not a multiple of head_count");
  }
  config.head_dim =
      static_cast<int32_t>(key_length.value_or(config.hidden_size / config.num_heads));
  for (const char* name : {"attention.value_length", "rope.dimension_count"}) {
    RESA_ASSIGN_OR_RETURN(const auto value, fields.Int(name, 0));
    if (value && *value != config.head_dim) {
      return fields.Error(
          name, absl::StrCat("is ", *value, "; expected the head size ", config.head_dim));
    }
  }

  const StoredTensor* embedding = gguf.FindTensor("token_embd.weight");
  if (embedding == nullptr || embedding->shape.size() != 2 || embedding->shape[0] > kIntMax) {
    return absl::InvalidArgumentError(
        absl::StrCat(gguf.file(), ": tensor 'token_embd.weight' is missing or not a matrix"));
  }
  config.vocab_size = static_cast<int32_t>(embedding->shape[0]);
  return absl::OkStatus();
}

absl::Status ReadYarn(const ArchFields& fields, ModelConfig& config) {
  RopeScaling& scaling = config.rope_scaling;
  RESA_ASSIGN_OR_RETURN(const auto original, fields.Int("rope.scaling.original_context_length", 1));
  scaling.original_max_position = original.value_or(config.max_position);
  RESA_ASSIGN_OR_RETURN(const auto magnitude, fields.Number("rope.scaling.attn_factor", 0));
  RESA_ASSIGN_OR_RETURN(const auto fast, fields.Number("rope.scaling.yarn_beta_fast", 0));
  RESA_ASSIGN_OR_RETURN(const auto slow, fields.Number("rope.scaling.yarn_beta_slow", 0));
  scaling.beta_fast = fast.value_or(32.0);
  scaling.beta_slow = slow.value_or(1.0);
  // The format's attn_factor comes on top of YaRN's own correction (arXiv 2309.00071, 3.4).
  scaling.attention_factor = magnitude.value_or(1.0) * (0.1 * std::log(scaling.factor) + 1.0);
  const double reach = static_cast<double>(scaling.original_max_position) * scaling.factor;
  if (reach <= static_cast<double>(kIntMax)) {
    config.max_position = std::max(config.max_position, static_cast<int32_t>(reach));
  }
  return absl::OkStatus();
}

absl::Status ReadRope(const GgufFile& gguf, const ArchFields& fields, ModelConfig& config) {
  RESA_ASSIGN_OR_RETURN(const auto theta, fields.Number("rope.freq_base", 0));
  config.rope_theta = theta.value_or(10000.0);

  // A scaling key that is not understood would be silently ignored: refuse it instead.
  const std::string prefix = fields.Key("rope.scal");
  for (const auto& [key, value] : gguf.metadata()) {
    if (!absl::StartsWith(key, prefix)) continue;
    bool known = false;
    for (const char* name : {"type", "factor", "original_context_length", "attn_factor",
                             "yarn_beta_fast", "yarn_beta_slow", "finetuned"}) {
      known = known || key == fields.Key(absl::StrCat("rope.scaling.", name));
    }
    if (!known) return gguf.Error(key, "is a rope scaling that is not supported");
  }

  RESA_ASSIGN_OR_RETURN(const auto type, gguf.String(fields.Key("rope.scaling.type")));
  RESA_ASSIGN_OR_RETURN(const auto factor, fields.Number("rope.scaling.factor", 1));
  RopeScaling& scaling = config.rope_scaling;
  if (type == "linear" || type == "yarn") {
    if (!factor) return fields.Error("rope.scaling.factor", "is missing");
    scaling.kind = type == "linear" ? RopeScaling::Kind::kLinear : RopeScaling::Kind::kYarn;
    scaling.factor = *factor;
    if (type == "yarn") RESA_RETURN_IF_ERROR(ReadYarn(fields, config));
  } else if (type.value_or("none") != "none") {
    return fields.Error("rope.scaling.type",
                        absl::StrCat("is ", Quoted(*type), "; supported are none, linear, yarn"));
  }

  if (const StoredTensor* divisors = gguf.FindTensor("rope_freqs.weight"); divisors != nullptr) {
    const auto error = [&](const auto&... what) {
      return absl::InvalidArgumentError(
          absl::StrCat(gguf.file(), ": tensor 'rope_freqs.weight' ", what...));
    };
    if (scaling.kind != RopeScaling::Kind::kNone) {
      return error("and rope.scaling.type ", *type, " both scale the frequencies");
    }
    if (divisors->type != StoredType::kF32 || divisors->shape.size() != 1 ||
        divisors->shape[0] != config.head_dim / 2) {
      return error("is ", NameOf(divisors->type), " ", ShapeString(divisors->shape),
                   "; expected F32 [", config.head_dim / 2, "]");
    }
    scaling.kind = RopeScaling::Kind::kDivisors;
    scaling.divisors.resize(config.head_dim / 2);
    DecodeToFloat(StoredType::kF32, divisors->data, scaling.divisors);
  }
  return absl::OkStatus();
}

absl::Status ReadTokenIds(const GgufFile& gguf, ModelConfig& config) {
  // Files name the end of a text, of a turn and of a message; any of them ends a generation.
  for (const char* key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
                          "tokenizer.ggml.eom_token_id"}) {
    RESA_ASSIGN_OR_RETURN(const auto id, gguf.Int(key, 0, kIntMax));
    if (id &&
        std::find(config.eos_ids.begin(), config.eos_ids.end(), *id) == config.eos_ids.end()) {
      config.eos_ids.push_back(static_cast<int32_t>(*id));
    }
  }
  RESA_ASSIGN_OR_RETURN(config.bos_id, gguf.Int("tokenizer.ggml.bos_token_id", 0, kIntMax));
  return absl::OkStatus();
}

absl::Status RefuseUnsupported(const ArchFields& fields, const ModelConfig& config) {
  RESA_ASSIGN_OR_RETURN(const auto expert_count, fields.Int("expert_count", 0));
  if (const int64_t experts = expert_count.value_or(0); experts > 0) {
    return fields.Error("expert_count",
                        absl::StrCat("is ", experts, ": mixtures of experts are not supported"));
  }
  RESA_ASSIGN_OR_RETURN(const auto sliding_window, fields.Int("attention.sliding_window", 0));
  const int64_t window = sliding_window.value_or(0);
  if (window > 0 && window < config.max_position) {
    return fields.Error("attention.sliding_window",
                        absl::StrCat("is ", window, ", below the context of ", config.max_position,
                                     " tokens; sliding-window attention is not supported"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ModelConfig> ModelConfigFromGguf(const GgufFile& gguf) {
  RESA_ASSIGN_OR_RETURN(const auto arch, gguf.String("general.architecture"));
  if (!arch) return gguf.Error("general.architecture", "is missing");
  static const std::map<std::string, const char*> kArchitectures = {
      {"llama", "LlamaForCausalLM"}, {"qwen2", "Qwen2ForCausalLM"}, {"qwen3", "Qwen3ForCausalLM"}};
  const auto known = kArchitectures.find(*arch);
  if (known == kArchitectures.end()) {
    return gguf.Error("general.architecture",
                      absl::StrCat("is ", Quoted(*arch),
                                   ", which is not supported; supported are llama, qwen2, qwen3"));
  }
  ModelConfig config;
  config.architecture = known->second;
  config.model_type = *arch;
  const ArchFields fields(gguf, *arch);
  RESA_RETURN_IF_ERROR(ReadShape(gguf, fields, config));
  RESA_RETURN_IF_ERROR(ReadRope(gguf, fields, config));
  RESA_RETURN_IF_ERROR(RefuseUnsupported(fields, config));
  RESA_RETURN_IF_ERROR(ReadTokenIds(gguf, config));
  // The format has no keys for these: the tensors of the first layer tell.
  config.tie_embeddings = gguf.FindTensor("output.weight") == nullptr;
  config.qkv_bias = *arch == "qwen2" || gguf.FindTensor("blk.0.attn_q.bias") != nullptr;
  config.o_bias = gguf.FindTensor("blk.0.attn_output.bias") != nullptr;
  config.mlp_bias = gguf.FindTensor("blk.0.ffn_gate.bias") != nullptr;
  config.qk_norm = *arch == "qwen3";
  RESA_RETURN_IF_ERROR(ValidateModelConfig(config, gguf.file()));
  return config;
}

}  // namespace resa::engine
