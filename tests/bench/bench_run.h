#ifndef RESA_TESTS_BENCH_BENCH_RUN_H_
#define RESA_TESTS_BENCH_BENCH_RUN_H_

// What is timed: the steps of one setting, made of the engine's own sequences and policies and
// executed by its own executor.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "engine/attention_policy.h"
#include "engine/model_executor.h"
#include "engine/sequence.h"
#include "tests/bench/bench_options.h"
#include "tests/bench/synthetic_pool.h"
#include "tests/bench/timed_ops.h"

namespace resa::bench {

struct RunSpec {
  bool prefill = false;
  engine::AttentionMode mode = engine::AttentionMode::kDense;
  int32_t context = 0;  // Decoding: tokens that the newest attends to. Prefill: those before.
  int32_t batch = 1;    // Decoding: sequences.
  int32_t rows = 1;     // Prefill: of the chunk.

  std::string Name() const;  // "rectified, 8192 x 4", "prefill 512 after 7600"
};

// One step.
struct StepRecord {
  double seconds = 0;
  Stages stages = {};
  kernels::OpCounters counters;  // What this step added.
  int32_t rows = 0;
  int32_t tokens = 0;          // Sampled, or prefilled.
  int32_t windows = 0;         // Sequences rectified in this step,
  int32_t rectified_rows = 0;  // and their rows.
};

// a + factor b.
kernels::OpCounters AddScaled(const kernels::OpCounters& a, const kernels::OpCounters& b,
                              int64_t factor);

// Decoding goes round: sequence s of B starts at position context - 1 + s f / B, f the interval,
// runs f positions, due windows included, and starts over. So each sequence is rectified once in f
// steps and not all at once. A prefill repeats one chunk.
class BenchRun {
 public:
  // Positions that a run needs pages for.
  static int64_t TokensNeeded(const RunSpec& spec, int32_t interval);
  // Rows of a step at most.
  static int32_t MaxRows(const RunSpec& spec, int32_t interval);

  // All must outlive it. REQUIRES that the first TokensNeeded() positions of the deal's first
  // `batch` sequences have been filled.
  BenchRun(const RunSpec& spec, const BenchOptions& options, int32_t vocab_size,
           const PageDeal& deal, TimedOps* ops, engine::Executor* executor);

  const RunSpec& spec() const { return spec_; }
  // Steps of a full round: 1, or the interval where the steps differ.
  int32_t round_steps() const;

  // INTERNAL when the model's logits are not finite.
  absl::Status Step();
  // Back to the first step; forgets what was recorded.
  void Reset();

  const std::vector<StepRecord>& records() const { return records_; }

  // A device's ops are slower when each is waited for. So there some steps are taken for the times
  // of their stages alone: TimeStages(true) before them, KeepStages() after, which goes back to the
  // first step and to steps that run as in service.
  void TimeStages(bool on) { ops_.TimeStages(on); }
  void KeepStages();
  const std::vector<StepRecord>& stage_records() const { return stage_records_; }

 private:
  void Rewind(int32_t index);
  void AddSegment(int32_t index, StepRecord* record);

  const RunSpec spec_;
  const int32_t interval_;
  const int32_t sparse_from_;
  const kernels::SelectorSpec selector_;
  const int32_t vocab_size_;
  const PageDeal& deal_;
  TimedOps& ops_;
  engine::Executor& executor_;

  std::unique_ptr<engine::Request> request_;
  std::vector<std::unique_ptr<engine::Sequence>> sequences_;
  std::vector<engine::Work> work_;
  std::vector<engine::SegmentInput> segments_;
  int32_t next_step_ = 0;  // Within the round of f steps.
  std::vector<StepRecord> records_, stage_records_;
};

// Steps the runs in turn, one step each, so that what disturbs the machine disturbs all of them
// alike; until `seconds` have gone by, every run has at least 3 steps, and rounds are complete.
// A few steps of each go before as warm-up. `stages_apart`: stages are timed in rounds of their
// own.
absl::Status MeasureRuns(const std::vector<std::unique_ptr<BenchRun>>& runs, double seconds,
                         bool stages_apart);

}  // namespace resa::bench

#endif  // RESA_TESTS_BENCH_BENCH_RUN_H_
