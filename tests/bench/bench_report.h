#ifndef RESA_TESTS_BENCH_BENCH_REPORT_H_
#define RESA_TESTS_BENCH_BENCH_REPORT_H_

// What resa_bench found, for people and for programs.

#include <string>
#include <vector>

#include "engine/model_config.h"
#include "kernels/ceilings.h"
#include "tests/bench/bench_options.h"
#include "tests/bench/bench_results.h"

namespace resa::bench {

struct BenchReport {
  std::string device;  // Ops::Description().
  kernels::Ceilings ceilings;
  kernels::Ceilings ceilings_at_end;  // Measured again: how steady the machine was.

  std::string model;  // The shape's name or the path.
  engine::ModelConfig config;
  size_t weight_bytes = 0;
  kernels::KvLayout layout;
  engine::AttentionPolicy policy;

  std::vector<RunResult> results;
  std::vector<Ratio> ratios;
};

// Machine, then per run its stages and what ran, then a table of all runs ("read" is the share of
// the read bandwidth, "roofline" that of the time at the ceilings), then the ratios.
std::string TextOf(const BenchReport& report);

// The same as one JSON object. Seconds, bytes and FLOPs per step; shares are of 1.
std::string JsonOf(const BenchReport& report);

}  // namespace resa::bench

#endif  // RESA_TESTS_BENCH_BENCH_REPORT_H_
