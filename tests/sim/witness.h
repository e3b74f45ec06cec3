#ifndef RESA_TESTS_SIM_WITNESS_H_
#define RESA_TESTS_SIM_WITNESS_H_

// The client of one request. It knows what must come (SoloRun) and why the request may end, and
// checks everything it is told the moment it is told:
//   - OnAccepted first, once; after the end nothing;
//   - each output's tokens in order, none missing, none twice, each the one that the request alone
//     would have got;
//   - each output finishes right after the token that ends it, with the right reason and usage;
//   - the whole request ends once, and an error only for a cause that is really there.

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/engine.h"
#include "engine/request.h"
#include "tests/sim/solo_run.h"
#include "tests/sim/stage.h"

namespace resa::sim {

class Witness final : public engine::OutputSink {
 public:
  // One of the n outputs.
  struct Output {
    Output(const engine::Request& request, int32_t index, const engine::EngineOptions& options)
        : solo(request, index, options) {}

    SoloRun solo;
    bool echoed = false;
    bool must_finish = false;  // The token that ends it has come.
    bool finished = false;
    SoloRun::Token last;

    // What the checker remembers of its sequence from step to step.
    int64_t last_ran = 0;  // Stage::step.
    int32_t preemptions = 0;
    int32_t pages = 0;
    int64_t steps_on_top = 0;
  };

  // `refuse_after`: OnDelta returns false after so many deltas; negative: never. `stage` and
  // `options` must outlive the witness.
  Witness(const engine::Request& request, const engine::EngineOptions& options,
          int32_t refuse_after, Stage* stage);

  void OnAccepted(int32_t prompt_tokens, int32_t cached_tokens) override;
  bool OnDelta(const engine::Delta& delta) override;
  void OnFinished(engine::Finished finished) override;
  void OnError(const absl::Status& status) override;

  // To be called after every step: what was due in it must have happened.
  void CheckAfterStep(int32_t max_sequences);

  const engine::Request& request() const { return request_; }
  Output& output(int32_t index) { return outputs_[index]; }
  bool ended() const { return ended_; }
  int32_t outputs_left() const { return ended_ ? 0 : outputs_left_; }
  bool has_begun() const { return begun_; }  // Some output was scheduled.

  // What the driver and the checker tell.
  engine::RequestId id;
  void Cancelled() { cancel_step_ = stage_->step; }
  void SteppedIn() {
    ran_step_ = stage_->step;
    begun_ = true;
  }
  // The bound on its life: see WorldRun::Enter.
  int64_t arrival_step = 0;
  int64_t outputs_ahead = 0;
  int64_t steps_ahead = 0;

 private:
  bool IsAliveFor(const char* event);
  void CheckEcho(const engine::Delta& delta, Output* output);
  void CheckToken(const engine::Delta& delta, Output* output);
  void CheckUsage(const engine::Finished& finished, const Output& output);
  bool HasCauseFor(const absl::Status& status);
  bool SomeOutputTurnsNonFinite();

  const engine::Request request_;  // Without its sink.
  const int32_t refuse_after_;
  Stage* const stage_;

  std::vector<Output> outputs_;
  int32_t outputs_left_;
  int32_t deltas_ = 0;
  bool accepted_ = false;
  bool refused_ = false;
  bool begun_ = false;
  bool ended_ = false;
  int64_t cancel_step_ = -1;
  int64_t ran_step_ = -1;
};

}  // namespace resa::sim

#endif  // RESA_TESTS_SIM_WITNESS_H_
