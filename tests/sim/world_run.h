#ifndef RESA_TESTS_SIM_WORLD_RUN_H_
#define RESA_TESTS_SIM_WORLD_RUN_H_

// One world from its first step to its end: plays the clients, turns the engine, has everything
// checked.

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "engine/clock.h"
#include "engine/engine.h"
#include "tests/sim/checker.h"
#include "tests/sim/fake_executor.h"
#include "tests/sim/paged_memory.h"
#include "tests/sim/random.h"
#include "tests/sim/saboteur.h"
#include "tests/sim/stage.h"
#include "tests/sim/witness.h"
#include "tests/sim/world.h"

namespace resa::sim {

class WorldRun {
 public:
  WorldRun(uint64_t seed, std::optional<Bug> bug);

  // One step. False when the world has come to its end, or a rule is broken.
  bool Step();

  const Stage& stage() const { return stage_; }
  int64_t bugs_planted() const { return saboteur_.planted(); }

 private:
  void ActAsClients();
  void Submit();
  void ExpectSubmit(const absl::Status& got, const engine::Request& request);
  void Enter(std::shared_ptr<Witness> witness);
  void TurnEngine();
  bool End();
  bool EndAtOnce();
  void ForgetEnded();

  Random random_;
  const World world_;
  Stage stage_;
  engine::ManualClock clock_;
  PagedMemory memory_;
  FakeExecutor executor_;
  Saboteur saboteur_;
  std::unique_ptr<engine::Engine> engine_;
  Checker checker_;
  std::vector<std::shared_ptr<Witness>> live_;  // Accepted and not ended.
  bool draining_ = false;
};

}  // namespace resa::sim

#endif  // RESA_TESTS_SIM_WORLD_RUN_H_
