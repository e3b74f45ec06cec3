#include "engine/model_executor.h"

#include "engine/status_macros.h"
#include "kernels/check.h"

namespace resa::engine {

absl::StatusOr<std::unique_ptr<ModelExecutor>> ModelExecutor::Create(
    const ModelConfig& config, const ModelWeights& weights, const kernels::KvLayout& layout,
    const BatchLimits& limits, kernels::Ops* ops) {
  RESA_CHECK(layout.num_layers == config.num_layers && layout.num_kv_heads == config.num_kv_heads &&
             layout.head_dim == config.head_dim)
      << "the layout is another model's";
  std::unique_ptr<ModelExecutor> executor(new ModelExecutor(config, limits, layout, ops));
  RESA_ASSIGN_OR_RETURN(executor->kv_, KvMemory::Create(layout, ops));
  RESA_ASSIGN_OR_RETURN(
      executor->transformer_,
      Transformer::Create(config, weights, limits, executor->batch_.max_block_ids(), ops));
  return executor;
}

absl::Status ModelExecutor::DoExecute(const StepInput& input, StepOutput* output,
                                      absl::FunctionRef<void()> meanwhile) {
  output->samples.clear();
  kv_->Copy(input.copies);
  if (input.segments.empty()) {
    meanwhile();
    return absl::OkStatus();
  }
  batch_.Build(input.segments);
  output->samples.resize(batch_.samples().size());
  kernels::StepLists lists = batch_.Lists(output->samples.data());
  lists.owner = this;
  lists.num_heads = num_heads_;
  const auto issue = [this, &lists] {
    transformer_->Forward(batch_, *kv_);
    if (lists.num_samples == 0) return;
    ops_->Sample({.logits = transformer_->Logits(batch_.sampled_rows()),
                  .rows = lists.samples,
                  .num_rows = lists.num_samples,
                  .out = lists.results});
  };
  ops_->RunStep(lists, issue, meanwhile);
  return absl::OkStatus();
}

}  // namespace resa::engine
