#ifndef RESA_TESTS_SUPPORT_TINY_MODEL_H_
#define RESA_TESTS_SUPPORT_TINY_MODEL_H_

// Random models in memory, small enough that a test runs hundreds of steps in a second.

#include <cstdint>
#include <vector>

#include "engine/model_config.h"
#include "engine/model_files.h"

namespace resa::testing {

struct TinyModelOptions {
  int num_layers = 2;
  int num_kv_heads = 2;
  int group = 2;  // Query heads per KV head.
  int head_dim = 64;
  int hidden_size = 96;
  int intermediate_size = 160;
  int vocab_size = 131;
  int max_position = 4096;
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;
  bool tie_embeddings = false;
  double rope_theta = 10000.0;
  engine::RopeScaling rope_scaling = {};
  // Standard deviation of q·k / sqrt(d), roughly: at 0 attention is uniform and no selection
  // matters, at 4 a few tokens take most of it.
  double attention_sharpness = 2.0;
};

// Weights follow from `seed` alone: matrices normal with variance 1 / in (so activations keep their
// size), q and k scaled for the sharpness, embeddings of variance 1, norms about 1, biases about
// 0.2; matrices rounded to bf16. There are no EOS tokens. The weights own their memory.
engine::LoadedModel MakeTinyModel(const TinyModelOptions& options, uint64_t seed);

// Uniform token ids.
std::vector<int32_t> RandomTokens(int count, int vocab_size, uint64_t seed);

}  // namespace resa::testing

#endif  // RESA_TESTS_SUPPORT_TINY_MODEL_H_
