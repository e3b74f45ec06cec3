#include "server/attention_choice.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/step_cost.h"

namespace resa::server {
namespace {

void Describe(const kernels::Ceilings& ceilings, const engine::AttentionForecast& forecast,
              resa::v1::AttentionChoice* out) {
  out->set_read_bytes_per_second(ceilings.read_bytes_per_s);
  out->set_flops_per_second(ceilings.flops_per_s);
  out->set_context_tokens(forecast.context);
  out->set_dense_step_seconds(forecast.dense_seconds);
  out->set_sparse_step_seconds(forecast.sparse_seconds);
  out->set_rectification_seconds(forecast.rectification_seconds);
}

std::string ModeReason(engine::AttentionMode mode, bool on_gpu,
                       const engine::AttentionForecast& forecast) {
  if (on_gpu) {
    return absl::StrFormat(
        "mode %s, since matrix units do its arithmetic beside the reading of memory",
        engine::NameOf(mode));
  }
  const double share = forecast.rectification_seconds / forecast.dense_seconds;
  return absl::StrFormat(
      "mode %s, since at %d tokens rectification adds %.0f%% of a dense step's %.3g ms to every "
      "token, %s the limit of %.0f%%",
      engine::NameOf(mode), forecast.context, 100 * share, 1e3 * forecast.dense_seconds,
      mode == engine::AttentionMode::kRectified ? "below" : "not below",
      100 * engine::kMaxRectificationShare);
}

std::string SparseFromReason(const AttentionChoice& choice, int32_t longest_context) {
  if (choice.sparse_from > longest_context) {
    return absl::StrCat("every step dense, since up to ", longest_context,
                        " tokens sparse steps do not pay");
  }
  if (choice.sparse_step_tokens == 0) {
    return absl::StrCat("sparse from ", choice.sparse_from, " tokens, where that begins to pay");
  }
  return absl::StrCat("sparse in steps with ", choice.sparse_step_tokens, " tokens beyond the ",
                      choice.sparse_from, "th of each sequence, where that begins to pay");
}

}  // namespace

AttentionChoice ChooseAttention(const AttentionOptions& options, const AttentionDevice& device,
                                const engine::ModelConfig& model, const kernels::KvLayout& layout,
                                int32_t longest_context, kernels::Ops* ops) {
  AttentionChoice choice;
  choice.default_policy = options.default_policy;
  choice.description.set_mode_is_auto(options.auto_mode);
  choice.description.set_sparse_from_is_auto(!options.sparse_from.has_value());
  choice.sparse_from = options.sparse_from.value_or(0);
  if (!options.auto_mode && options.sparse_from.has_value()) {
    choice.description.set_reason("as set");
    return choice;
  }
  const kernels::Ceilings ceilings = ops->MeasureCeilings();
  const engine::AttentionForecast forecast =
      engine::Forecast(model, layout, options.default_policy,
                       std::min(longest_context, engine::kReferenceContext), ceilings);
  Describe(ceilings, forecast, &choice.description);
  std::string reason =
      absl::StrFormat("at %.3g GB/s and %.3g GFLOP/s: ", 1e-9 * ceilings.read_bytes_per_s,
                      1e-9 * ceilings.flops_per_s);
  if (options.auto_mode) {
    choice.default_policy.mode =
        device.on_gpu ? engine::AttentionMode::kRectified : engine::ModeFor(forecast);
    absl::StrAppend(&reason, ModeReason(choice.default_policy.mode, device.on_gpu, forecast));
  }
  if (!options.sparse_from.has_value()) {
    if (device.deterministic) {
      choice.sparse_from =
          engine::SparseFromFor(model, layout, choice.default_policy, longest_context, ceilings);
    } else {
      const engine::SparseFromBatch from = engine::SparseFromForBatch(
          model, layout, choice.default_policy, longest_context, ceilings);
      choice.sparse_from = from.sequence_tokens;
      choice.sparse_step_tokens = from.step_tokens;
    }
    absl::StrAppend(&reason, options.auto_mode ? "; " : "",
                    SparseFromReason(choice, longest_context));
  }
  choice.description.set_reason(std::move(reason));
  return choice;
}

}  // namespace resa::server
