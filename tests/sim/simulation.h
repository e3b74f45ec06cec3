#ifndef RESA_TESTS_SIM_SIMULATION_H_
#define RESA_TESTS_SIM_SIMULATION_H_

// The real engine, scheduler, pool and inbox in simulated worlds: random clients, a fake executor,
// a clock in our hand, everything from one seed. The same options give the same run, step by step.

#include <cstdint>
#include <optional>
#include <string>

#include "tests/sim/saboteur.h"
#include "tests/sim/stage.h"

namespace resa::sim {

struct SimulationOptions {
  uint64_t seed = 1;
  int64_t steps = 10000;   // Of the engine, over as many worlds as they fill.
  std::optional<Bug> bug;  // Planted in every world.
  // Where the run is, for whoever reports a crash. May be null.
  volatile int64_t* progress = nullptr;
};

struct SimulationResult {
  Counts counts;
  int64_t bugs_planted = 0;
  // The first broken rule, after this many steps of the run; empty when there is none.
  std::string violation;
  int64_t violation_step = 0;
};

SimulationResult Simulate(const SimulationOptions& options);

// The counts, one "name: value" a line.
std::string Describe(const Counts& counts);

}  // namespace resa::sim

#endif  // RESA_TESTS_SIM_SIMULATION_H_
