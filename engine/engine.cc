#include "engine/engine.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/output.h"
#include "engine/status_macros.h"
#include "kernels/check.h"

namespace resa::engine {
namespace {

constexpr absl::Duration kIdleWait = absl::Seconds(1);

EngineObserver* NullObserver() {
  static EngineObserver* const observer = new EngineObserver;
  return observer;
}

// Takes part in steps, or stands in the way of those that do.
bool IsActive(const Sequence& sequence) { return sequence.running || !sequence.pages.empty(); }

}  // namespace

Engine::Engine(const EngineOptions& options, const Tokenizer* tokenizer, Executor* executor,
               Clock* clock, EngineObserver* observer)
    : options_(options),
      tokenizer_(tokenizer),
      executor_(executor),
      clock_(clock),
      observer_(observer != nullptr ? observer : NullObserver()),
      inbox_(options.max_waiting),
      pool_(options.num_pages),
      scheduler_(options.scheduler) {
  RESA_CHECK_LE(options.limits.pool_tokens, int64_t{options.num_pages} * kernels::kPageTokens);
  PublishLoad();
}

Engine::~Engine() {
  StartDraining();
  AbortAll();
  ReadMail();
  Deliver();
  Retire();
}

// ---- any thread ----

absl::StatusOr<RequestId> Engine::Submit(std::unique_ptr<Request> request) {
  RESA_CHECK(request->sink != nullptr);
  absl::Status status = ValidateRequest(*request, options_.limits, options_.eos_ids);
  if (status.ok() && tokenizer_ == nullptr && !request->stop.strings.empty()) {
    status = absl::InvalidArgumentError("stop.strings: this engine has no tokenizer");
  }
  if (!status.ok()) return status;
  const RequestId id{next_id_.fetch_add(1, std::memory_order_relaxed)};
  request->id = id;
  request->arrival = clock_->Now();
  RESA_RETURN_IF_ERROR(inbox_.Push(std::move(request)));
  return id;
}

absl::Status Engine::CheckRoom() const { return inbox_.CheckRoom(); }

void Engine::Cancel(RequestId id) { inbox_.PushCancel(id); }

EngineLoad Engine::Load() const {
  absl::MutexLock lock(&load_mutex_);
  EngineLoad load = load_;
  load.waiting += inbox_.unread();
  return load;
}

void Engine::StartDraining() { inbox_.Close(); }

bool Engine::Draining() const { return inbox_.closed(); }

void Engine::AbortAll() { inbox_.PushAbortAll(); }

void Engine::Stop() {
  stop_.store(true, std::memory_order_relaxed);
  inbox_.Wake();
}

// ---- the engine thread ----

void Engine::Run() {
  while (!stop_.load(std::memory_order_relaxed)) {
    if (!Step()) {
      CheckInvariants();
      inbox_.Wait(kIdleWait);
    }
  }
}

bool Engine::Step() {
  ReadMail();
  ExpireDeadlines();
  Retire();
  if (sequences_.empty()) {
    Deliver();
    plan_.Clear();
    PublishLoad();
    return false;
  }
  const absl::Time start = clock_->Now();
  ++step_count_;
  MakePlan();
  ApplyPlan();
  PublishLoad();  // Whatever the step may take, or should it never end.
  Execute();
  PostProcess(start);
  Retire();
  if (sequences_.empty()) Deliver();  // There is no next step to wait for.
  ++totals_.steps;
  PublishLoad();
  return true;
}

void Engine::Flush() {
  Deliver();
  Retire();
  PublishLoad();
}

void Engine::ReadMail() {
  inbox_.Take(&mail_);
  read_since_published_ += static_cast<int32_t>(mail_.requests.size());
  for (std::unique_ptr<Request>& request : mail_.requests) Accept(std::move(request));
  for (RequestId id : mail_.cancels) {
    EndRequest(id, absl::CancelledError("the request was cancelled"));
  }
  if (!mail_.abort_all) return;
  for (const auto& sequence : sequences_) {
    EndRequest(sequence->request->id, absl::UnavailableError("the server is shutting down"));
  }
}

void Engine::Accept(std::unique_ptr<Request> request) {
  const RequestId id = request->id;
  LiveRequest& live = live_[id];
  live.request = std::move(request);
  const Request& accepted = *live.request;
  next_deadline_ = std::min(next_deadline_, accepted.deadline);
  accepted.sink->OnAccepted(static_cast<int32_t>(accepted.prompt.size()), /*cached_tokens=*/0);
  auto first = std::make_unique<Sequence>(accepted, 0, next_order_, options_.eos_ids);
  next_order_ += static_cast<uint64_t>(accepted.n);
  live.siblings_to_come = accepted.n - 1;
  live.outputs.push_back(first.get());
  Begin(first.get());
  Insert(std::move(first));
}

// In order of rank.
void Engine::Insert(std::unique_ptr<Sequence> sequence) {
  const auto place =
      std::upper_bound(sequences_.begin(), sequences_.end(), sequence,
                       [](const auto& a, const auto& b) { return RanksBefore(*a, *b); });
  sequences_.insert(place, std::move(sequence));
}

void Engine::Begin(Sequence* sequence) {
  const Request& request = *sequence->request;
  sequence->max_output = MaxOutputTokens(request, options_.limits);
  sequence->last_step = step_count_;
  if (tokenizer_ != nullptr) {
    Detokenizer::Options options;
    options.stop_strings = request.stop.strings;
    options.include_stop = request.stop.include_stop;
    options.skip_special_tokens = !request.output.keep_special_tokens;
    sequence->detokenizer = std::make_unique<Detokenizer>(tokenizer_, std::move(options));
  }
  if (!request.output.echo) return;
  Delta echo;
  echo.index = sequence->index;
  echo.is_prompt = true;
  echo.token_ids = request.prompt;
  if (tokenizer_ != nullptr) {
    echo.text = tokenizer_->Decode(request.prompt, !request.output.keep_special_tokens);
  }
  if (!request.sink->OnDelta(echo)) EndRequest(request.id, SlowReaderError());
}

void Engine::ExpireDeadlines() {
  const absl::Time now = clock_->Now();
  if (now < next_deadline_) return;
  next_deadline_ = absl::InfiniteFuture();
  for (const auto& sequence : sequences_) {
    if (sequence->done) continue;
    if (sequence->request->deadline > now) {
      next_deadline_ = std::min(next_deadline_, sequence->request->deadline);
      continue;
    }
    EndRequest(sequence->request->id,
               absl::DeadlineExceededError(sequence->first_scheduled == absl::InfiniteFuture()
                                               ? "the deadline passed while the request was queued"
                                               : "the deadline passed while tokens were made"));
  }
}

void Engine::MakePlan() {
  view_.clear();
  view_index_.clear();
  int32_t active_left = active_;
  int32_t others_left = options_.scheduler.max_sequences;
  for (size_t i = 0; i < sequences_.size() && active_left + others_left > 0; ++i) {
    const Sequence& sequence = *sequences_[i];
    if (IsActive(sequence)) {
      --active_left;
    } else if (others_left == 0) {
      continue;
    } else {
      --others_left;
    }
    view_.push_back(&sequence);
    view_index_.push_back(static_cast<int32_t>(i));
  }
  scheduler_.Plan(view_, pool_, &plan_);
  RESA_CHECK(!plan_.empty()) << "nothing to do for " << sequences_.size() << " sequences";
  for (std::vector<int32_t>* list : {&plan_.preempt, &plan_.admit, &plan_.stalled}) {
    for (int32_t& index : *list) index = view_index_[index];
  }
  for (Segment& segment : plan_.segments) segment.sequence = view_index_[segment.sequence];
}

void Engine::ApplyPlan() {
  for (int32_t index : plan_.preempt) {
    Sequence* sequence = sequences_[index].get();
    ReleasePages(sequence);
    if (sequence->running) {
      ++sequence->preemptions;
      ++totals_.preemptions;
      --totals_.running;
    }
    ForgetPages(sequence);
    --active_;
  }
  const absl::Time now = clock_->Now();
  for (int32_t index : plan_.admit) {
    Sequence* sequence = sequences_[index].get();
    if (!IsActive(*sequence)) ++active_;
    sequence->running = true;
    ++totals_.running;
    if (sequence->first_scheduled != absl::InfiniteFuture()) continue;
    sequence->first_scheduled = now;
    LiveRequest& live = live_.at(sequence->request->id);
    if (live.queued) observer_->OnPromptTokens(sequence->prompt_len);
    LeaveQueue(&live);
  }
  copies_.clear();
  segments_.clear();
  for (const Segment& segment : plan_.segments) {
    Sequence* sequence = sequences_[segment.sequence].get();
    const Work& work = segment.work;
    GivePages(sequence, work);
    SegmentInput input;
    input.tokens = absl::MakeConstSpan(sequence->tokens).subspan(work.begin, segment.rows());
    input.position = work.begin;
    input.pages = sequence->pages;
    input.pages_id = sequence->pages.id();
    input.sparse = work.sparse;
    if (work.emits) input.sample = sequence->sampler.Next();
    segments_.push_back(input);
  }
}

// Pages for the positions the segment writes; a shared one is replaced by a copy.
void Engine::GivePages(Sequence* sequence, const Work& work) {
  const int32_t pages = PagesFor(work.end);
  const int32_t held = static_cast<int32_t>(sequence->pages.size());
  for (int32_t i = work.begin / kernels::kPageTokens; i < std::min(held, pages); ++i) {
    const PageId shared{sequence->pages[i]};
    if (!pool_.shared(shared)) continue;
    const std::optional<PageId> copy = pool_.Allocate();
    RESA_CHECK(copy.has_value()) << "the plan gave away more pages than there are";
    copies_.push_back(PageCopy{shared.value, copy->value});
    pool_.Release(shared);
    sequence->pages.Replace(i, copy->value);
  }
  while (static_cast<int32_t>(sequence->pages.size()) < pages) {
    const std::optional<PageId> page = pool_.Allocate();
    RESA_CHECK(page.has_value()) << "the plan gave away more pages than there are";
    sequence->pages.push_back(page->value);
  }
}

void Engine::Execute() {
  output_.samples.clear();
  step_status_ = absl::OkStatus();
  if (segments_.empty()) return Deliver();
  step_status_ = executor_->Execute(StepInput{copies_, segments_}, &output_, [this] { Deliver(); });
  if (!step_status_.ok()) return;
  const auto emitting = std::count_if(segments_.begin(), segments_.end(),
                                      [](const SegmentInput& s) { return s.sample.has_value(); });
  RESA_CHECK_EQ(static_cast<int64_t>(output_.samples.size()), static_cast<int64_t>(emitting));
}

// What the last step and the mail had for the clients. May end requests that are in the step being
// computed: their pages go to nobody before it is done.
void Engine::Deliver() {
  outbox_.Deliver([this](RequestId id, const absl::Status& status) { EndRequest(id, status); });
}

void Engine::PostProcess(absl::Time start) {
  StepReport report;
  size_t next_sample = 0;
  for (const Segment& segment : plan_.segments) {
    Sequence* sequence = sequences_[segment.sequence].get();
    if (!step_status_.ok()) {
      EndRequest(sequence->request->id,
                 absl::InternalError(absl::StrCat("the step failed: ", step_status_.message())));
      continue;
    }
    const kernels::SampleResult* sample =
        segment.work.emits ? &output_.samples[next_sample++] : nullptr;
    if (sequence->done) continue;  // A sibling of this step ended the request.
    CountWork(sequence, segment.work, &report);
    Advance(sequence, segment.work);
    sequence->last_step = step_count_;
    if (sequence->index == 0 && sequence->request->n > 1 &&
        sequence->kv_len >= sequence->prompt_len) {
      ForkSiblings(*sequence);
    }
    if (sample == nullptr || sequence->done) continue;
    ++report.tokens_emitted;
    TakeToken(sequence, *sample);
  }
  for (int32_t index : plan_.stalled) ++sequences_[index]->attention.stalled_steps;
  for (std::unique_ptr<Sequence>& sibling : forked_) Insert(std::move(sibling));
  forked_.clear();
  report.segments = static_cast<int32_t>(plan_.segments.size());
  report.stalled = static_cast<int32_t>(plan_.stalled.size());
  report.preemptions = static_cast<int32_t>(plan_.preempt.size());
  report.duration = clock_->Now() - start;
  totals_.tokens_generated += report.tokens_emitted;
  observer_->OnStep(report);
}

void Engine::CountWork(Sequence* sequence, const Work& work, StepReport* report) {
  const int32_t rows = work.end - work.begin;
  AttentionStats& stats = sequence->attention;
  switch (work.kind) {
    case SegmentKind::kPrefill:
      report->prefill_rows += rows;
      ++report->prefill_sequences;
      return;
    case SegmentKind::kRectification:
      report->rectification_rows += rows;
      ++report->rectifications;
      ++stats.rectifications;
      stats.rectified_rows += rows;
      observer_->OnRectification(rows, static_cast<int32_t>(step_count_ - sequence->last_step - 1));
      return;
    case SegmentKind::kDecode:
      break;
  }
  if (!work.sparse.has_value()) {
    ++report->dense_decode_rows;
    ++stats.dense_steps;
    return;
  }
  const int32_t block = options_.scheduler.selector.block_tokens;
  const int32_t total = (work.end + block - 1) / block;
  ++report->sparse_rows;
  ++stats.sparse_steps;
  stats.blocks_kept += work.sparse->keep_blocks;
  stats.blocks_total += total;
  observer_->OnSparseRow(work.sparse->keep_blocks, total);
}

// The first output has the whole prompt in the pool: the others take a share in its pages and run
// the prompt's last token themselves, which gives each its own logits. Before, they are a number.
void Engine::ForkSiblings(const Sequence& first) {
  const Request& request = *first.request;
  LiveRequest& live = live_.at(request.id);
  for (; live.siblings_to_come > 0 && !first.done; --live.siblings_to_come) {
    const int32_t index = request.n - live.siblings_to_come;
    auto sibling = std::make_unique<Sequence>(
        request, index, first.order + static_cast<uint64_t>(index), options_.eos_ids);
    sibling->kv_len = sibling->prompt_len - 1;
    sibling->rectified_len = sibling->kv_len;
    sibling->cached_tokens = sibling->kv_len;
    const int32_t pages = PagesFor(sibling->kv_len);
    sibling->pages.Assign(absl::MakeConstSpan(first.pages).first(pages));
    for (int32_t page : sibling->pages) pool_.AddOwner(PageId{page});
    if (IsActive(*sibling)) ++active_;
    live.outputs.push_back(sibling.get());
    Begin(sibling.get());
    forked_.push_back(std::move(sibling));
  }
}

void Engine::TakeToken(Sequence* sequence, const kernels::SampleResult& sample) {
  const Request& request = *sequence->request;
  if (!sample.finite) {
    EndRequest(request.id,
               absl::InternalError("the model's logits are not finite; the output was ended"));
    return;
  }
  const absl::Time now = clock_->Now();
  if (sequence->output_len() == 0) {
    sequence->first_token = now;
    observer_->OnFirstToken(now - request.arrival);
  } else {
    observer_->OnNextToken(now - sequence->last_token);
  }
  sequence->last_token = now;

  Finished finished;
  Delta& delta = outbox_.AddDelta(request.id, request.sink);
  if (GiveToken(sample, options_.eos_ids, sequence, &delta, &finished)) {
    Finish(sequence, std::move(finished));
  }
}

void Engine::Finish(Sequence* sequence, Finished finished) {
  const Request& request = *sequence->request;
  Account(*sequence, clock_->Now(), &finished);
  observer_->OnFinished(finished);

  MarkDone(sequence);
  std::vector<Sequence*>& open = live_.at(request.id).outputs;
  std::erase(open, sequence);
  if (open.empty()) observer_->OnRequestFinished(finished);
  outbox_.AddFinished(request.id, request.sink, std::move(finished));
}

void Engine::EndRequest(RequestId id, const absl::Status& status) {
  const auto found = live_.find(id);
  if (found == live_.end() || found->second.outputs.empty()) return;
  LiveRequest& live = found->second;
  for (Sequence* sequence : live.outputs) MarkDone(sequence);
  live.outputs.clear();
  observer_->OnError(status);
  outbox_.AddError(id, live.request->sink, status);
}

void Engine::LeaveQueue(LiveRequest* live) {
  if (!live->queued) return;
  live->queued = false;
  inbox_.OneLeftQueue();
}

void Engine::ReleasePages(Sequence* sequence) {
  for (int32_t page : sequence->pages) pool_.Release(PageId{page});
  sequence->pages.clear();
}

void Engine::MarkDone(Sequence* sequence) {
  if (IsActive(*sequence)) --active_;
  if (sequence->running) --totals_.running;
  ReleasePages(sequence);
  sequence->done = true;
  any_done_ = true;
}

// Forgets sequences that are done, then requests that have none left.
void Engine::Retire() {
  if (!any_done_) return;
  any_done_ = false;
  std::erase_if(sequences_, [](const auto& sequence) { return sequence->done; });
  absl::erase_if(live_, [this](auto& entry) {
    if (!entry.second.outputs.empty()) return false;
    LeaveQueue(&entry.second);
    return true;
  });
}

void Engine::PublishLoad() {
  totals_.waiting = static_cast<int32_t>(sequences_.size()) - totals_.running;
  totals_.pages_total = pool_.num_pages();
  totals_.pages_used = pool_.num_pages() - pool_.free_pages();
  absl::MutexLock lock(&load_mutex_);
  load_ = totals_;
  inbox_.MarkRead(std::exchange(read_since_published_, 0));
}

void Engine::CheckInvariants() const {
  std::vector<int32_t> owners(pool_.num_pages(), 0);
  int32_t running = 0;
  int32_t active = 0;
  for (const auto& sequence : sequences_) {
    running += sequence->running ? 1 : 0;
    active += IsActive(*sequence) ? 1 : 0;
    RESA_CHECK_LE(sequence->rectified_len, sequence->kv_len);
    RESA_CHECK_LT(sequence->kv_len, sequence->size());
    RESA_CHECK_GE(static_cast<int32_t>(sequence->pages.size()), PagesFor(sequence->kv_len));
    for (int32_t page : sequence->pages) ++owners[page];
  }
  int32_t free_pages = 0;
  for (int32_t page = 0; page < pool_.num_pages(); ++page) {
    RESA_CHECK_EQ(owners[page], pool_.owners(PageId{page}))
        << "page " << page << ": owners counted against the pool's account";
    free_pages += owners[page] == 0 ? 1 : 0;
  }
  RESA_CHECK_EQ(free_pages, pool_.free_pages());
  RESA_CHECK_EQ(running, totals_.running);
  RESA_CHECK_EQ(active, active_);
  RESA_CHECK(std::is_sorted(sequences_.begin(), sequences_.end(),
                            [](const auto& a, const auto& b) { return RanksBefore(*a, *b); }));
}

}  // namespace resa::engine
