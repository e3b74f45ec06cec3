#ifndef RESA_ENGINE_MODEL_CONFIG_H_
#define RESA_ENGINE_MODEL_CONFIG_H_

// What a model is, in terms of the transformer alone: which architecture it came as has no say
// beyond these fields. Filled from config.json (ModelConfigFromJson) or from GGUF metadata
// (ModelConfigFromGguf), and validated there: a ModelConfig that exists can be served.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "engine/gguf.h"

namespace resa::engine {

// How the rotary frequencies theta^(-2j/d) are changed to reach beyond the trained context.
struct RopeScaling {
  enum class Kind : uint8_t {
    kNone,
    kLinear,    // all divided by `factor`
    kLlama3,    // low ones divided, high ones kept, a smooth step between
    kYarn,      // arXiv 2309.00071: a linear ramp between divided and kept, and attention_factor
    kDivisors,  // each divided by its own number (GGUF's rope_freqs.weight)
  };
  Kind kind = Kind::kNone;
  double factor = 1.0;                // linear, llama3, yarn: >= 1
  double low_freq_factor = 1.0;       // llama3
  double high_freq_factor = 4.0;      // llama3: > low_freq_factor
  int64_t original_max_position = 0;  // llama3, yarn: the trained context, in tokens
  double beta_fast = 32.0;            // yarn: rotations within the trained context above which a
  double beta_slow = 1.0;             //   frequency is kept, and below which it is divided
  bool truncate = true;               // yarn: the ramp's ends are rounded outwards
  double attention_factor = 1.0;      // yarn: multiplies cosine and sine; resolved, never absent
  std::vector<float> divisors;        // kDivisors: [head_dim / 2], each > 0
};

struct ModelConfig {
  std::string architecture;  // "Qwen2ForCausalLM", "Qwen3...", "Llama...", "Mistral..."
  std::string model_type;    // "qwen2", "qwen3", "llama", "mistral"

  int32_t vocab_size = 0;  // Rows of the embedding; a tokenizer may use fewer.
  int32_t hidden_size = 0;
  int32_t intermediate_size = 0;
  int32_t num_layers = 0;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;  // Divides num_heads; the quotient is 1 .. kMaxGroup.
  int32_t head_dim = 0;      // 64 or 128; num_heads * head_dim may differ from hidden_size.
  int32_t max_position = 0;  // Longest context in tokens; with YaRN at least original x factor.

  float rms_norm_eps = 0;
  double rope_theta = 10000.0;
  RopeScaling rope_scaling;

  bool tie_embeddings = false;  // The output matrix is the embedding.
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;  // RMS norm of each head's q and k before rotation.

  std::vector<int32_t> eos_ids;  // Each in [0, vocab_size); any of them ends a generation.
  std::optional<int32_t> bos_id;

  int GroupSize() const { return num_heads / num_kv_heads; }
  int64_t QDim() const { return int64_t{num_heads} * head_dim; }
  int64_t KvDim() const { return int64_t{num_kv_heads} * head_dim; }
};

// From the text of config.json and, when not empty, of generation_config.json (whose token ids and
// sampling defaults win). Reads the spellings of transformers 4 and 5 (rope_theta and rope_scaling
// at the top, or both inside rope_parameters). `file` and `generation_file` are for messages.
//
// INVALID_ARGUMENT, naming file and field, for malformed JSON, a missing or absurd value, and for
// whatever would be computed wrongly: another architecture, activation, rope type, a sliding window
// shorter than the context, partial rotation, quantised weights, head sizes other than 64 and 128.
absl::StatusOr<ModelConfig> ModelConfigFromJson(absl::string_view text, absl::string_view file,
                                                absl::string_view generation_text,
                                                absl::string_view generation_file);

// From a GGUF file's metadata and tensor list, architectures llama (Mistral too), qwen2 and qwen3.
// vocab_size, biases and tying come from the tensors that are there; weights.h checks the rest.
absl::StatusOr<ModelConfig> ModelConfigFromGguf(const GgufFile& gguf);

// Refuses what no kernel serves or what is absurd; both functions above end with it. `where` starts
// the message.
absl::Status ValidateModelConfig(const ModelConfig& config, absl::string_view where);

// [head_dim / 2] inverse frequencies after scaling, computed in f64.
std::vector<float> RopeInverseFrequencies(const ModelConfig& config);
// What cosine and sine are multiplied by: YaRN's attention factor, 1 otherwise.
float RopeAttentionFactor(const ModelConfig& config);

}  // namespace resa::engine

#endif  // RESA_ENGINE_MODEL_CONFIG_H_
