// resa_sim: runs the real engine in simulated worlds and checks it after every step.
//
//   resa_sim --seed N --steps M [--seeds K] [--bug NAME]
//
// Runs seeds N .. N + K - 1, each for M steps. Exits with 1 at the first broken rule and prints the
// seed, the step and the rule; the same seed with that many steps shows it again.

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <optional>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "tests/sim/simulation.h"

namespace resa::sim {
namespace {

constexpr char kUsage[] =
    "usage: resa_sim [--seed N] [--steps M] [--seeds K] [--bug NAME]\n"
    "  --seed N    the first seed (default 1)\n"
    "  --steps M   engine steps per seed (default 200000)\n"
    "  --seeds K   how many seeds in a row (default 1)\n"
    "  --bug NAME  plant a bug: leaked_page, lost_rectification, shared_page_written, late_copy,\n"
    "              lost_write, foreign_page or swapped_tokens\n";

// For the report of a failed check inside the engine, which ends the process.
volatile int64_t g_seed = 0;
volatile int64_t g_step = 0;

void ReportAbort(int) {
  char text[120];
  std::snprintf(text, sizeof(text), "replay: resa_sim --seed %lld --steps %lld\n",
                static_cast<long long>(g_seed), static_cast<long long>(g_step + 1));
  std::fputs(text, stderr);
  std::fflush(stderr);
}

struct Flags {
  int64_t seed = 1;
  int64_t seeds = 1;
  int64_t steps = 200000;
  std::optional<Bug> bug;
};

bool Parse(int argc, char** argv, Flags* flags) {
  for (int i = 1; i + 1 < argc; i += 2) {
    const absl::string_view name = argv[i];
    const absl::string_view value = argv[i + 1];
    if (name == "--bug") {
      flags->bug = BugNamed(value);
      if (!flags->bug.has_value()) return false;
      continue;
    }
    int64_t* number = name == "--seed"    ? &flags->seed
                      : name == "--seeds" ? &flags->seeds
                      : name == "--steps" ? &flags->steps
                                          : nullptr;
    if (number == nullptr || !absl::SimpleAtoi(value, number) || *number < 0) return false;
  }
  return argc % 2 == 1;
}

int Main(int argc, char** argv) {
  Flags flags;
  if (!Parse(argc, argv, &flags)) {
    std::cerr << kUsage;
    return 2;
  }
  std::signal(SIGABRT, ReportAbort);
  const absl::Time start = absl::Now();
  Counts total;
  for (int64_t seed = flags.seed; seed < flags.seed + flags.seeds; ++seed) {
    g_seed = seed;
    SimulationOptions options;
    options.seed = static_cast<uint64_t>(seed);
    options.steps = flags.steps;
    options.bug = flags.bug;
    options.progress = &g_step;
    const SimulationResult result = Simulate(options);
    total.Add(result.counts);
    if (result.violation.empty()) continue;
    std::cerr << "seed " << seed << ", step " << result.violation_step << ": " << result.violation
              << "\nreplay: resa_sim --seed " << seed << " --steps " << result.violation_step;
    if (flags.bug.has_value()) std::cerr << " --bug " << NameOf(*flags.bug);
    std::cerr << "\n";
    return 1;
  }
  std::cout << "seeds " << flags.seed << " to " << flags.seed + flags.seeds - 1 << ", "
            << absl::FormatDuration(absl::Now() - start) << ", no rule broken\n"
            << Describe(total);
  return 0;
}

}  // namespace
}  // namespace resa::sim

int main(int argc, char** argv) { return resa::sim::Main(argc, argv); }
