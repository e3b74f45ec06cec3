#ifndef RESA_ENGINE_WEIGHT_SLOTS_H_
#define RESA_ENGINE_WEIGHT_SLOTS_H_

// Which tensors a model consists of, under which name they are stored, and where each one goes.

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "engine/model_config.h"

namespace resa::engine {

struct ModelWeights;
struct WeightTensor;

enum class WeightNames : uint8_t {
  kHuggingFace,  // model.layers.0.self_attn.q_proj.weight
  kGguf,         // blk.0.attn_q.weight
};

struct WeightSlot {
  std::string name;
  std::vector<int64_t> shape;  // Two dimensions: bf16 matrix. One: f32 vector.
  // GGUF files of the llama architecture store the rows of q and k (weights and biases) of each
  // head in the order of interleaved rotary pairs: row 2j + h holds what is row h * d/2 + j here,
  // where the pairs are the two halves. head_dim when the rows must be put back, else 0.
  int32_t unpermute_head_dim = 0;
  WeightTensor* destination = nullptr;
};

// All slots of `config`, in the order of the model. Resizes weights->layers and points into
// *weights, which must therefore stay where it is while the slots are used. A tied output matrix
// has no slot.
std::vector<WeightSlot> WeightSlots(const ModelConfig& config, WeightNames style,
                                    ModelWeights* weights);

// The stored name of the output matrix.
absl::string_view OutputName(WeightNames style);

// True for tensors that hold nothing to load: rotary frequencies, which follow from the
// configuration (GGUF's rope_freqs.weight has been read into it).
bool IsDerivedTensor(WeightNames style, absl::string_view name);

}  // namespace resa::engine

#endif  // RESA_ENGINE_WEIGHT_SLOTS_H_
