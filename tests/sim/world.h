#ifndef RESA_TESTS_SIM_WORLD_H_
#define RESA_TESTS_SIM_WORLD_H_

// What the simulated engine is made of and what its clients are like; everything drawn from one
// Random. Small on purpose: pools of a few dozen pages and steps of a few hundred rows run dry many
// times a second.

#include <cstdint>
#include <memory>

#include "absl/time/time.h"
#include "engine/engine.h"
#include "engine/request.h"
#include "tests/sim/random.h"

namespace resa::sim {

// How a world goes down after its last step.
enum class Ending : uint8_t {
  kDrain,    // Refuse what is new, finish what is there.
  kAbort,    // End everything at once.
  kDestroy,  // Destroy the engine under its clients.
};

struct World {
  engine::EngineOptions options;
  int32_t steps = 0;
  Ending ending = Ending::kDrain;

  // Chances, as "one in so many" per step.
  int32_t arrival = 0;
  int32_t cancel = 0;
  int32_t failed_step = 0;
  // Per request.
  int32_t deadline = 0;
  int32_t slow_reader = 0;
  // Requests are drawn up to these sizes, in tokens.
  int32_t max_prompt = 0;
  int32_t max_output = 0;
  // Intervals near their maximum and long outputs: the windows of a step crowd each other out.
  bool long_windows = false;
};

World MakeWorld(Random& random);

// A request without a sink. Most are valid; a few can never fit (see FitsWorld).
std::unique_ptr<engine::Request> MakeRequest(const World& world, absl::Time now, Random& random);

// Whether the engine must take such a request when there is room in its queue.
bool FitsWorld(const World& world, const engine::Request& request);

}  // namespace resa::sim

#endif  // RESA_TESTS_SIM_WORLD_H_
