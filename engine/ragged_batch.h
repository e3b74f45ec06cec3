#ifndef RESA_ENGINE_RAGGED_BATCH_H_
#define RESA_ENGINE_RAGGED_BATCH_H_

// One step's segments as the ops see them: all tokens flat, one row each, and beside them the lists
// that say which rows attend how. Built once per step; every layer reuses it.
//
//   segments   [prefill 5] [sparse 1] [window 3] [dense 1]
//   rows        0 1 2 3 4   5          6 7 8      9
//   chunks      0..4                   6..8       9
//   sparse                  5
//   runs        0..4        5          6..8       9           (every row's K and V are written)

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "engine/executor.h"
#include "kernels/params.h"

namespace resa::engine {

// What a step holds at most. Every workspace below the scheduler is sized from these, once.
struct BatchLimits {
  int32_t max_rows = 0;                // > 0
  int32_t max_segments = 0;            // > 0, <= max_rows
  int32_t max_pages_per_sequence = 0;  // > 0
};

// Thread: the engine's. Lists are in host memory and valid until the next Build.
class RaggedBatch {
 public:
  // REQUIRES positive limits. Allocates everything it will ever need.
  RaggedBatch(const BatchLimits& limits, const kernels::KvLayout& layout);

  // REQUIRES (CHECKed, since a wrong page would corrupt another sequence): segments within the
  // limits, each as SegmentInput says, pages inside the pool, budgets inside the sequence.
  void Build(absl::Span<const SegmentInput> segments);

  int32_t rows() const { return static_cast<int32_t>(tokens_.size()); }
  const BatchLimits& limits() const { return limits_; }
  const kernels::KvLayout& layout() const { return layout_; }

  absl::Span<const int32_t> tokens() const { return tokens_; }        // [T]
  absl::Span<const int32_t> positions() const { return positions_; }  // [T]
  absl::Span<const kernels::KvRun> runs() const { return runs_; }
  absl::Span<const kernels::DenseChunk> dense_chunks() const { return dense_chunks_; }
  absl::Span<const kernels::SparseRow> sparse_rows() const { return sparse_rows_; }
  kernels::PageTables tables() const { return {pages_.data(), limits_.max_pages_per_sequence}; }

  // Block ids that Select writes for this step, and at most for any.
  int64_t num_block_ids() const { return num_block_ids_; }
  int64_t max_block_ids() const { return MaxBlockIds(limits_, layout_); }
  static int64_t MaxBlockIds(const BatchLimits& limits, const kernels::KvLayout& layout);

  // The rows of the batch whose logits are wanted, and how to sample each: samples()[i].row is i.
  absl::Span<const int32_t> sampled_rows() const { return sampled_rows_; }
  absl::Span<const kernels::SampleRow> samples() const { return samples_; }

  // All of the above as the ops' step takes it. `results`: [samples().size()], out.
  kernels::StepLists Lists(kernels::SampleResult* results) const;

 private:
  void CheckSegment(const SegmentInput& segment) const;
  void TakeTable(const SegmentInput& segment, int32_t table);
  void AppendSegment(const SegmentInput& segment, int32_t table);
  kernels::SparseRow MakeSparseRow(const SegmentInput& segment, int32_t row, int32_t table) const;

  // Constant after construction.
  const BatchLimits limits_;
  const kernels::KvLayout layout_;

  std::vector<int32_t> tokens_;
  std::vector<int32_t> positions_;
  std::vector<kernels::KvRun> runs_;
  std::vector<kernels::DenseChunk> dense_chunks_;
  std::vector<kernels::SparseRow> sparse_rows_;
  // Tables stay from step to step: of one whose id is still the same only what was appended is
  // looked at. A step at long context would otherwise spend most of its time on the host here.
  struct HeldTable {
    uint64_t id = 0;
    int32_t pages = 0;
  };
  std::vector<int32_t> pages_;        // [max_segments, max_pages_per_sequence]
  std::vector<HeldTable> held_;       // [max_segments]
  std::vector<int32_t> known_pages_;  // [segments]: entries that were there in the last step.
  int64_t num_block_ids_ = 0;
  std::vector<int32_t> sampled_rows_;
  std::vector<kernels::SampleRow> samples_;
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_RAGGED_BATCH_H_
