#ifndef RESA_ENGINE_SCHEDULER_H_
#define RESA_ENGINE_SCHEDULER_H_

// Decides what the next step does. The plan is a function of the sequences, the pool and the
// limits.
//
// Rows. Every decoding sequence claims one row; then due rectifications claim their windows, oldest
// first (those left over stall: no other segment, no token, until their pass); then prefill chunks
// take what is left. While prompts wait, rectifications leave `min_chunk_tokens` rows to them, and
// the step is large enough for one full window besides, so neither starves: a due sequence stalls
// for at most as many steps as there are sequences.
//
// Pages. In order of rank (priority, then age) each segment gets the pages it writes. When the pool
// is dry, the lowest rank gives its pages back (preemption by recompute), so that the highest rank
// always moves on. A waiting sequence is admitted when the pages for all of its tokens are there,
// beside what the running ones need next; strictly in order of rank, so that a large request is not
// overtaken for ever by small ones.

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "engine/kv_pool.h"
#include "engine/step_plan.h"

namespace resa::engine {

struct SchedulerLimits {
  int32_t max_step_tokens = 512;  // Rows of a step.
  int32_t max_sequences = 32;     // Sequences that run at a time.
  int32_t min_chunk_tokens = 32;  // Rows left to prefill beside rectifications.
  int32_t sparse_from = 0;        // Shorter sequences take the dense path; in tokens.
  // So do all in a step where those that could be sparse have fewer tokens than this beyond
  // sparse_from, in all. 0: a sequence's path does not depend on the others.
  int64_t sparse_step_tokens = 0;
  kernels::SelectorSpec selector;
};

// INVALID_ARGUMENT, with the numbers, when one row per sequence, the largest window and the
// smallest chunk do not fit into a step.
absl::Status ValidateLimits(const SchedulerLimits& limits);

// Higher priority first, then older.
inline bool RanksBefore(const Sequence& a, const Sequence& b) {
  if (a.request->priority != b.request->priority) return a.request->priority > b.request->priority;
  return a.order < b.order;
}

// Holds scratch memory between steps and nothing that a plan depends on. Thread: the engine's.
class Scheduler {
 public:
  // REQUIRES valid limits.
  explicit Scheduler(const SchedulerLimits& limits);

  // Fills `plan`, whose memory is reused. When any sequence can run, the plan is not empty: it has
  // a segment, or it preempts. REQUIRES that each sequence fits into the empty pool. Quickest when
  // the sequences come by rank. Of those that neither run nor own pages only the first
  // max_sequences by rank matter: nobody is admitted past them.
  void Plan(absl::Span<const Sequence* const> sequences, const KvPool& pool, StepPlan* plan);

  const SchedulerLimits& limits() const { return limits_; }

 private:
  // What this step means to do with a sequence.
  struct Claim {
    Work work;
    bool granted_rows = false;
    bool preempted = false;
    int32_t granted_pages = 0;
  };

  void ClaimDecodeRows(StepPlan* plan);
  void ClaimPrefillRows();
  void GrantPages(StepPlan* plan);
  void Admit(StepPlan* plan);

  bool MakeRoom(int32_t for_sequence, int32_t begin, int32_t end, StepPlan* plan);
  void Preempt(int32_t index, StepPlan* plan);
  int32_t Owners(int32_t page) const;
  void TakeOwner(int32_t page);
  int32_t PagesToWrite(const Sequence& sequence, int32_t begin, int32_t end) const;
  void TakePages(int32_t index);

  const SchedulerLimits limits_;

  // Of the current call only.
  absl::Span<const Sequence* const> sequences_;
  const KvPool* pool_ = nullptr;
  int32_t free_pages_ = 0;
  int32_t rows_left_ = 0;
  int32_t running_ = 0;
  std::vector<int32_t> rank_;  // Indices, highest first.
  std::vector<Claim> claims_;  // By index.
  std::vector<int32_t> due_;
  std::vector<int32_t> released_;  // By page: owners that this plan takes away.
  bool releases_ = false;          // Any but zeros in released_.
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_SCHEDULER_H_
