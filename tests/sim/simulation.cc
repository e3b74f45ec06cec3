#include "tests/sim/simulation.h"

#include "absl/strings/str_cat.h"
#include "tests/sim/random.h"
#include "tests/sim/world_run.h"

namespace resa::sim {

SimulationResult Simulate(const SimulationOptions& options) {
  SimulationResult result;
  Counts& total = result.counts;
  while (total.steps < options.steps && result.violation.empty()) {
    WorldRun world(Mix(options.seed, static_cast<uint64_t>(total.worlds++)), options.bug);
    bool more = true;
    while (more && total.steps + world.stage().step < options.steps) {
      if (options.progress != nullptr) *options.progress = total.steps + world.stage().step;
      more = world.Step();
    }
    result.bugs_planted += world.bugs_planted();
    total.Add(world.stage().counts);
    if (!world.stage().failed()) continue;
    result.violation = world.stage().violation;
    result.violation_step = total.steps;
  }
  return result;
}

std::string Describe(const Counts& counts) {
  std::string text;
  for (const Counter& sum : kSums) absl::StrAppend(&text, sum.name, ": ", counts.*sum.value, "\n");
  for (const Counter& maximum : kMaxima) {
    absl::StrAppend(&text, maximum.name, ": ", counts.*maximum.value, "\n");
  }
  return text;
}

}  // namespace resa::sim
