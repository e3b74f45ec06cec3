#include "tests/sim/world_run.h"

#include <algorithm>
#include <utility>

namespace resa::sim {
namespace {

// Any other chance than the clients' and the world's own.
constexpr uint64_t kSaboteurSalt = 0x5ab07e;

// Somebody comes soon when nobody is there: an idle engine is soon understood.
constexpr int32_t kIdleArrival = 4;

absl::Time Start() { return absl::FromUnixSeconds(1'000'000); }

}  // namespace

WorldRun::WorldRun(uint64_t seed, std::optional<Bug> bug)
    : random_(seed),
      world_(MakeWorld(random_)),
      clock_(Start()),
      memory_(world_.options.num_pages),
      executor_(world_.options.limits.vocab_size, &memory_, &clock_),
      saboteur_(bug, &executor_, &memory_, Mix(seed, kSaboteurSalt)),
      engine_(std::make_unique<engine::Engine>(world_.options, /*tokenizer=*/nullptr, &saboteur_,
                                               &clock_, /*observer=*/nullptr)),
      checker_(world_.options, *engine_, &memory_, &stage_) {
  executor_.set_inspector(&checker_);
  saboteur_.Watch(engine_.get());
}

bool WorldRun::Step() {
  if (stage_.step >= world_.steps) return End();
  ActAsClients();
  TurnEngine();
  return !stage_.failed();
}

void WorldRun::ActAsClients() {
  clock_.Advance(absl::Milliseconds(random_.Between(0, 10)));
  if (random_.OneIn(1000)) clock_.Advance(absl::Seconds(2));
  const int32_t arrival = live_.empty() ? std::min(world_.arrival, kIdleArrival) : world_.arrival;
  if (!draining_ && random_.OneIn(arrival)) {
    for (int32_t burst = random_.OneIn(10) ? random_.Between(2, 8) : 1; burst > 0; --burst) {
      Submit();
    }
  }
  if (random_.OneIn(world_.cancel)) {
    if (live_.empty()) {
      engine_->Cancel(engine::RequestId{random_.Next()});
    } else {
      Witness& leaving = *live_[random_.Next() % live_.size()];
      engine_->Cancel(leaving.id);
      leaving.Cancelled();
    }
  }
  if (random_.OneIn(world_.failed_step)) executor_.FailNextStep();
}

void WorldRun::Submit() {
  std::unique_ptr<engine::Request> request = MakeRequest(world_, clock_.Now(), random_);
  const bool slow = random_.OneIn(world_.slow_reader);
  const int32_t refuse_after = slow ? random_.Between(0, 30) : -1;
  if (!FitsWorld(world_, *request)) {
    // It has no schedule, so nobody can witness it; its sink must never be called.
    request->sink = std::make_shared<Witness>(engine::Request(), world_.options, -1, &stage_);
    const engine::Request copy = *request;
    return ExpectSubmit(engine_->Submit(std::move(request)).status(), copy);
  }
  auto witness = std::make_shared<Witness>(*request, world_.options, refuse_after, &stage_);
  request->sink = witness;
  const absl::StatusOr<engine::RequestId> id = engine_->Submit(std::move(request));
  ExpectSubmit(id.status(), witness->request());
  if (!id.ok()) return;
  witness->id = *id;
  Enter(std::move(witness));
}

// The answer must be the one that follows from what the clients can count.
void WorldRun::ExpectSubmit(const absl::Status& got, const engine::Request& request) {
  const auto waiting = std::count_if(live_.begin(), live_.end(),
                                     [](const auto& witness) { return !witness->has_begun(); });
  absl::StatusCode expected = absl::StatusCode::kOk;
  int64_t* count = &stage_.counts.accepted;
  if (!FitsWorld(world_, request)) {
    expected = absl::StatusCode::kInvalidArgument;
    count = &stage_.counts.too_long;
  } else if (draining_) {
    expected = absl::StatusCode::kUnavailable;
    count = &stage_.counts.refused_draining;
  } else if (waiting >= world_.options.max_waiting) {
    expected = absl::StatusCode::kResourceExhausted;
    count = &stage_.counts.queue_full;
  }
  ++*count;
  if (got.code() != expected) {
    stage_.Fail("wrong admission: ", got.ToString(), ", expected ",
                absl::StatusCodeToString(expected), " with ", waiting, " waiting");
  }
}

// A request's bound. Let S be the outputs that were there when it came, its own, and those that
// came later and outrank it. Whoever else comes later runs before this one has all its outputs
// running only if it is first in no step: nobody is admitted past a waiting higher rank, and the
// lowest rank is preempted first. So in each step the first in rank of those that run is of S. It
// moves on, and needs StepsOnTop steps, all of them again when a higher one takes its pages, which
// each of S does at most once to each; and steps without a segment, which only preempt, come at
// most max_sequences in a row. Together (1 + |S|) (1 + max_sequences) times the steps of S. The
// worst case needs a conspiracy; the rules that it follows from are checked in every step.
void WorldRun::Enter(std::shared_ptr<Witness> witness) {
  const auto steps_of = [this](const Witness& w) {
    return w.request().n * StepsOnTop(w.request(), world_.options);
  };
  witness->arrival_step = stage_.step;
  witness->outputs_ahead = witness->request().n;
  witness->steps_ahead = steps_of(*witness);
  for (const auto& other : live_) {
    witness->outputs_ahead += other->request().n;
    witness->steps_ahead += steps_of(*other);
    if (other->request().priority >= witness->request().priority) continue;
    other->outputs_ahead += witness->request().n;
    other->steps_ahead += steps_of(*witness);
  }
  live_.push_back(std::move(witness));
}

void WorldRun::TurnEngine() {
  ++stage_.step;
  ++stage_.counts.steps;
  stage_.step_start = clock_.Now();
  if (!engine_->Step()) ++stage_.counts.idle_steps;
  engine_->Flush();
  checker_.CheckAfterStep(live_);
  const int32_t max_sequences = world_.options.scheduler.max_sequences;
  for (const auto& witness : live_) witness->CheckAfterStep(max_sequences);
  ForgetEnded();
}

void WorldRun::ForgetEnded() {
  std::erase_if(live_, [](const auto& witness) { return witness->ended(); });
}

bool WorldRun::End() {
  if (world_.ending != Ending::kDrain) return EndAtOnce();
  if (!draining_) {
    draining_ = true;
    engine_->StartDraining();
    Submit();
  }
  ActAsClients();
  TurnEngine();
  if (!live_.empty()) return !stage_.failed();
  if (engine_->pool().free_pages() != engine_->pool().num_pages()) {
    stage_.Fail("pages left: ", engine_->pool().free_pages(), " free of ",
                engine_->pool().num_pages());
  }
  return false;
}

bool WorldRun::EndAtOnce() {
  stage_.abort_requested = true;
  if (world_.ending == Ending::kAbort) {
    engine_->AbortAll();
    TurnEngine();
  } else {
    engine_.reset();
    ForgetEnded();
  }
  if (!live_.empty()) stage_.Fail("abort ignored: ", live_.size(), " requests go on");
  return false;
}

}  // namespace resa::sim
