#ifndef RESA_ENGINE_ENGINE_H_
#define RESA_ENGINE_ENGINE_H_

// The loop: drain the inbox, schedule, execute, hand out tokens. One thread calls Step() or Run()
// and owns scheduler, pool and sequences without locks; every other thread may call Submit, Cancel,
// Load and the drain methods.

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "engine/clock.h"
#include "engine/executor.h"
#include "engine/inbox.h"
#include "engine/kv_pool.h"
#include "engine/metrics.h"
#include "engine/request.h"
#include "engine/scheduler.h"
#include "engine/sequence.h"
#include "engine/tokenizer.h"

namespace resa::engine {

struct EngineOptions {
  int32_t num_pages = 0;
  ModelLimits limits;
  std::vector<int32_t> eos_ids;
  SchedulerLimits scheduler;
  int32_t max_waiting = 256;  // Requests that have been accepted and do not run yet, > 0.
};

class Engine {
 public:
  // Everything passed must outlive the engine. `observer` may be null. A null tokenizer means that
  // no text is made: deltas carry token ids only, and stop strings are refused.
  Engine(const EngineOptions& options, const Tokenizer* tokenizer, Executor* executor, Clock* clock,
         EngineObserver* observer);
  ~Engine();

  // ---- any thread ----

  // Takes the request or says why not, and then its sink is never called. INVALID_ARGUMENT: a field
  // is out of range, or the request can never fit; RESOURCE_EXHAUSTED: the queue is full;
  // UNAVAILABLE: draining. Sets request.arrival and request.id.
  absl::StatusOr<RequestId> Submit(std::unique_ptr<Request> request);
  // Ends the request with CANCELLED within one step. Unknown or finished ids are ignored.
  void Cancel(RequestId id);
  EngineLoad Load() const;
  // From now on Submit is refused; what is accepted goes on.
  void StartDraining();
  bool Draining() const;
  // Ends everything that is left with UNAVAILABLE at the next step.
  void AbortAll();
  // Makes Run() return after the current step.
  void Stop();

  // ---- the engine thread ----

  // One turn. False when there was nothing to do.
  bool Step();
  // Turns until Stop(); sleeps while there is nothing to do.
  void Run();
  // CHECKs the invariants of pool and sequences (free + owned pages, reference counts, rectified_len
  // <= kv_len <= tokens). Cost: linear in pages; run when idle and by tests after every step.
  void CheckInvariants() const;

  // For the simulation's checker and for tests; engine thread only.
  const KvPool& pool() const { return pool_; }
  const StepPlan& last_plan() const { return plan_; }
  std::vector<const Sequence*> sequences() const;

 private:
  struct LiveRequest;

  void DrainInbox();
  void Accept(std::unique_ptr<Request> request);
  void ExpireDeadlines();
  void ApplyPlan();
  void Execute();
  void PostProcess();
  void TakeToken(Sequence* sequence, const kernels::SampleResult& sample);
  void ForkSiblings(Sequence* parent);
  void Finish(Sequence* sequence, FinishReason reason);
  void EndRequest(LiveRequest* live, const absl::Status& status);
  void Retire();
  void PublishLoad();

  // Constant after construction.
  const EngineOptions options_;
  const Tokenizer* const tokenizer_;
  Executor* const executor_;
  Clock* const clock_;
  EngineObserver* const observer_;

  Inbox inbox_;

  // Engine thread only.
  KvPool pool_;
  std::vector<std::unique_ptr<LiveRequest>> live_;       // In order of arrival.
  std::vector<std::unique_ptr<Sequence>> sequences_;     // In order of arrival, then index.
  StepPlan plan_;
  std::vector<SegmentInput> segments_;
  std::vector<PageCopy> copies_;
  StepOutput output_;
  int64_t step_count_ = 0;
  uint64_t next_order_ = 0;

  mutable absl::Mutex load_mutex_;
  EngineLoad load_ ABSL_GUARDED_BY(load_mutex_);
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_ENGINE_H_
