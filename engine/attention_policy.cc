#include "engine/attention_policy.h"

#include <algorithm>
#include <cmath>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace resa::engine {
namespace {

int64_t CeilDivide(int64_t value, int64_t by) { return (value + by - 1) / by; }

// ceil(ratio * count) as the decimal ratio was meant: 0.07 is a little more than 7/100 in binary,
// and 0.07 * 100 must be 7 blocks, not 8. The slack covers a ratio that came through a float
// (relative error 2^-24) and is below one block for any count that fits a pool.
int64_t CeilShare(double ratio, int64_t count) {
  constexpr double kSlack = 1e-7;
  return static_cast<int64_t>(std::ceil(ratio * (1.0 - kSlack) * static_cast<double>(count)));
}

}  // namespace

const char* NameOf(AttentionMode mode) {
  switch (mode) {
    case AttentionMode::kDense:
      return "dense";
    case AttentionMode::kSparse:
      return "sparse";
    case AttentionMode::kRectified:
      return "rectified";
  }
  RESA_CHECK(false) << "attention mode " << static_cast<int>(mode);
  return "";
}

AttentionPolicy PaperPolicy() {
  AttentionPolicy policy;
  policy.mode = AttentionMode::kRectified;
  policy.keep_ratio = 0.1;
  policy.min_tokens = 256;
  policy.local_tokens = 16;
  policy.sink_tokens = 0;
  policy.rectify_interval = 32;
  return policy;
}

absl::StatusOr<AttentionPolicy> ResolvePolicy(const AttentionPolicy& defaults,
                                              const AttentionOverrides& overrides) {
  AttentionPolicy policy;
  policy.mode = overrides.mode.value_or(defaults.mode);
  policy.keep_ratio = overrides.keep_ratio.value_or(defaults.keep_ratio);
  policy.min_tokens = overrides.min_tokens.value_or(defaults.min_tokens);
  policy.local_tokens = overrides.local_tokens.value_or(defaults.local_tokens);
  policy.sink_tokens = overrides.sink_tokens.value_or(defaults.sink_tokens);
  policy.rectify_interval = overrides.rectify_interval.value_or(defaults.rectify_interval);
  if (absl::Status status = ValidatePolicy(policy); !status.ok()) return status;
  return policy;
}

absl::Status ValidatePolicy(const AttentionPolicy& policy) {
  // Written so that NaN fails.
  if (!(policy.keep_ratio > 0.0 && policy.keep_ratio <= 1.0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("keep_ratio: ", policy.keep_ratio, " is not above 0 and at most 1"));
  }
  if (policy.min_tokens < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("min_tokens: ", policy.min_tokens, " is not at least 1"));
  }
  if (policy.local_tokens < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("local_tokens: ", policy.local_tokens, " is not at least 1"));
  }
  if (policy.sink_tokens < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("sink_tokens: ", policy.sink_tokens, " is not at least 0"));
  }
  const int32_t interval = policy.rectify_interval;
  if (interval < kMinRectifyInterval || interval > kMaxRectifyInterval || interval % 8 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("rectify_interval: ", interval, " is not a multiple of 8 from ",
                     kMinRectifyInterval, " to ", kMaxRectifyInterval));
  }
  return absl::OkStatus();
}

std::optional<SparseBudget> BudgetFor(const AttentionPolicy& policy,
                                      const kernels::SelectorSpec& selector, int32_t kv_len,
                                      int32_t sparse_from) {
  RESA_CHECK_GE(kv_len, 1);
  if (policy.mode == AttentionMode::kDense || kv_len < sparse_from) return std::nullopt;
  const int64_t block = selector.block_tokens;
  const int64_t total = CeilDivide(kv_len, block);
  const int64_t local = CeilDivide(policy.local_tokens, block);
  const int64_t sink = CeilDivide(policy.sink_tokens, block);
  const int64_t keep = std::max(
      {CeilShare(policy.keep_ratio, total), CeilDivide(policy.min_tokens, block), local + sink});
  if (keep >= total) return std::nullopt;
  return SparseBudget{static_cast<int32_t>(keep), static_cast<int32_t>(local),
                      static_cast<int32_t>(sink)};
}

}  // namespace resa::engine
