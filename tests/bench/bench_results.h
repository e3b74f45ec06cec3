#ifndef RESA_TESTS_BENCH_BENCH_RESULTS_H_
#define RESA_TESTS_BENCH_BENCH_RESULTS_H_

// From the records of steps to figures: medians and spread, shares of the ceilings, ratios.

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "kernels/ceilings.h"
#include "tests/bench/bench_run.h"

namespace resa::bench {

// Nearest-rank percentile: the smallest value that at least `percent` of all do not exceed; 0
// without values. REQUIRES 0 < percent <= 100.
double Percentile(std::vector<double> values, double percent);

// Over units of one or more consecutive steps (a unit is a round: of ReSA, f steps). Everything is
// per step, a unit's sum divided by its steps.
struct Summary {
  int64_t units = 0;
  int32_t unit_steps = 1;
  double median = 0, p10 = 0, p90 = 0;  // Seconds.
  double tokens_per_second = 0;         // At the median.
  double bytes = 0, flops = 0;          // Of all stages, mean.
  double seconds_at_ceiling = 0;        // Sum over all ops, mean: what the step takes at best.
  Stages stages = {};                   // Seconds: median over the units; the rest: mean.
  double seconds_between_ops = 0;       // Of the step, outside all stages: median.

  double roofline_share() const { return median > 0 ? seconds_at_ceiling / median : 0; }
};

// Of whole units of `unit_steps` records each; what is left at the end is dropped.
Summary Summarise(absl::Span<const StepRecord> records, int32_t unit_steps);

struct RunResult {
  RunSpec spec;
  int32_t round_steps = 1;
  std::vector<StepRecord> records;
  // Where stages are timed apart: the steps that they were timed in. Their sum is then no part of
  // a step's time, since on a device an op need not wait for the one before to be over.
  std::vector<StepRecord> stage_records;
  Summary whole;  // Units are rounds.
  // Where some steps rectify and others do not: each alone. Else without units.
  Summary plain, windows;
  // What ran: sums over all records.
  kernels::OpCounters counters;
  int64_t steps = 0, rows = 0, tokens = 0, rectifications = 0, rectified_rows = 0;
};
RunResult ResultOf(const BenchRun& run);

struct Ratio {
  std::string name;
  double value = 0;
};

// Of runs that were measured in turn: medians over pairs of rounds, so that a disturbance that
// lasts longer than a step weighs on both sides. For each context and batch sparse and rectified
// against dense, as a whole and attention alone; for each mode and context each batch against the
// smallest.
std::vector<Ratio> RatiosOf(absl::Span<const RunResult> results);

}  // namespace resa::bench

#endif  // RESA_TESTS_BENCH_BENCH_RESULTS_H_
