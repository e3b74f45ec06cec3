#include "engine/model_config.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/status_macros.h"
#include "kernels/check.h"
#include "kernels/params.h"

namespace resa::engine {
namespace {

// Far above any model that exists, and low enough that products of two fit int64 many times over.
constexpr int32_t kMaxVocab = 1 << 22;
constexpr int32_t kMaxWidth = 1 << 20;
constexpr int32_t kMaxLayers = 1024;
constexpr int32_t kMaxHeads = 1024;
constexpr int32_t kMaxPosition = 1 << 28;

// Pair index (fractional) of the frequency that turns `rotations` times within the trained context:
// d ln(L / (2 pi r)) / (2 ln theta), the inverse of theta^(-2j/d) L / (2 pi) = r.
double YarnPairIndex(const ModelConfig& config, double rotations) {
  const double length = static_cast<double>(config.rope_scaling.original_max_position);
  return config.head_dim * std::log(length / (rotations * 2.0 * std::numbers::pi)) /
         (2.0 * std::log(config.rope_theta));
}

// The ramp is 0 where a frequency is kept and 1 where it is divided.
void ApplyYarn(const ModelConfig& config, std::vector<double>& frequencies) {
  const RopeScaling& scaling = config.rope_scaling;
  double low = YarnPairIndex(config, scaling.beta_fast);
  double high = YarnPairIndex(config, scaling.beta_slow);
  if (scaling.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, static_cast<double>(config.head_dim - 1));
  if (low == high) high += 0.001;  // As the reference does, so that the ramp has a slope.
  for (size_t j = 0; j < frequencies.size(); ++j) {
    const double ramp = std::clamp((static_cast<double>(j) - low) / (high - low), 0.0, 1.0);
    frequencies[j] *= ramp / scaling.factor + (1.0 - ramp);
  }
}

// Waves longer than L / low_freq_factor are divided, those shorter than L / high_freq_factor kept.
void ApplyLlama3(const RopeScaling& scaling, std::vector<double>& frequencies) {
  const double length = static_cast<double>(scaling.original_max_position);
  for (double& frequency : frequencies) {
    const double waves = length * frequency / (2.0 * std::numbers::pi);  // Within L.
    const double smooth = std::clamp(
        (waves - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor),
        0.0, 1.0);
    frequency *= (1.0 - smooth) / scaling.factor + smooth;
  }
}

absl::Status ValidateRope(const ModelConfig& config, absl::string_view where) {
  const RopeScaling& scaling = config.rope_scaling;
  const auto error = [&](const auto&... what) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": ", what...));
  };
  if (!(config.rope_theta > 1.0 && config.rope_theta <= 1e12)) {
    return error("rope_theta ", config.rope_theta, " must be above 1 and at most 1e12");
  }
  if (!(scaling.factor >= 1.0 && scaling.factor <= 1e6)) {
    return error("rope scaling factor ", scaling.factor, " must be from 1 to 1e6");
  }
  const bool has_original =
      scaling.kind == RopeScaling::Kind::kLlama3 || scaling.kind == RopeScaling::Kind::kYarn;
  if (has_original &&
      (scaling.original_max_position < 1 || scaling.original_max_position > kMaxPosition)) {
    return error("original_max_position_embeddings ", scaling.original_max_position,
                 " must be from 1 to ", kMaxPosition);
  }
  if (scaling.kind == RopeScaling::Kind::kLlama3 &&
      !(scaling.low_freq_factor > 0 && scaling.high_freq_factor > scaling.low_freq_factor)) {
    return error("low_freq_factor ", scaling.low_freq_factor,
                 " must be above 0 and below high_freq_factor ", scaling.high_freq_factor);
  }
  if (scaling.kind == RopeScaling::Kind::kYarn) {
    if (!(scaling.beta_slow > 0 && scaling.beta_fast > scaling.beta_slow)) {
      return error("YaRN's beta_slow ", scaling.beta_slow, " must be above 0 and below beta_fast ",
                   scaling.beta_fast);
    }
    if (!(scaling.attention_factor > 0 && scaling.attention_factor <= 100)) {
      return error("YaRN's attention factor ", scaling.attention_factor,
                   " must be above 0 and at most 100");
    }
  }
  if (scaling.kind == RopeScaling::Kind::kDivisors) {
    if (static_cast<int64_t>(scaling.divisors.size()) != config.head_dim / 2) {
      return error("rope_freqs.weight has ", scaling.divisors.size(), " values; expected ",
                   config.head_dim / 2, " (half of head_dim)");
    }
    for (float divisor : scaling.divisors) {
      if (!(divisor > 0 && divisor <= 1e6f)) {
        return error("rope_freqs.weight has the value ", divisor,
                     "; expected values above 0 and at most 1e6");
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateModelConfig(const ModelConfig& config, absl::string_view where) {
  const auto error = [&](const auto&... what) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": ", what...));
  };
  const struct {
    const char* name;
    int32_t value, max;
  } ranges[] = {{"vocab_size", config.vocab_size, kMaxVocab},
                {"hidden_size", config.hidden_size, kMaxWidth},
                {"intermediate_size", config.intermediate_size, kMaxWidth},
                {"num_hidden_layers", config.num_layers, kMaxLayers},
                {"num_attention_heads", config.num_heads, kMaxHeads},
                {"num_key_value_heads", config.num_kv_heads, kMaxHeads},
                {"max_position_embeddings", config.max_position, kMaxPosition}};
  for (const auto& range : ranges) {
    if (range.value < 1 || range.value > range.max) {
      return error(range.name, " is ", range.value, "; expected 1 to ", range.max);
    }
  }
  if (config.head_dim != 64 && config.head_dim != 128) {
    return error("head_dim ", config.head_dim, " is not supported; expected 64 or 128");
  }
  if (config.num_heads % config.num_kv_heads != 0 || config.GroupSize() > kernels::kMaxGroup) {
    return error(config.num_heads, " query heads over ", config.num_kv_heads,
                 " key/value heads is not supported; expected a whole group of 1 to ",
                 kernels::kMaxGroup);
  }
  if (!(config.rms_norm_eps > 0 && config.rms_norm_eps < 1)) {
    return error("rms_norm_eps ", config.rms_norm_eps, " must be above 0 and below 1");
  }
  const auto check_id = [&](const char* name, int32_t id) {
    return id >= 0 && id < config.vocab_size
               ? absl::OkStatus()
               : error(name, " ", id, " is not a token; the vocabulary has ", config.vocab_size);
  };
  for (int32_t id : config.eos_ids) RESA_RETURN_IF_ERROR(check_id("eos_token_id", id));
  if (config.bos_id) RESA_RETURN_IF_ERROR(check_id("bos_token_id", *config.bos_id));
  return ValidateRope(config, where);
}

std::vector<float> RopeInverseFrequencies(const ModelConfig& config) {
  std::vector<double> frequencies(config.head_dim / 2);
  for (size_t j = 0; j < frequencies.size(); ++j) {
    frequencies[j] = std::pow(config.rope_theta, -2.0 * static_cast<double>(j) / config.head_dim);
  }
  const RopeScaling& scaling = config.rope_scaling;
  switch (scaling.kind) {
    case RopeScaling::Kind::kNone:
      break;
    case RopeScaling::Kind::kLinear:
      for (double& frequency : frequencies) frequency /= scaling.factor;
      break;
    case RopeScaling::Kind::kLlama3:
      ApplyLlama3(scaling, frequencies);
      break;
    case RopeScaling::Kind::kYarn:
      ApplyYarn(config, frequencies);
      break;
    case RopeScaling::Kind::kDivisors:
      RESA_CHECK_EQ(scaling.divisors.size(), frequencies.size());
      for (size_t j = 0; j < frequencies.size(); ++j) frequencies[j] /= scaling.divisors[j];
      break;
  }
  return std::vector<float>(frequencies.begin(), frequencies.end());
}

float RopeAttentionFactor(const ModelConfig& config) {
  return config.rope_scaling.kind == RopeScaling::Kind::kYarn
             ? static_cast<float>(config.rope_scaling.attention_factor)
             : 1.0f;
}

}  // namespace resa::engine
