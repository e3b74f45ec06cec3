#ifndef RESA_TESTS_SUPPORT_MODEL_RUNNER_H_
#define RESA_TESTS_SUPPORT_MODEL_RUNNER_H_

// One sequence on the real transformer, with the logits of every row: for tests that compare with
// another implementation.

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/types/span.h"
#include "engine/attention_policy.h"
#include "engine/kv_memory.h"
#include "engine/model_files.h"
#include "engine/ragged_batch.h"
#include "engine/transformer.h"
#include "kernels/ops.h"
#include "tests/support/kv_snapshot.h"

namespace resa::testing {

struct RunnerOptions {
  kernels::SelectorSpec selector;
  kernels::DType kv_dtype = kernels::DType::kF32;
  int max_tokens = 1024;  // The sequence at most.
  int max_rows = 128;     // Fed at a time at most.
};

class ModelRunner {
 public:
  // `model` and `ops` must outlive it. Its pages are in no particular order.
  ModelRunner(const engine::LoadedModel& model, kernels::Ops* ops, const RunnerOptions& options);

  // Feeds tokens at length(), length() + 1, ... densely, or one token sparsely. Returns the logits
  // of every row, [tokens.size(), vocab_size]. REQUIRES at most max_rows tokens.
  std::vector<float> Feed(absl::Span<const int32_t> tokens,
                          std::optional<engine::SparseBudget> sparse = std::nullopt);
  // Dense, `chunk` rows at a time; the logits of all rows.
  std::vector<float> Prefill(absl::Span<const int32_t> tokens, int chunk);
  // The next tokens are fed at `length`; what is there is overwritten. REQUIRES length <= length().
  void Rewind(int length);

  // `count` greedy tokens (ties to the lower id) after `prompt`, from an empty sequence, by the
  // engine's own schedule of sparse steps and rectifications. REQUIRES max_rows >= the interval.
  std::vector<int32_t> Generate(absl::Span<const int32_t> prompt, int count,
                                const engine::AttentionPolicy& policy);

  int length() const { return length_; }
  int vocab_size() const { return vocab_size_; }
  KvSnapshot Snapshot() const { return SnapshotKv(*kv_, ops_, pages_, length_); }

 private:
  kernels::Ops* const ops_;
  const RunnerOptions options_;
  const int vocab_size_;
  engine::RaggedBatch batch_;
  std::unique_ptr<engine::KvMemory> kv_;
  std::unique_ptr<engine::Transformer> transformer_;
  std::vector<int32_t> pages_;
  int length_ = 0;
};

}  // namespace resa::testing

#endif  // RESA_TESTS_SUPPORT_MODEL_RUNNER_H_
