#include "engine/imported_weights.h"

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace resa::engine {
namespace {

using kernels::Matrix;

// Imports tensor after tensor and remembers the first that found no room.
class Importer {
 public:
  explicit Importer(kernels::Ops* ops) : ops_(ops) {}

  Matrix ImportMatrix(const WeightTensor& tensor, int64_t rows, int64_t cols) {
    RESA_CHECK(tensor.dtype == kernels::DType::kBF16 && tensor.shape.size() == 2 &&
               tensor.shape[0] == rows && tensor.shape[1] == cols)
        << "expected bf16 [" << rows << ", " << cols << "]";
    return Matrix{const_cast<std::byte*>(Import(tensor)), kernels::DType::kBF16, rows, cols};
  }

  // Null when absent.
  const float* ImportVector(const WeightTensor& tensor, int64_t size) {
    if (!tensor.present()) return nullptr;
    RESA_CHECK(tensor.dtype == kernels::DType::kF32 && tensor.elements() == size)
        << "expected f32 [" << size << "]";
    return reinterpret_cast<const float*>(Import(tensor));
  }

  absl::Status status() const { return status_; }

 private:
  const std::byte* Import(const WeightTensor& tensor) {
    RESA_CHECK(tensor.present());
    if (!status_.ok()) return nullptr;
    const std::byte* imported = ops_->ImportWeights(tensor.data, tensor.bytes());
    if (imported == nullptr) {
      status_ = absl::ResourceExhaustedError(absl::StrCat(
          "the backend (", ops_->Description(), ") has no room for the weights: ", imported_bytes_,
          " bytes were taken, the next ", tensor.bytes(), " were refused"));
    }
    imported_bytes_ += tensor.bytes();
    return imported;
  }

  kernels::Ops* const ops_;
  absl::Status status_;
  size_t imported_bytes_ = 0;
};

ImportedLayer ImportLayer(const ModelConfig& config, const LayerWeights& from, Importer* importer) {
  const int64_t hidden = config.hidden_size;
  const int64_t mlp = config.intermediate_size;
  const int64_t q = config.QDim();
  const int64_t kv = config.KvDim();
  ImportedLayer to;
  to.attn_norm = importer->ImportVector(from.attn_norm, hidden);
  to.q_proj = importer->ImportMatrix(from.q_proj, q, hidden);
  to.k_proj = importer->ImportMatrix(from.k_proj, kv, hidden);
  to.v_proj = importer->ImportMatrix(from.v_proj, kv, hidden);
  to.q_bias = importer->ImportVector(from.q_bias, q);
  to.k_bias = importer->ImportVector(from.k_bias, kv);
  to.v_bias = importer->ImportVector(from.v_bias, kv);
  to.q_norm = importer->ImportVector(from.q_norm, config.head_dim);
  to.k_norm = importer->ImportVector(from.k_norm, config.head_dim);
  to.o_proj = importer->ImportMatrix(from.o_proj, hidden, q);
  to.o_bias = importer->ImportVector(from.o_bias, hidden);
  to.mlp_norm = importer->ImportVector(from.mlp_norm, hidden);
  to.gate_proj = importer->ImportMatrix(from.gate_proj, mlp, hidden);
  to.up_proj = importer->ImportMatrix(from.up_proj, mlp, hidden);
  to.gate_bias = importer->ImportVector(from.gate_bias, mlp);
  to.up_bias = importer->ImportVector(from.up_bias, mlp);
  to.down_proj = importer->ImportMatrix(from.down_proj, hidden, mlp);
  to.down_bias = importer->ImportVector(from.down_bias, hidden);
  return to;
}

}  // namespace

absl::StatusOr<ImportedWeights> ImportWeights(const ModelConfig& config,
                                              const ModelWeights& weights, kernels::Ops* ops) {
  RESA_CHECK_EQ(weights.layers.size(), static_cast<size_t>(config.num_layers));
  Importer importer(ops);
  ImportedWeights imported;
  imported.embed = importer.ImportMatrix(weights.embed, config.vocab_size, config.hidden_size);
  for (const LayerWeights& layer : weights.layers) {
    imported.layers.push_back(ImportLayer(config, layer, &importer));
  }
  imported.final_norm = importer.ImportVector(weights.final_norm, config.hidden_size);
  imported.lm_head =
      weights.lm_head.data == weights.embed.data
          ? imported.embed
          : importer.ImportMatrix(weights.lm_head, config.vocab_size, config.hidden_size);
  if (!importer.status().ok()) return importer.status();
  return imported;
}

}  // namespace resa::engine
