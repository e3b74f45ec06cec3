#include "engine/transformer.h"

#include <vector>

#include "engine/status_macros.h"
#include "kernels/check.h"

namespace resa::engine {

Transformer::Transformer(const ModelConfig& config, kernels::Ops* ops)
    : config_(config), ops_(ops) {}

absl::StatusOr<std::unique_ptr<Transformer>> Transformer::Create(const ModelConfig& config,
                                                                 const ModelWeights& weights,
                                                                 const BatchLimits& limits,
                                                                 int64_t max_block_ids,
                                                                 kernels::Ops* ops) {
  std::unique_ptr<Transformer> transformer(new Transformer(config, ops));
  RESA_ASSIGN_OR_RETURN(transformer->weights_, ImportWeights(config, weights, ops));
  RESA_ASSIGN_OR_RETURN(transformer->memory_,
                        ActivationMemory::Create(config, limits, max_block_ids, ops));
  const std::vector<float> inv_freq = RopeInverseFrequencies(config);
  const size_t bytes = inv_freq.size() * sizeof(float);
  transformer->inv_freq_ = ops->Allocate(bytes);
  if (transformer->inv_freq_ == nullptr) {
    return absl::ResourceExhaustedError("no memory for the rotary frequencies");
  }
  ops->Upload(transformer->inv_freq_->data(), inv_freq.data(), bytes);
  return transformer;
}

void Transformer::Forward(const RaggedBatch& batch, const KvMemory& kv) {
  rows_ = batch.rows();
  RESA_CHECK_GT(rows_, 0);
  const Activations a = memory_->ForRows(rows_);
  ops_->Embed({.ids = batch.tokens().data(), .table = weights_.embed, .out = a.hidden});
  ops_->RopeTable({.positions = batch.positions().data(),
                   .rows = rows_,
                   .inv_freq = reinterpret_cast<const float*>(inv_freq_->data()),
                   .head_dim = config_.head_dim,
                   .factor = RopeAttentionFactor(config_),
                   .cos = a.cos,
                   .sin = a.sin});
  for (int i = 0; i < config_.num_layers; ++i) RunLayer(i, batch, kv, a);
}

// x += O Attention(Q n, K n, V n) with n = RmsNorm(x);
// x += Down(SiLU(Gate n) * Up n)  with n = RmsNorm(x).
void Transformer::RunLayer(int index, const RaggedBatch& batch, const KvMemory& kv,
                           const Activations& a) const {
  const ImportedLayer& w = weights_.layers[index];
  const float eps = config_.rms_norm_eps;

  const kernels::LinearParams qkv[] = {
      {.x = a.normed, .weight = w.q_proj, .bias = w.q_bias, .out = a.q},
      {.x = a.normed, .weight = w.k_proj, .bias = w.k_bias, .out = a.k},
      {.x = a.normed, .weight = w.v_proj, .bias = w.v_bias, .out = a.v}};
  ops_->Linears({.products = qkv,
                 .norm = {.x = a.hidden, .weight = w.attn_norm, .eps = eps, .out = a.normed}});
  ops_->QkvPost({.q = a.q,
                 .k = a.k,
                 .v = a.v,
                 .q_norm = w.q_norm,
                 .k_norm = w.k_norm,
                 .eps = eps,
                 .cos = a.cos,
                 .sin = a.sin,
                 .runs = batch.runs().data(),
                 .num_runs = static_cast<int64_t>(batch.runs().size()),
                 .tables = batch.tables(),
                 .layout = kv.layout(),
                 .kv = kv.layer(index)});
  Attend(batch, kv.layer(index), a);
  ops_->Linear(
      {.x = a.attended, .weight = w.o_proj, .bias = w.o_bias, .accumulate = true, .out = a.hidden});

  const kernels::LinearParams gate_up[] = {
      {.x = a.normed, .weight = w.gate_proj, .bias = w.gate_bias, .out = a.gate},
      {.x = a.normed, .weight = w.up_proj, .bias = w.up_bias, .out = a.up}};
  ops_->Linears({.products = gate_up,
                 .norm = {.x = a.hidden, .weight = w.mlp_norm, .eps = eps, .out = a.normed},
                 .gated = true});
  ops_->Linear({.x = a.gate,
                .weight = w.down_proj,
                .bias = w.down_bias,
                .accumulate = true,
                .out = a.hidden});
}

// Group block-sparse attention for the sparse rows (arXiv 2506.04108): choose blocks, then attend
// to them exactly. Everything else, rectification included, is dense and causal.
void Transformer::Attend(const RaggedBatch& batch, const kernels::KvLayer& kv,
                         const Activations& a) const {
  const absl::Span<const kernels::SparseRow> sparse = batch.sparse_rows();
  if (!sparse.empty()) {
    ops_->Select({.q = a.q,
                  .num_heads = config_.num_heads,
                  .rows = sparse.data(),
                  .num_rows = static_cast<int64_t>(sparse.size()),
                  .tables = batch.tables(),
                  .layout = batch.layout(),
                  .kv = kv,
                  .ids = a.block_ids,
                  .num_ids = batch.num_block_ids()});
    ops_->SparseAttend({.q = a.q,
                        .num_heads = config_.num_heads,
                        .rows = sparse.data(),
                        .num_rows = static_cast<int64_t>(sparse.size()),
                        .ids = a.block_ids,
                        .tables = batch.tables(),
                        .layout = batch.layout(),
                        .kv = kv,
                        .out = a.attended});
  }
  const absl::Span<const kernels::DenseChunk> dense = batch.dense_chunks();
  if (!dense.empty()) {
    ops_->ChunkAttend({.q = a.q,
                       .num_heads = config_.num_heads,
                       .chunks = dense.data(),
                       .num_chunks = static_cast<int64_t>(dense.size()),
                       .tables = batch.tables(),
                       .layout = batch.layout(),
                       .kv = kv,
                       .out = a.attended});
  }
}

kernels::Matrix Transformer::Logits(absl::Span<const int32_t> rows) {
  for (const int32_t row : rows) RESA_CHECK(row >= 0 && row < rows_) << row;
  const HeadActivations head = memory_->ForHead(static_cast<int64_t>(rows.size()));
  ops_->GatherRows({.x = memory_->ForRows(rows_).hidden, .rows = rows.data(), .out = head.hidden});
  const kernels::LinearParams logits[] = {
      {.x = head.hidden, .weight = weights_.lm_head, .out = head.logits}};
  ops_->Linears({.products = logits,
                 .norm = {.x = head.hidden,
                          .weight = weights_.final_norm,
                          .eps = config_.rms_norm_eps,
                          .out = head.hidden}});
  return head.logits;
}

}  // namespace resa::engine
