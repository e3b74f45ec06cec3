#ifndef RESA_ENGINE_STEP_COST_H_
#define RESA_ENGINE_STEP_COST_H_

// What a token costs by attention mode, predicted from the model's shape (kernels/roofline.h) and
// what the machine can do (kernels/ceilings.h), and the two settings that follow from it: the
// default mode and the context from which sparse steps are taken. Pure functions of their
// arguments.
//
// A stage takes max(bytes / (b read_bytes_per_s), flops / (c flops_per_s)) seconds, where its
// kernels reach the shares b and c of the ceilings (kLinearShare and the others below). A decode
// step of one sequence of n tokens is
//   dense    linear(1 row) + attend(1 row, n tokens)
//   sparse   linear(1 row) + select(n tokens) + attend(kept tokens) + SelectionSeconds() a layer
// and a rectified token the average of a cycle of f = rectify_interval: f - 1 sparse steps, then
//   window   linear(f rows) + attend(f rows, n tokens)
// so that rectification adds (window - sparse) / f to every token. Norms, rotary embedding and
// sampling are the same in all modes and left out.

#include <cstdint>

#include "engine/attention_policy.h"
#include "engine/model_config.h"
#include "kernels/ceilings.h"
#include "kernels/params.h"
#include "kernels/roofline.h"

namespace resa::engine {

// What the stages of one step need, summed over the layers.
struct StepCost {
  kernels::Roofline linear;  // Projections and MLP, for every row of the step.
  kernels::Roofline head;    // Logits of one row.
  kernels::Roofline select;
  kernels::Roofline sparse_attend;
  kernels::Roofline dense_attend;
  int sparse_layers = 0;  // Layers that select, and how.
  kernels::SelectorKind selector = {};
};

// One row whose token is the context-th, > 0, attending to everything or to the budget's blocks.
StepCost DenseStepCost(const ModelConfig& config, const kernels::KvLayout& layout, int32_t context);
StepCost SparseStepCost(const ModelConfig& config, const kernels::KvLayout& layout, int32_t context,
                        const SparseBudget& budget);
// A rectification: the last `rows` of `context` tokens, densely. REQUIRES 0 < rows <= context.
StepCost WindowStepCost(const ModelConfig& config, const kernels::KvLayout& layout, int32_t context,
                        int32_t rows);

// Shares of the ceilings that the CPU's kernels reach (tests/bench/kernel_bench prints them): what
// a dense pass reaches at best, since exponentials and the widening of keys take their part, and
// what selection and sparse attention reach at least, so that sparse steps are not taken too early.
struct CeilingShare {
  double bytes = 1;
  double flops = 1;
};
inline constexpr CeilingShare kLinearShare = {.bytes = 0.8, .flops = 0.8};
inline constexpr CeilingShare kDenseAttendShare = {.bytes = 0.95, .flops = 0.5};
inline constexpr CeilingShare kSelectShare = {.bytes = 0.5, .flops = 0.5};
inline constexpr CeilingShare kSparseAttendShare = {.bytes = 0.6, .flops = 0.4};

double SecondsOf(const StepCost& cost, const kernels::Ceilings& ceilings);

// Predicted seconds per token of one sequence, and what follows.
struct AttentionForecast {
  int32_t context = 0;  // At this many tokens.
  double dense_seconds = 0;
  double sparse_seconds = 0;  // The dense step's, where the budget covers the context.
  // What rectification adds to a sparse token.
  double rectification_seconds = 0;
};
AttentionForecast Forecast(const ModelConfig& config, const kernels::KvLayout& layout,
                           const AttentionPolicy& policy, int32_t context,
                           const kernels::Ceilings& ceilings);

// Where the default mode is decided: contexts in which attention matters. A daemon with less room
// decides at what it has.
inline constexpr int32_t kReferenceContext = 32768;
// Rectification may add this share of a dense step, no more, to be the default.
inline constexpr double kMaxRectificationShare = 0.25;
// RECTIFIED or SPARSE.
AttentionMode ModeFor(const AttentionForecast& forecast);

// The context from which sparse steps with this policy's budget are forecast to be faster than
// dense ones at every length up to max_context: a power of two, at least kLeastSparseFrom, so that
// it is the same at every start although measured ceilings vary; max_context + 1 when there is
// none.
int32_t SparseFromFor(const ModelConfig& config, const kernels::KvLayout& layout,
                      const AttentionPolicy& policy, int32_t max_context,
                      const kernels::Ceilings& ceilings);
inline constexpr int32_t kLeastSparseFrom = 256;

// The same where a row's result may depend on the other rows. What selection takes however little
// there is to do is then paid by all sparse rows of a step together, so that a step is sparse from
// a number of tokens that they have in all.
struct SparseFromBatch {
  // Shorter sequences decode densely. A rectification takes some 40 us a layer on a GPU, however
  // short the context, which no sequence below kLeastBatchSparseFrom gains in a cycle.
  int32_t sequence_tokens = 0;
  // What the others must have beyond that, in all; a multiple of kLeastBatchSparseFrom.
  int64_t step_tokens = 0;
};
// With rectification paid where the policy's mode has it. sequence_tokens is max_context + 1 when
// more tokens never pay.
SparseFromBatch SparseFromForBatch(const ModelConfig& config, const kernels::KvLayout& layout,
                                   const AttentionPolicy& policy, int32_t max_context,
                                   const kernels::Ceilings& ceilings);
inline constexpr int32_t kLeastBatchSparseFrom = 4096;

}  // namespace resa::engine

#endif  // RESA_ENGINE_STEP_COST_H_
