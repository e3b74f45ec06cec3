#ifndef RESA_ENGINE_ATTENTION_POLICY_H_
#define RESA_ENGINE_ATTENTION_POLICY_H_

// How a request's decode steps attend: its mode and the budget of the selector. The selector itself
// (min/max or sketch) shapes the pool and belongs to the daemon, not to the request.

#include <cstdint>
#include <optional>

#include "absl/status/statusor.h"
#include "kernels/params.h"

namespace resa::engine {

enum class AttentionMode : uint8_t {
  kDense,      // Every step attends to everything.
  kSparse,     // Decode steps attend to the kept blocks; errors are never repaired.
  kRectified,  // ReSA: sparse, and every `rectify_interval` tokens a dense pass over the window.
};
const char* NameOf(AttentionMode mode);

inline constexpr int kMinRectifyInterval = 8;
inline constexpr int kMaxRectifyInterval = 256;

// A complete policy. Local and sink tokens count inside the budget; all are rounded up to blocks.
struct AttentionPolicy {
  AttentionMode mode = AttentionMode::kRectified;
  double keep_ratio = 0.1;    // (0, 1]: share of the blocks that a step attends to.
  int32_t min_tokens = 64;    // >= 1: the budget is never below this many tokens.
  int32_t local_tokens = 32;  // >= 1: the newest tokens, always kept.
  int32_t sink_tokens = 16;   // >= 0: the first tokens, always kept.
  // 8 to 256, a multiple of 8. Token position p is due when (p + 1) % rectify_interval == 0.
  int32_t rectify_interval = 32;

  friend bool operator==(const AttentionPolicy&, const AttentionPolicy&) = default;
};

// The paper's budgets (arXiv 2506.04108): keep 0.1, at least 256 tokens, 16 local, no sink, f 32.
AttentionPolicy PaperPolicy();

// What a request may override; unset fields take the server's default.
struct AttentionOverrides {
  std::optional<AttentionMode> mode;
  std::optional<double> keep_ratio;
  std::optional<int32_t> min_tokens;
  std::optional<int32_t> local_tokens;
  std::optional<int32_t> sink_tokens;
  std::optional<int32_t> rectify_interval;
};

// `defaults` with the overrides laid over. INVALID_ARGUMENT as ValidatePolicy.
absl::StatusOr<AttentionPolicy> ResolvePolicy(const AttentionPolicy& defaults,
                                              const AttentionOverrides& overrides);

// INVALID_ARGUMENT, of the form "keep_ratio: what is wrong and what is accepted": the bare field,
// to which the caller adds the path that the user knows.
absl::Status ValidatePolicy(const AttentionPolicy& policy);

// The blocks one decode step may read, in blocks of the selector.
struct SparseBudget {
  int32_t keep_blocks = 0;
  int32_t local_blocks = 0;
  int32_t sink_blocks = 0;

  friend bool operator==(const SparseBudget&, const SparseBudget&) = default;
};

// The budget of a step whose newest token is the kv_len-th, or nothing when the step is to take the
// dense path: the mode is dense, the budget covers the sequence, or kv_len < sparse_from.
// With N = ceil(kv_len / block): keep = max(ceil(keep_ratio N), min(N, ceil(min_tokens / block)),
// local + sink blocks). The ratio is meant as a decimal: 0.07 of 100 blocks are 7, though the
// nearest double lies above it. A budget returned is below N.
std::optional<SparseBudget> BudgetFor(const AttentionPolicy& policy,
                                      const kernels::SelectorSpec& selector, int32_t kv_len,
                                      int32_t sparse_from);

}  // namespace resa::engine

#endif  // RESA_ENGINE_ATTENTION_POLICY_H_
