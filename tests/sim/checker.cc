#include "tests/sim/checker.h"

#include <algorithm>

#include "kernels/check.h"

namespace resa::sim {
namespace {

using engine::AttentionMode;
using engine::PagesFor;
using engine::Segment;
using engine::SegmentKind;
using engine::Sequence;
using engine::StepPlan;

constexpr int32_t kPageTokens = kernels::kPageTokens;

Witness& WitnessOf(const Sequence& sequence) {
  return static_cast<Witness&>(*sequence.request->sink);
}

Witness::Output& OutputOf(const Sequence& sequence) {
  return WitnessOf(sequence).output(sequence.index);
}

std::string NameOf(const Sequence& sequence) {
  return absl::StrCat("request ", sequence.request->id.value, " output ", sequence.index);
}

}  // namespace

bool Outranks(const Sequence& a, const Sequence& b) {
  if (a.request->priority != b.request->priority) return a.request->priority > b.request->priority;
  return a.order < b.order;
}

int64_t StepsOnTop(const engine::Request& request, const engine::EngineOptions& options) {
  const int64_t room = std::min<int64_t>(options.limits.max_context, options.limits.pool_tokens) -
                       static_cast<int64_t>(request.prompt.size());
  const int64_t output = std::min<int64_t>(room, request.stop.max_tokens.value_or(room));
  const int64_t tokens = static_cast<int64_t>(request.prompt.size()) + output;
  const int64_t interval = request.attention.rectify_interval;
  const int64_t chunk = options.scheduler.min_chunk_tokens;
  const int64_t prefill = (tokens + chunk - 1) / chunk;
  const int64_t windows = output / interval + 1;
  return prefill + interval + output + windows * (options.scheduler.max_sequences - 1);
}

Checker::Checker(const engine::EngineOptions& options, const engine::Engine& engine,
                 PagedMemory* memory, Stage* stage)
    : options_(options), engine_(engine), memory_(memory), stage_(stage) {}

// ---- in the step ----

void Checker::Inspect(const engine::StepInput& input, bool fails) {
  inspected_ = true;
  if (fails) stage_->failed_step = stage_->step;
  const StepPlan& plan = engine_.last_plan();
  if (plan.segments.size() != input.segments.size()) {
    return stage_->Fail("lost segment: ", input.segments.size(), " of ", plan.segments.size());
  }
  stage_->counts.page_copies += static_cast<int64_t>(input.copies.size());
  CheckPreemptions();
  CheckWindows(plan);
  for (size_t i = 0; i < plan.segments.size(); ++i) {
    const Sequence& sequence = *engine_.sequences()[plan.segments[i].sequence];
    WitnessOf(sequence).SteppedIn();
    OutputOf(sequence).last_ran = stage_->step;
    CheckReads(input.segments[i], sequence);
    CheckWrites(input.segments[i], sequence);
  }
  CheckRows(plan);
  CheckAdmissions(plan);
  CheckTop(plan);
}

// Whether the pages hold what the sequence's own tokens put there, page by page.
bool Checker::Holds(absl::Span<const int32_t> table, int32_t length,
                    absl::FunctionRef<Cell(int32_t, int32_t)> expected) const {
  for (int32_t begin = 0; begin < length; begin += kPageTokens) {
    const int32_t end = std::min(begin + kPageTokens, length);
    if (memory_->Sum(table[begin / kPageTokens], end - begin) != expected(begin, end)) return false;
  }
  return true;
}

// Every position read is in the page table and holds what this output, or the one it shares its
// prompt with, wrote for exactly these tokens.
void Checker::CheckReads(const engine::SegmentInput& input, const Sequence& sequence) {
  const SoloRun& solo = OutputOf(sequence).solo;
  const int32_t end = input.position + static_cast<int32_t>(input.tokens.size());
  if (input.position > solo.kv_len() || PagesFor(end) > static_cast<int32_t>(input.pages.size())) {
    return stage_->Fail("read past the end: ", NameOf(sequence), " at ", input.position);
  }
  const auto expected = [&solo](int32_t from, int32_t to) { return solo.Cells(from, to); };
  if (!Holds(input.pages, input.position, expected)) {
    stage_->Fail("stale page read: ", NameOf(sequence), " reads [0, ", input.position, ")");
  }
}

// A page is written by its only owner, or not at all.
void Checker::CheckWrites(const engine::SegmentInput& input, const Sequence& sequence) {
  const int32_t end = input.position + static_cast<int32_t>(input.tokens.size());
  const int32_t pages = std::min(
      PagesFor(end), static_cast<int32_t>(std::min(input.pages.size(), sequence.pages.size())));
  for (int32_t i = input.position / kPageTokens; i < pages; ++i) {
    const int32_t page = input.pages[i];
    const int32_t owners = engine_.pool().owners(engine::PageId{page});
    const int32_t own = sequence.pages[i] == page ? 1 : 0;
    if (owners > own) {
      return stage_->Fail("shared page written: ", NameOf(sequence), " writes page ", page, " of ",
                          owners, " owners");
    }
    if (own == 0) {
      return stage_->Fail("free page written: ", NameOf(sequence), " writes page ", page);
    }
  }
}

// The step's budget, and prefill's reserved share of it.
void Checker::CheckRows(const StepPlan& plan) {
  const engine::SchedulerLimits& limits = options_.scheduler;
  int32_t rows = 0;
  int32_t prefill_rows = 0;
  for (size_t i = 0; i < plan.segments.size(); ++i) {
    const Segment& segment = plan.segments[i];
    rows += segment.rows();
    if (segment.work.kind == SegmentKind::kPrefill) prefill_rows += segment.rows();
    if (!engine_.sequences()[segment.sequence]->running) {
      stage_->Fail("waiting sequence stepped");
    }
    for (size_t j = 0; j < i; ++j) {
      if (plan.segments[j].sequence == segment.sequence) stage_->Fail("two segments of a sequence");
    }
  }
  if (rows > limits.max_step_tokens) {
    stage_->Fail("step budget: ", rows, " rows of ", limits.max_step_tokens);
  }
  if (!plan.preempt.empty()) return;  // Who was preempted had claimed rows.
  int32_t prefill_left = 0;
  for (const auto& sequence : engine_.sequences()) {
    if (sequence->running && sequence->prefilling()) {
      prefill_left += sequence->dense_target - sequence->kv_len;
    }
  }
  if (prefill_rows < std::min(prefill_left, limits.min_chunk_tokens)) {
    stage_->Fail("prefill starved: ", prefill_rows, " rows of ", prefill_left);
  }
}

// No window passes one that was due before it. That is what bounds a stall: those that go first are
// fewer than the sequences that run.
void Checker::CheckWindows(const StepPlan& plan) {
  for (int32_t index : plan.stalled) {
    const Sequence& stalled = *engine_.sequences()[index];
    const int64_t stalled_since = OutputOf(stalled).last_ran;
    for (const Segment& segment : plan.segments) {
      if (segment.work.kind != SegmentKind::kRectification) continue;
      const Sequence& served = *engine_.sequences()[segment.sequence];
      const int64_t served_since = OutputOf(served).last_ran;
      if (served_since < stalled_since) continue;
      if (served_since == stalled_since && served.order < stalled.order) continue;
      stage_->Fail("window overtaken: ", NameOf(stalled), " by ", NameOf(served));
    }
  }
}

// Nobody is admitted past a waiting sequence of higher rank.
void Checker::CheckAdmissions(const StepPlan& plan) {
  for (int32_t index : plan.admit) {
    const Sequence& admitted = *engine_.sequences()[index];
    for (const auto& waiting : engine_.sequences()) {
      if (waiting->running || !Outranks(*waiting, admitted)) continue;
      stage_->Fail("overtaken: ", NameOf(*waiting), " by ", NameOf(admitted));
    }
  }
}

// The first in rank of those that run moves in every step, unless it stalls.
void Checker::CheckTop(const StepPlan& plan) {
  const Sequence* top = nullptr;
  for (const auto& sequence : engine_.sequences()) {
    if (!sequence->running) {
      OutputOf(*sequence).steps_on_top = 0;
    } else if (top == nullptr || Outranks(*sequence, *top)) {
      top = sequence.get();
    }
  }
  if (top == nullptr) return;
  Witness::Output& output = OutputOf(*top);
  const bool stalled = std::any_of(plan.stalled.begin(), plan.stalled.end(), [&](int32_t index) {
    return engine_.sequences()[index].get() == top;
  });
  if (output.last_ran != stage_->step && !stalled) {
    stage_->Fail("top of rank does not move: ", NameOf(*top));
  }
  const int64_t bound = StepsOnTop(*top->request, options_);
  if (++output.steps_on_top > bound) {
    stage_->Fail("top of rank does not end: ", NameOf(*top), " after ", bound, " steps");
  }
}

// ---- after the step ----

void Checker::CheckAfterStep(const std::vector<std::shared_ptr<Witness>>& live) {
  CheckPreemptions();
  CheckPages();
  for (const auto& sequence : engine_.sequences()) {
    if (WitnessOf(*sequence).ended()) {
      stage_->Fail("outlives its request: ", NameOf(*sequence));
      return;
    }
    CheckLengths(*sequence, OutputOf(*sequence).solo);
    if (stage_->failed()) return;
    CheckContents(*sequence, OutputOf(*sequence).solo);
    CheckPace(*sequence);
  }
  // A step without a segment preempts, which at most those can suffer that run.
  steps_without_segment_ =
      inspected_ || engine_.sequences().empty() ? 0 : steps_without_segment_ + 1;
  inspected_ = false;
  if (steps_without_segment_ > options_.scheduler.max_sequences) {
    stage_->Fail("standstill: ", steps_without_segment_, " steps without a segment");
  }
  CheckCounts(live);
}

// Free and owned pages add up; the pool's reference counts are those of the page tables.
void Checker::CheckPages() {
  const engine::KvPool& pool = engine_.pool();
  owners_.assign(pool.num_pages(), 0);
  for (const auto& sequence : engine_.sequences()) {
    for (int32_t page : sequence->pages) ++owners_[page];
  }
  int32_t free_pages = 0;
  for (int32_t page = 0; page < pool.num_pages(); ++page) {
    const int32_t counted = pool.owners(engine::PageId{page});
    if (counted > owners_[page]) {
      return stage_->Fail("leaked page: page ", page, " has ", counted, " owners, in page tables ",
                          owners_[page]);
    }
    if (counted < owners_[page]) {
      return stage_->Fail("lost page: page ", page, " has ", counted, " owners, in page tables ",
                          owners_[page]);
    }
    if (counted > 0) continue;
    ++free_pages;
    if (!memory_->poisoned(page)) memory_->Poison(page);
  }
  if (free_pages != pool.free_pages()) {
    stage_->Fail("free pages: ", pool.free_pages(), ", counted ", free_pages);
  }
}

void Checker::CheckLengths(const Sequence& sequence, const SoloRun& solo) {
  const int32_t rectified_len = sequence.rectified_len;
  const int32_t kv_len = sequence.kv_len;
  if (rectified_len > kv_len || kv_len >= sequence.size() || rectified_len < 0) {
    return stage_->Fail("lengths: ", NameOf(sequence), " rectified ", rectified_len, " kv ", kv_len,
                        " tokens ", sequence.size());
  }
  if (sequence.output_len() != solo.output_len() || sequence.tokens.back() != solo.last_token()) {
    return stage_->Fail("untold token: ", NameOf(sequence), " has ", sequence.output_len(),
                        " tokens, told ", solo.output_len());
  }
  if (static_cast<int32_t>(sequence.pages.size()) != PagesFor(kv_len)) {
    return stage_->Fail("page table: ", NameOf(sequence), " holds ", sequence.pages.size(),
                        " pages for ", kv_len, " tokens");
  }
  const engine::AttentionPolicy& policy = sequence.request->attention;
  if (policy.mode == AttentionMode::kSparse) return;
  // No due position lies in the open window, which is therefore shorter than the interval.
  const int32_t interval = policy.mode == AttentionMode::kDense ? 1 : policy.rectify_interval;
  if (kv_len / interval != rectified_len / interval) {
    return stage_->Fail("late rectification: ", NameOf(sequence), " rectified ", rectified_len,
                        " kv ", kv_len, " interval ", interval);
  }
  if (kv_len == solo.kv_len() && rectified_len != solo.exact_len()) {
    stage_->Fail("rectified_len: ", NameOf(sequence), " has ", rectified_len, ", alone ",
                 solo.exact_len());
  }
}

void Checker::CheckContents(const Sequence& sequence, const SoloRun& solo) {
  const auto exact = [&solo](int32_t from, int32_t to) { return solo.ExactCells(from, to); };
  if (!Holds(sequence.pages, sequence.rectified_len, exact)) {
    return stage_->Fail("lost rectification: ", NameOf(sequence), " is not exact below ",
                        sequence.rectified_len);
  }
  const auto alone = [&solo](int32_t from, int32_t to) { return solo.Cells(from, to); };
  if (!Holds(sequence.pages, sequence.kv_len, alone)) {
    stage_->Fail("wrong K/V: ", NameOf(sequence), " below ", sequence.kv_len);
  }
}

// A decoding sequence moves in every step, unless its window stalls; and that not for longer than
// there are others that may go first.
void Checker::CheckPace(const Sequence& sequence) {
  if (!sequence.running || sequence.prefilling()) return;
  const int64_t idle = stage_->step - OutputOf(sequence).last_ran;
  if (idle == 0) return;
  const engine::AttentionPolicy& policy = sequence.request->attention;
  const bool due = policy.mode == AttentionMode::kRectified &&
                   (sequence.kv_len + 1) % policy.rectify_interval == 0 &&
                   sequence.rectified_len < sequence.kv_len;
  if (!due) stage_->Fail("skipped: ", NameOf(sequence), " did not run and is not due");
  if (idle >= options_.scheduler.max_sequences) {
    stage_->Fail("stalled too long: ", NameOf(sequence), " for ", idle, " steps");
  }
  ++stage_->counts.stalls;
  stage_->counts.longest_stall = std::max(stage_->counts.longest_stall, idle);
}

// Who loses its pages is lower in rank than everyone who keeps some, and there is someone higher
// who does: the first in rank is never preempted.
void Checker::CheckPreemptions() {
  const Sequence* highest_victim = nullptr;
  for (const auto& sequence : engine_.sequences()) {
    Witness::Output& output = OutputOf(*sequence);
    const bool preempted = sequence->preemptions != output.preemptions;
    const bool stripped = !preempted && output.pages > 0 && sequence->pages.empty();
    output.preemptions = sequence->preemptions;
    output.pages = static_cast<int32_t>(sequence->pages.size());
    if (!preempted && !stripped) continue;
    if (highest_victim == nullptr || Outranks(*sequence, *highest_victim)) {
      highest_victim = sequence.get();
    }
    ++(preempted ? stage_->counts.preemptions : stage_->counts.stripped_siblings);
    // Without an exact state to go back to, all of it is recomputed densely.
    if (sequence->request->attention.mode == AttentionMode::kSparse && sequence->output_len() > 0) {
      ++stage_->counts.sparse_preemptions;
      output.solo.MakeExact();
    }
  }
  if (highest_victim == nullptr) return;
  bool for_somebody = false;
  for (const auto& sequence : engine_.sequences()) {
    if (sequence->pages.empty()) continue;
    if (Outranks(*highest_victim, *sequence)) {
      stage_->Fail("wrong victim: ", NameOf(*highest_victim), " lost its pages before ",
                   NameOf(*sequence));
    }
    for_somebody = true;
  }
  if (!for_somebody) stage_->Fail("preempted for nobody: ", NameOf(*highest_victim));
}

// The engine has exactly the outputs that have not ended, of a prompt that has not been run the
// first alone, and its load says so.
void Checker::CheckCounts(const std::vector<std::shared_ptr<Witness>>& live) {
  int64_t outputs = 0;
  for (const auto& witness : live) outputs += witness->outputs_left();
  for (const auto& sequence : engine_.sequences()) {
    if (sequence->index == 0 && sequence->output_len() == 0) outputs -= sequence->request->n - 1;
  }
  const auto sequences = static_cast<int64_t>(engine_.sequences().size());
  if (outputs != sequences) {
    stage_->Fail("lost output: ", sequences, " sequences for ", outputs, " outputs");
  }
  int32_t running = 0;
  for (const auto& sequence : engine_.sequences()) running += sequence->running ? 1 : 0;
  if (running > options_.scheduler.max_sequences) {
    stage_->Fail("too many run: ", running);
  }
  const engine::EngineLoad load = engine_.Load();
  if (load.running != running || load.waiting != sequences - running ||
      load.pages_total != options_.num_pages ||
      load.pages_used != options_.num_pages - engine_.pool().free_pages()) {
    stage_->Fail("wrong load: ", load.running, " running, ", load.waiting, " waiting, ",
                 load.pages_used, " pages");
  }
}

}  // namespace resa::sim
