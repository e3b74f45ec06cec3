#ifndef RESA_TESTS_BENCH_BENCH_OPTIONS_H_
#define RESA_TESTS_BENCH_BENCH_OPTIONS_H_

// The command line of resa_bench.

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/attention_policy.h"
#include "kernels/params.h"

namespace resa::bench {

// A chunk of `rows` prompt tokens after `position` tokens of context.
struct PrefillCase {
  int32_t rows = 0;
  int32_t position = 0;
};

struct BenchOptions {
  std::string shape = "0.5b";  // Or a model from disk:
  std::string model;           // A Hugging Face directory or GGUF file.

  std::string device = "cpu";
  int32_t threads = 0;   // 0: all cores given.
  std::string target;    // Instruction set; empty: the best there is.
  bool cpu_bf16 = true;  // The CPU's bf16 instructions where it has them, as in the daemon.

  std::vector<int32_t> contexts = {1024};
  std::vector<int32_t> batches = {1};
  std::vector<engine::AttentionMode> modes = {engine::AttentionMode::kDense,
                                              engine::AttentionMode::kSparse,
                                              engine::AttentionMode::kRectified};
  std::vector<PrefillCase> prefills;

  kernels::SelectorSpec selector = {kernels::SelectorKind::kSketch, 8, 3, {1.0f, 1.0f}};
  engine::AttentionPolicy policy;  // Its mode is that of the run.
  int32_t sparse_from = 0;

  double seconds = 5;  // Measured per context, at least.
  uint64_t seed = 1;
  std::string json;  // A file to write, "-" for standard output; empty: none.
};

// `args` without the program's name. INVALID_ARGUMENT names the flag and what was expected.
absl::StatusOr<BenchOptions> ParseBenchOptions(absl::Span<const std::string> args);

std::string BenchHelp();

}  // namespace resa::bench

#endif  // RESA_TESTS_BENCH_BENCH_OPTIONS_H_
