#ifndef RESA_ENGINE_ENGINE_H_
#define RESA_ENGINE_ENGINE_H_

// The loop: drain the inbox, schedule, execute, hand out tokens. One thread calls Step() or Run()
// and owns scheduler, pool and sequences without locks; every other thread may call Submit, Cancel,
// Load and the drain methods.

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "engine/clock.h"
#include "engine/executor.h"
#include "engine/inbox.h"
#include "engine/kv_pool.h"
#include "engine/metrics.h"
#include "engine/outbox.h"
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
  // Whether Submit has room at this moment, by its errors: to be asked before a request is made.
  absl::Status CheckRoom() const;
  // Ends the request with CANCELLED within one step. Unknown or finished ids are ignored.
  void Cancel(RequestId id);
  // The clock that deadlines are told by.
  absl::Time Now() const { return clock_->Now(); }
  // As of the last change between steps, and what has been submitted since.
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
  // Hands out what would go to the clients while the next step is computed: for those who look
  // after each turn.
  void Flush();
  // Turns until Stop(); sleeps while there is nothing to do.
  void Run();
  // CHECKs the invariants of pool and sequences (free + owned pages, reference counts,
  // rectified_len <= kv_len <= tokens). Cost: linear in pages; run when idle and by tests after
  // every step.
  void CheckInvariants() const;

  // For the simulation's checker and for tests; engine thread only.
  const KvPool& pool() const { return pool_; }
  // Its indices are into the sequences as they were before the step's finished ones were forgotten.
  const StepPlan& last_plan() const { return plan_; }
  absl::Span<const std::unique_ptr<Sequence>> sequences() const { return sequences_; }

 private:
  // An accepted request until its last output has ended.
  struct LiveRequest {
    std::unique_ptr<Request> request;
    std::vector<Sequence*> outputs;  // Those that have not ended.
    int32_t siblings_to_come = 0;    // Outputs that begin when the first has run the prompt.
    bool queued = true;              // Counts as waiting in the inbox.
  };

  // A step, in order.
  void ReadMail();
  void ExpireDeadlines();
  void MakePlan();
  void ApplyPlan();
  void GivePages(Sequence* sequence, const Work& work);
  void Execute();
  void Deliver();
  void PostProcess(absl::Time start);
  void Retire();
  void PublishLoad();

  void Accept(std::unique_ptr<Request> request);
  void Insert(std::unique_ptr<Sequence> sequence);
  void Begin(Sequence* sequence);
  void ForkSiblings(const Sequence& first);
  void CountWork(Sequence* sequence, const Work& work, StepReport* report);
  void TakeToken(Sequence* sequence, const kernels::SampleResult& sample);
  void Finish(Sequence* sequence, Finished finished);
  void EndRequest(RequestId id, const absl::Status& status);
  void LeaveQueue(LiveRequest* live);
  void ReleasePages(Sequence* sequence);
  void MarkDone(Sequence* sequence);

  // Constant after construction.
  const EngineOptions options_;
  const Tokenizer* const tokenizer_;
  Executor* const executor_;
  Clock* const clock_;
  EngineObserver* const observer_;  // Never null.

  Inbox inbox_;
  std::atomic<uint64_t> next_id_{1};
  std::atomic<bool> stop_{false};

  // Engine thread only.
  Mail mail_;
  KvPool pool_;
  Scheduler scheduler_;
  absl::flat_hash_map<RequestId, LiveRequest> live_;
  std::vector<std::unique_ptr<Sequence>> sequences_;  // By rank.
  std::vector<std::unique_ptr<Sequence>> forked_;  // In this step; they join sequences_ behind it.
  // A step looks at what runs or owns pages, and at as many others as could be admitted; the rest
  // of a long queue costs it nothing.
  std::vector<const Sequence*> view_;                  // What the scheduler is shown, by rank.
  std::vector<int32_t> view_index_;                    // Where it stands in sequences_.
  int32_t active_ = 0;                                 // Sequences that run or own pages.
  bool any_done_ = false;                              // Something is to be retired.
  absl::Time next_deadline_ = absl::InfiniteFuture();  // No request's is earlier.
  StepPlan plan_;
  std::vector<PageCopy> copies_;
  std::vector<SegmentInput> segments_;
  StepOutput output_;
  Outbox outbox_;
  absl::Status step_status_;
  int64_t step_count_ = 0;
  uint64_t next_order_ = 0;
  EngineLoad totals_;                 // What PublishLoad copies to load_.
  int32_t read_since_published_ = 0;  // Requests.

  mutable absl::Mutex load_mutex_;
  EngineLoad load_ ABSL_GUARDED_BY(load_mutex_);
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_ENGINE_H_
