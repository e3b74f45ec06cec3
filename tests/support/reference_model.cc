#include "tests/support/reference_model.h"

#include <vector>

#include "kernels/bf16.h"
#include "kernels/check.h"

namespace resa::testing {
namespace {

Vector VectorOf(const engine::WeightTensor& tensor) {
  if (!tensor.present()) return {};
  return Vector(tensor.f32(), tensor.f32() + tensor.elements());
}

DenseMatrix MatrixOf(const engine::WeightTensor& tensor) {
  DenseMatrix matrix;
  matrix.rows = static_cast<int>(tensor.shape.at(0));
  matrix.cols = static_cast<int>(tensor.shape.at(1));
  matrix.data.reserve(tensor.elements());
  for (int64_t i = 0; i < tensor.elements(); ++i) {
    matrix.data.push_back(kernels::ToFloat(tensor.b16()[i]));
  }
  return matrix;
}

ReferenceLayer LayerOf(const engine::LayerWeights& weights) {
  RESA_CHECK(!weights.o_bias.present() && !weights.gate_bias.present() &&
             !weights.up_bias.present() && !weights.down_bias.present());
  ReferenceLayer layer;
  layer.attention_norm = VectorOf(weights.attn_norm);
  layer.wq = MatrixOf(weights.q_proj);
  layer.wk = MatrixOf(weights.k_proj);
  layer.wv = MatrixOf(weights.v_proj);
  layer.bq = VectorOf(weights.q_bias);
  layer.bk = VectorOf(weights.k_bias);
  layer.bv = VectorOf(weights.v_bias);
  layer.q_norm = VectorOf(weights.q_norm);
  layer.k_norm = VectorOf(weights.k_norm);
  layer.wo = MatrixOf(weights.o_proj);
  layer.mlp_norm = VectorOf(weights.mlp_norm);
  layer.gate = MatrixOf(weights.gate_proj);
  layer.up = MatrixOf(weights.up_proj);
  layer.down = MatrixOf(weights.down_proj);
  return layer;
}

}  // namespace

ReferenceModel ReferenceModelOf(const engine::ModelConfig& config,
                                const engine::ModelWeights& weights) {
  ReferenceModel model;
  model.heads = config.num_heads;
  model.kv_heads = config.num_kv_heads;
  model.head_dim = config.head_dim;
  model.rms_eps = config.rms_norm_eps;
  for (float frequency : engine::RopeInverseFrequencies(config)) {
    model.inv_freq.push_back(frequency);
  }
  model.rope_factor = engine::RopeAttentionFactor(config);
  model.embedding = MatrixOf(weights.embed);
  for (const engine::LayerWeights& layer : weights.layers) {
    model.layers.push_back(LayerOf(layer));
  }
  model.final_norm = VectorOf(weights.final_norm);
  if (!config.tie_embeddings) model.output = MatrixOf(weights.lm_head);
  return model;
}

}  // namespace resa::testing
