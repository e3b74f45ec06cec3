#ifndef RESA_ENGINE_METRICS_H_
#define RESA_ENGINE_METRICS_H_

// What the engine tells about itself while it runs. The server's metrics_exporter turns it into
// Prometheus series; the simulation counts; tests may ignore it.

#include <cstdint>

#include "absl/time/time.h"
#include "engine/request.h"
#include "engine/step_plan.h"

namespace resa::engine {

// One finished step.
struct StepReport {
  absl::Duration duration;
  int32_t segments = 0;
  // Rows of the step by kind: prefill, decode (sparse and dense), rectification.
  int32_t prefill_rows = 0;
  int32_t sparse_rows = 0;
  int32_t dense_decode_rows = 0;
  int32_t rectification_rows = 0;
  int32_t rectifications = 0;
  int32_t prefill_sequences = 0;
  int32_t stalled = 0;  // Due windows that found no room.
  int32_t preemptions = 0;
  int32_t tokens_emitted = 0;
};

// Called on the engine thread. Must not block.
class EngineObserver {
 public:
  virtual ~EngineObserver() = default;
  virtual void OnStep(const StepReport&) {}
  // A window was rectified `delay_steps` steps after it became due (0: at once).
  virtual void OnRectification(int32_t /*rows*/, int32_t /*delay_steps*/) {}
  // A sparse decode row attended to `kept` of `total` blocks.
  virtual void OnSparseRow(int32_t /*kept*/, int32_t /*total*/) {}
  virtual void OnPromptTokens(int32_t /*count*/) {}  // When a request is first scheduled.
  virtual void OnFirstToken(absl::Duration /*since_arrival*/) {}
  virtual void OnNextToken(absl::Duration /*since_last*/) {}
  virtual void OnFinished(const Finished&) {}  // Once per output that ends by itself.
  // Once per request, in one way or the other: its last output, of which OnFinished has told, has
  // ended; or it was ended with an error before that.
  virtual void OnRequestFinished(const Finished& /*last*/) {}
  virtual void OnError(const absl::Status&) {}
};

// A snapshot for GetLoad and gauges.
struct EngineLoad {
  int32_t running = 0;  // Sequences that take part in steps.
  // Accepted, not running yet, or preempted. A request counts once until its prompt has been run,
  // then each of its outputs.
  int32_t waiting = 0;
  int64_t pages_total = 0;
  int64_t pages_used = 0;  // Owned by sequences, shared ones counted once.
  int64_t steps = 0;       // That ended since start.
  int64_t tokens_generated = 0;
  int64_t preemptions = 0;
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_METRICS_H_
