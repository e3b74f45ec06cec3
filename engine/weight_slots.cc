#include "engine/weight_slots.h"

#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/weights.h"

namespace resa::engine {
namespace {

// Collects the slots of one model.
class SlotBuilder {
 public:
  explicit SlotBuilder(WeightNames style) : style_(style) {}

  void Add(absl::string_view hugging_face, absl::string_view gguf, std::vector<int64_t> shape,
           WeightTensor& destination, int32_t unpermute_head_dim = 0) {
    slots_.push_back(WeightSlot{
        .name = absl::StrCat(prefix_, style_ == WeightNames::kGguf ? gguf : hugging_face),
        .shape = std::move(shape),
        .unpermute_head_dim = unpermute_head_dim,
        .destination = &destination});
  }
  void SetLayer(int layer) {
    prefix_ = absl::StrCat(style_ == WeightNames::kGguf ? "blk." : "model.layers.", layer, ".");
  }
  void EndLayers() { prefix_.clear(); }
  std::vector<WeightSlot> Take() { return std::move(slots_); }

 private:
  const WeightNames style_;
  std::string prefix_;
  std::vector<WeightSlot> slots_;
};

void AddAttention(const ModelConfig& config, int32_t permuted, LayerWeights& layer,
                  SlotBuilder& add) {
  const int64_t hidden = config.hidden_size;
  add.Add("input_layernorm.weight", "attn_norm.weight", {hidden}, layer.attn_norm);
  add.Add("self_attn.q_proj.weight", "attn_q.weight", {config.QDim(), hidden}, layer.q_proj,
          permuted);
  add.Add("self_attn.k_proj.weight", "attn_k.weight", {config.KvDim(), hidden}, layer.k_proj,
          permuted);
  add.Add("self_attn.v_proj.weight", "attn_v.weight", {config.KvDim(), hidden}, layer.v_proj);
  if (config.qkv_bias) {
    add.Add("self_attn.q_proj.bias", "attn_q.bias", {config.QDim()}, layer.q_bias, permuted);
    add.Add("self_attn.k_proj.bias", "attn_k.bias", {config.KvDim()}, layer.k_bias, permuted);
    add.Add("self_attn.v_proj.bias", "attn_v.bias", {config.KvDim()}, layer.v_bias);
  }
  if (config.qk_norm) {
    add.Add("self_attn.q_norm.weight", "attn_q_norm.weight", {config.head_dim}, layer.q_norm);
    add.Add("self_attn.k_norm.weight", "attn_k_norm.weight", {config.head_dim}, layer.k_norm);
  }
  add.Add("self_attn.o_proj.weight", "attn_output.weight", {hidden, config.QDim()}, layer.o_proj);
  if (config.o_bias) {
    add.Add("self_attn.o_proj.bias", "attn_output.bias", {hidden}, layer.o_bias);
  }
}

void AddMlp(const ModelConfig& config, LayerWeights& layer, SlotBuilder& add) {
  const int64_t hidden = config.hidden_size, inner = config.intermediate_size;
  add.Add("post_attention_layernorm.weight", "ffn_norm.weight", {hidden}, layer.mlp_norm);
  add.Add("mlp.gate_proj.weight", "ffn_gate.weight", {inner, hidden}, layer.gate_proj);
  add.Add("mlp.up_proj.weight", "ffn_up.weight", {inner, hidden}, layer.up_proj);
  add.Add("mlp.down_proj.weight", "ffn_down.weight", {hidden, inner}, layer.down_proj);
  if (config.mlp_bias) {
    add.Add("mlp.gate_proj.bias", "ffn_gate.bias", {inner}, layer.gate_bias);
    add.Add("mlp.up_proj.bias", "ffn_up.bias", {inner}, layer.up_bias);
    add.Add("mlp.down_proj.bias", "ffn_down.bias", {hidden}, layer.down_bias);
  }
}

}  // namespace

absl::string_view OutputName(WeightNames style) {
  return style == WeightNames::kGguf ? "output.weight" : "lm_head.weight";
}

std::vector<WeightSlot> WeightSlots(const ModelConfig& config, WeightNames style,
                                    ModelWeights* weights) {
  const int64_t hidden = config.hidden_size;
  const bool permuted = style == WeightNames::kGguf && config.model_type == "llama";
  SlotBuilder add(style);
  add.Add("model.embed_tokens.weight", "token_embd.weight", {config.vocab_size, hidden},
          weights->embed);
  weights->layers.resize(config.num_layers);
  for (int i = 0; i < config.num_layers; ++i) {
    LayerWeights& layer = weights->layers[i];
    add.SetLayer(i);
    AddAttention(config, permuted ? config.head_dim : 0, layer, add);
    AddMlp(config, layer, add);
  }
  add.EndLayers();
  add.Add("model.norm.weight", "output_norm.weight", {hidden}, weights->final_norm);
  if (!config.tie_embeddings) {
    add.Add(OutputName(style), OutputName(style), {config.vocab_size, hidden}, weights->lm_head);
  }
  return add.Take();
}

bool IsDerivedTensor(WeightNames style, absl::string_view name) {
  return style == WeightNames::kGguf ? name == "rope_freqs.weight"
                                     : absl::EndsWith(name, "rotary_emb.inv_freq");
}

}  // namespace resa::engine
