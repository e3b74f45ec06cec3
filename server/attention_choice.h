#ifndef RESA_SERVER_ATTENTION_CHOICE_H_
#define RESA_SERVER_ATTENTION_CHOICE_H_

// What "auto" in the attention settings comes to on this machine with this model.

#include <cstdint>

#include "engine/attention_policy.h"
#include "engine/model_config.h"
#include "kernels/ops.h"
#include "kernels/params.h"
#include "resa/v1/inference.pb.h"
#include "server/config.h"

namespace resa::server {

struct AttentionChoice {
  engine::AttentionPolicy default_policy;
  int32_t sparse_from = 0;         // In tokens; beyond longest_context when sparse steps never pay.
  int64_t sparse_step_tokens = 0;  // engine::SchedulerLimits.
  resa::v1::AttentionChoice description;  // For GetModel; its reason for the log, too.
};

// What is run on.
struct AttentionDevice {
  bool on_gpu = false;
  bool deterministic = true;  // A sequence's path may not depend on the others.
};

// Measures the machine (half a second) when anything is "auto" that depends on it. Mode: RECTIFIED
// on a GPU, whose matrix units have the arithmetic to spare; on the CPU engine::ModeFor at
// engine::kReferenceContext tokens, or at `longest_context`, what one sequence may hold, when that
// is less.
AttentionChoice ChooseAttention(const AttentionOptions& options, const AttentionDevice& device,
                                const engine::ModelConfig& model, const kernels::KvLayout& layout,
                                int32_t longest_context, kernels::Ops* ops);

}  // namespace resa::server

#endif  // RESA_SERVER_ATTENTION_CHOICE_H_
