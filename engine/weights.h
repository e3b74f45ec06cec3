#ifndef RESA_ENGINE_WEIGHTS_H_
#define RESA_ENGINE_WEIGHTS_H_

// A model's weights in host memory, in the two forms that kernels take: matrices in bf16, vectors
// (norms and biases) in f32.
//
// bf16 matrices stay where the file's map has them. Everything else is converted once, into one
// anonymous map: f32 and f16 matrices and GGUF's blocks to bf16 (round to nearest even), vectors
// to f32 (exactly), and the q and k rows of GGUF llama files are put back in order
// (weight_slots.h).

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/mapped_file.h"
#include "engine/model_config.h"
#include "engine/stored_tensor.h"
#include "engine/weight_slots.h"
#include "kernels/tensor.h"

namespace resa::engine {

// A view; ModelWeights::storage owns the memory. Absent (a bias the model lacks) when data is null.
// Row-major and contiguous. Matrices are aligned to 2 bytes at least, vectors to 64.
struct WeightTensor {
  kernels::DType dtype = kernels::DType::kF32;  // kBF16 for matrices, kF32 for vectors.
  std::vector<int64_t> shape;                   // [out, in] or [n]
  const std::byte* data = nullptr;

  bool present() const { return data != nullptr; }
  int64_t elements() const;
  size_t bytes() const;
  // REQUIRES dtype kF32. Null when absent.
  const float* f32() const;
  // REQUIRES dtype kBF16.
  const kernels::bf16* b16() const;
};

// D hidden size, Q = num_heads * head_dim, K = num_kv_heads * head_dim, F intermediate size.
struct LayerWeights {
  WeightTensor attn_norm;               // [D]
  WeightTensor q_proj, k_proj, v_proj;  // [Q, D], [K, D], [K, D]
  WeightTensor q_bias, k_bias, v_bias;  // [Q], [K], [K] or absent
  WeightTensor q_norm, k_norm;          // [head_dim] or absent
  WeightTensor o_proj, o_bias;          // [D, Q], [D] or absent
  WeightTensor mlp_norm;                // [D]
  WeightTensor gate_proj, up_proj;      // [F, D]
  WeightTensor gate_bias, up_bias;      // [F] or absent
  WeightTensor down_proj, down_bias;    // [D, F], [D] or absent
};

struct ModelWeights {
  WeightTensor embed;  // [V, D]
  std::vector<LayerWeights> layers;
  WeightTensor final_norm;  // [D]
  WeightTensor lm_head;     // [V, D]; the same memory as embed when tied.

  size_t mapped_bytes = 0;     // Served from the file's map, shared with the page cache.
  size_t converted_bytes = 0;  // Owned copies.
  // Owns what the views point into.
  std::shared_ptr<const void> storage;
};

// Takes from `tensors` what `config` calls for, under the names of `style`. `files` are the maps
// that the tensors point into; they stay alive as long as the result needs them.
//
// INVALID_ARGUMENT, naming tensor, file and what was expected: a tensor missing, of another shape,
// or not called for (a file for another model, or features that would be ignored silently).
// Tolerated: buffers of rotary frequencies ("...rotary_emb.inv_freq") and, when embeddings are
// tied, an output matrix that equals the embedding. RESOURCE_EXHAUSTED when memory for the
// converted tensors cannot be had.
absl::StatusOr<ModelWeights> LoadWeights(const ModelConfig& config, WeightNames style,
                                         std::span<const StoredTensor> tensors,
                                         std::vector<std::shared_ptr<const MappedFile>> files);

}  // namespace resa::engine

#endif  // RESA_ENGINE_WEIGHTS_H_
