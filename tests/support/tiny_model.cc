#include "tests/support/tiny_model.h"

#include <cmath>
#include <deque>
#include <memory>
#include <random>
#include <utility>

#include "kernels/bf16.h"

namespace resa::testing {
namespace {

using engine::LayerWeights;
using engine::WeightTensor;

// Memory of the weights: every tensor in a vector of its own, so that none moves.
struct Arena {
  std::deque<std::vector<kernels::bf16>> matrices;
  std::deque<std::vector<float>> vectors;
};

class WeightMaker {
 public:
  WeightMaker(Arena* arena, uint64_t seed) : arena_(arena), random_(seed) {}

  WeightTensor MakeMatrix(int64_t rows, int64_t cols, double deviation) {
    std::vector<kernels::bf16>& data = arena_->matrices.emplace_back(rows * cols);
    for (kernels::bf16& x : data) x = kernels::RoundToBf16(Normal(0.0, deviation));
    return {kernels::DType::kBF16, {rows, cols}, reinterpret_cast<const std::byte*>(data.data())};
  }
  WeightTensor MakeProjection(int64_t out, int64_t in, double gain = 1.0) {
    return MakeMatrix(out, in, gain / std::sqrt(static_cast<double>(in)));
  }
  WeightTensor MakeVector(int64_t size, double mean, double deviation) {
    std::vector<float>& data = arena_->vectors.emplace_back(size);
    for (float& x : data) x = Normal(mean, deviation);
    return {kernels::DType::kF32, {size}, reinterpret_cast<const std::byte*>(data.data())};
  }
  WeightTensor MakeNorm(int64_t size, double mean = 1.0) { return MakeVector(size, mean, 0.1); }
  WeightTensor MakeBias(bool wanted, int64_t size) {
    return wanted ? MakeVector(size, 0.0, 0.2) : WeightTensor{};
  }

 private:
  float Normal(double mean, double deviation) {
    return static_cast<float>(mean + deviation * normal_(random_));
  }

  Arena* const arena_;
  std::mt19937_64 random_;
  std::normal_distribution<double> normal_;
};

engine::ModelConfig MakeConfig(const TinyModelOptions& options) {
  engine::ModelConfig config;
  config.architecture = options.qk_norm ? "Qwen3ForCausalLM" : "LlamaForCausalLM";
  config.model_type = options.qk_norm ? "qwen3" : "llama";
  config.vocab_size = options.vocab_size;
  config.hidden_size = options.hidden_size;
  config.intermediate_size = options.intermediate_size;
  config.num_layers = options.num_layers;
  config.num_heads = options.num_kv_heads * options.group;
  config.num_kv_heads = options.num_kv_heads;
  config.head_dim = options.head_dim;
  config.max_position = options.max_position;
  config.rms_norm_eps = 1e-6f;
  config.rope_theta = options.rope_theta;
  config.rope_scaling = options.rope_scaling;
  config.tie_embeddings = options.tie_embeddings;
  config.qkv_bias = options.qkv_bias;
  config.o_bias = options.o_bias;
  config.mlp_bias = options.mlp_bias;
  config.qk_norm = options.qk_norm;
  return config;
}

LayerWeights MakeLayer(const engine::ModelConfig& config, double sharpness, WeightMaker* make) {
  const int64_t hidden = config.hidden_size;
  const int64_t mlp = config.intermediate_size;
  const int64_t q = config.QDim();
  const int64_t kv = config.KvDim();
  // Components of q and k of this size give logits q·k / sqrt(d) of deviation `sharpness`.
  const double gain = std::sqrt(sharpness);
  LayerWeights layer;
  layer.attn_norm = make->MakeNorm(hidden);
  layer.q_proj = make->MakeProjection(q, hidden, gain);
  layer.k_proj = make->MakeProjection(kv, hidden, gain);
  layer.v_proj = make->MakeProjection(kv, hidden);
  layer.q_bias = make->MakeBias(config.qkv_bias, q);
  layer.k_bias = make->MakeBias(config.qkv_bias, kv);
  layer.v_bias = make->MakeBias(config.qkv_bias, kv);
  if (config.qk_norm) {
    layer.q_norm = make->MakeNorm(config.head_dim, gain);
    layer.k_norm = make->MakeNorm(config.head_dim, gain);
  }
  layer.o_proj = make->MakeProjection(hidden, q);
  layer.o_bias = make->MakeBias(config.o_bias, hidden);
  layer.mlp_norm = make->MakeNorm(hidden);
  layer.gate_proj = make->MakeProjection(mlp, hidden);
  layer.up_proj = make->MakeProjection(mlp, hidden);
  layer.gate_bias = make->MakeBias(config.mlp_bias, mlp);
  layer.up_bias = make->MakeBias(config.mlp_bias, mlp);
  layer.down_proj = make->MakeProjection(hidden, mlp);
  layer.down_bias = make->MakeBias(config.mlp_bias, hidden);
  return layer;
}

}  // namespace

engine::LoadedModel MakeTinyModel(const TinyModelOptions& options, uint64_t seed) {
  engine::LoadedModel model;
  model.config = MakeConfig(options);
  const auto arena = std::make_shared<Arena>();
  WeightMaker make(arena.get(), seed);
  model.weights.embed = make.MakeMatrix(options.vocab_size, options.hidden_size, 1.0);
  for (int i = 0; i < options.num_layers; ++i) {
    model.weights.layers.push_back(MakeLayer(model.config, options.attention_sharpness, &make));
  }
  model.weights.final_norm = make.MakeNorm(options.hidden_size);
  model.weights.lm_head = options.tie_embeddings
                              ? model.weights.embed
                              : make.MakeProjection(options.vocab_size, options.hidden_size);
  model.weights.storage = arena;
  return model;
}

std::vector<int32_t> RandomTokens(int count, int vocab_size, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::uniform_int_distribution<int32_t> id(0, vocab_size - 1);
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = id(random);
  return tokens;
}

}  // namespace resa::testing
