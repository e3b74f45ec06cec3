#include "engine/step_cost.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "kernels/check.h"

namespace resa::engine {
namespace {

using ::resa::kernels::DType;
using ::resa::kernels::Matrix;
using ::resa::kernels::Roofline;

Matrix Shape(int64_t rows, int64_t cols, DType dtype = DType::kF32) {
  return Matrix{nullptr, dtype, rows, cols};
}

Roofline Linear(int64_t rows, int64_t in, int64_t out, bool accumulate = false) {
  kernels::LinearParams params;
  params.x = Shape(rows, in);
  params.weight = Shape(out, in, DType::kBF16);
  params.accumulate = accumulate;
  params.out = Shape(rows, out);
  return RooflineOf(params);
}

Roofline Times(Roofline roofline, int count) {
  roofline.bytes *= count;
  roofline.flops *= count;
  return roofline;
}

// The matrices of a step of `rows` rows that emits one token.
StepCost LinearCost(const ModelConfig& config, int64_t rows) {
  const int64_t hidden = config.hidden_size, mlp = config.intermediate_size;
  Roofline layer = Linear(rows, hidden, config.QDim());
  layer += Times(Linear(rows, hidden, config.KvDim()), 2);
  layer += Linear(rows, config.QDim(), hidden, /*accumulate=*/true);
  layer += Times(Linear(rows, hidden, mlp), 2);
  layer += Linear(rows, mlp, hidden, /*accumulate=*/true);
  StepCost cost;
  cost.linear = Times(layer, config.num_layers);
  cost.head = Linear(1, hidden, config.vocab_size);
  return cost;
}

}  // namespace

StepCost DenseStepCost(const ModelConfig& config, const kernels::KvLayout& layout,
                       int32_t context) {
  return WindowStepCost(config, layout, context, 1);
}

StepCost WindowStepCost(const ModelConfig& config, const kernels::KvLayout& layout, int32_t context,
                        int32_t rows) {
  RESA_CHECK(rows > 0 && rows <= context) << rows << " rows of " << context << " tokens";
  StepCost cost = LinearCost(config, rows);
  const kernels::DenseChunk chunk = {.rows = rows, .position = context - rows};
  kernels::ChunkAttendParams params;
  params.q = params.out = Shape(rows, config.QDim());
  params.num_heads = config.num_heads;
  params.chunks = &chunk;
  params.num_chunks = 1;
  params.layout = layout;
  cost.dense_attend = Times(RooflineOf(params), config.num_layers);
  return cost;
}

StepCost SparseStepCost(const ModelConfig& config, const kernels::KvLayout& layout, int32_t context,
                        const SparseBudget& budget) {
  RESA_CHECK_GT(context, 0);
  StepCost cost = LinearCost(config, 1);
  const kernels::SparseRow row = {.position = context - 1,
                                  .keep_blocks = budget.keep_blocks,
                                  .local_blocks = budget.local_blocks,
                                  .sink_blocks = budget.sink_blocks};
  kernels::SelectParams select;
  select.q = Shape(1, config.QDim());
  select.num_heads = config.num_heads;
  select.rows = &row;
  select.num_rows = 1;
  select.layout = layout;
  kernels::SparseAttendParams attend;
  attend.q = attend.out = select.q;
  attend.num_heads = config.num_heads;
  attend.rows = &row;
  attend.num_rows = 1;
  attend.layout = layout;
  cost.select = Times(RooflineOf(select), config.num_layers);
  cost.sparse_attend = Times(RooflineOf(attend), config.num_layers);
  cost.sparse_layers = config.num_layers;
  cost.selector = layout.selector.kind;
  return cost;
}

double SecondsOf(const StepCost& cost, const kernels::Ceilings& ceilings) {
  const auto seconds = [&](const Roofline& stage, const CeilingShare& share) {
    return stage.Seconds(
        kernels::Ceilings{.read_bytes_per_s = share.bytes * ceilings.read_bytes_per_s,
                          .flops_per_s = share.flops * ceilings.flops_per_s});
  };
  return seconds(cost.linear, kLinearShare) + seconds(cost.head, kLinearShare) +
         seconds(cost.select, kSelectShare) + seconds(cost.sparse_attend, kSparseAttendShare) +
         seconds(cost.dense_attend, kDenseAttendShare) +
         cost.sparse_layers * ceilings.SelectionSeconds(cost.selector);
}

AttentionForecast Forecast(const ModelConfig& config, const kernels::KvLayout& layout,
                           const AttentionPolicy& policy, int32_t context,
                           const kernels::Ceilings& ceilings) {
  AttentionForecast forecast;
  forecast.context = context;
  forecast.dense_seconds = SecondsOf(DenseStepCost(config, layout, context), ceilings);
  forecast.sparse_seconds = forecast.dense_seconds;
  AttentionPolicy sparse = policy;
  sparse.mode = AttentionMode::kSparse;
  if (const auto budget = BudgetFor(sparse, layout.selector, context, /*sparse_from=*/0)) {
    forecast.sparse_seconds = SecondsOf(SparseStepCost(config, layout, context, *budget), ceilings);
  }
  const int32_t rows = std::min(policy.rectify_interval, context);
  const double window = SecondsOf(WindowStepCost(config, layout, context, rows), ceilings);
  forecast.rectification_seconds = (window - forecast.sparse_seconds) / policy.rectify_interval;
  return forecast;
}

AttentionMode ModeFor(const AttentionForecast& forecast) {
  return forecast.rectification_seconds < kMaxRectificationShare * forecast.dense_seconds
             ? AttentionMode::kRectified
             : AttentionMode::kSparse;
}

int32_t SparseFromFor(const ModelConfig& config, const kernels::KvLayout& layout,
                      const AttentionPolicy& policy, int32_t max_context,
                      const kernels::Ceilings& ceilings) {
  // Costs are lines in the context, steps of blocks aside, so four lengths per octave see where
  // they cross. From the longest down: every length above the answer must pay.
  const auto pays = [&](int64_t context) {
    const AttentionForecast forecast =
        Forecast(config, layout, policy, static_cast<int32_t>(context), ceilings);
    return forecast.sparse_seconds < forecast.dense_seconds;
  };
  int64_t from = kLeastSparseFrom;
  while (from < max_context) from *= 2;
  int64_t answer = int64_t{max_context} + 1;
  if (!pays(max_context)) return static_cast<int32_t>(answer);
  for (from /= 2; from >= kLeastSparseFrom; from /= 2) {
    for (int quarter = 3; quarter >= 0; --quarter) {
      const int64_t context = from + quarter * from / 4;
      if (context < max_context && !pays(context)) return static_cast<int32_t>(answer);
    }
    answer = from;
  }
  return static_cast<int32_t>(answer);
}

SparseFromBatch SparseFromForBatch(const ModelConfig& config, const kernels::KvLayout& layout,
                                   const AttentionPolicy& policy, int32_t max_context,
                                   const kernels::Ceilings& ceilings) {
  // Costs are lines in the context: two lengths beyond every floor and fixed budget tell the slope.
  constexpr int32_t kNear = 65536, kFar = 131072;
  const auto gain = [&](int32_t context) {
    const AttentionForecast forecast = Forecast(config, layout, policy, context, ceilings);
    const bool rectified = policy.mode == AttentionMode::kRectified;
    return forecast.dense_seconds - forecast.sparse_seconds -
           (rectified ? forecast.rectification_seconds : 0);
  };
  const double seconds_per_token = (gain(kFar) - gain(kNear)) / (kFar - kNear);
  if (seconds_per_token <= 0) return {max_context + 1, 0};
  const double tokens =
      config.num_layers * ceilings.SelectionSeconds(layout.selector.kind) / seconds_per_token;
  return {kLeastBatchSparseFrom,
          static_cast<int64_t>(std::ceil(tokens / kLeastBatchSparseFrom)) * kLeastBatchSparseFrom};
}

}  // namespace resa::engine
