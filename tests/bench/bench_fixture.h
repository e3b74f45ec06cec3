#ifndef RESA_TESTS_BENCH_BENCH_FIXTURE_H_
#define RESA_TESTS_BENCH_BENCH_FIXTURE_H_

// A model of two small layers for the tests of the bench.

#include "engine/model_config.h"

namespace resa::bench {

inline engine::ModelConfig SmallConfig() {
  engine::ModelConfig config;
  config.architecture = "Qwen2ForCausalLM";
  config.model_type = "qwen2";
  config.vocab_size = 131;
  config.hidden_size = 96;
  config.intermediate_size = 160;
  config.num_layers = 2;
  config.num_heads = 6;
  config.num_kv_heads = 2;
  config.head_dim = 64;
  config.max_position = 1 << 20;
  config.rms_norm_eps = 1e-6f;
  config.tie_embeddings = true;
  config.qkv_bias = true;
  return config;
}

}  // namespace resa::bench

#endif  // RESA_TESTS_BENCH_BENCH_FIXTURE_H_
