#include "engine/scheduler.h"

#include <algorithm>
#include <numeric>

#include "absl/strings/str_format.h"
#include "kernels/check.h"

namespace resa::engine {

absl::Status ValidateLimits(const SchedulerLimits& limits) {
  if (limits.max_sequences < 1) {
    return absl::InvalidArgumentError(
        absl::StrFormat("max_sequences: %d, must be at least 1", limits.max_sequences));
  }
  if (limits.min_chunk_tokens < 1) {
    return absl::InvalidArgumentError(
        absl::StrFormat("min_chunk_tokens: %d, must be at least 1", limits.min_chunk_tokens));
  }
  if (limits.sparse_from < 0 || limits.sparse_step_tokens < 0) {
    return absl::InvalidArgumentError(
        absl::StrFormat("sparse_from: %d, sparse_step_tokens: %d, must not be negative",
                        limits.sparse_from, limits.sparse_step_tokens));
  }
  const int64_t least =
      int64_t{limits.max_sequences} + kMaxRectifyInterval + limits.min_chunk_tokens;
  if (limits.max_step_tokens < least) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "max_step_tokens: %d, must be at least %d: one row for each of %d sequences, the largest "
        "window of %d and the smallest prefill chunk of %d",
        limits.max_step_tokens, least, limits.max_sequences, kMaxRectifyInterval,
        limits.min_chunk_tokens));
  }
  return absl::OkStatus();
}

Scheduler::Scheduler(const SchedulerLimits& limits) : limits_(limits) {
  const absl::Status valid = ValidateLimits(limits);
  RESA_CHECK(valid.ok()) << valid.message();
}

void Scheduler::Plan(absl::Span<const Sequence* const> sequences, const KvPool& pool,
                     StepPlan* plan) {
  plan->Clear();
  sequences_ = sequences;
  pool_ = &pool;
  free_pages_ = pool.free_pages();
  rows_left_ = limits_.max_step_tokens;
  running_ = 0;
  if (releases_ || released_.size() != static_cast<size_t>(pool.num_pages())) {
    released_.assign(pool.num_pages(), 0);
    releases_ = false;
  }
  claims_.assign(sequences.size(), Claim{});
  rank_.resize(sequences.size());
  std::iota(rank_.begin(), rank_.end(), 0);
  const auto ranks_before = [&](int32_t a, int32_t b) {
    return RanksBefore(*sequences[a], *sequences[b]);
  };
  if (!std::is_sorted(rank_.begin(), rank_.end(), ranks_before)) {
    std::sort(rank_.begin(), rank_.end(), ranks_before);
  }

  ClaimDecodeRows(plan);
  ClaimPrefillRows();
  GrantPages(plan);
  // A step that took pages away does not hand them to newcomers.
  if (plan->preempt.empty()) Admit(plan);
  std::erase_if(plan->stalled, [&](int32_t index) { return claims_[index].preempted; });
}

void Scheduler::ClaimDecodeRows(StepPlan* plan) {
  due_.clear();
  bool prompts_wait = false;
  int64_t sparse_tokens = 0;  // Beyond sparse_from.
  for (int32_t index : rank_) {
    const Sequence& sequence = *sequences_[index];
    if (!sequence.running) {
      prompts_wait = true;
      continue;
    }
    ++running_;
    if (sequence.prefilling()) {
      prompts_wait = true;
      continue;
    }
    Claim& claim = claims_[index];
    claim.work = NextWork(sequence, limits_.selector, limits_.sparse_from);
    if (claim.work.sparse.has_value()) sparse_tokens += claim.work.end - limits_.sparse_from;
    --rows_left_;
    if (claim.work.kind == SegmentKind::kRectification) {
      due_.push_back(index);
    } else {
      claim.granted_rows = true;
    }
  }
  RESA_CHECK_GE(rows_left_, 0);
  if (sparse_tokens < limits_.sparse_step_tokens) {
    for (Claim& claim : claims_) claim.work.sparse.reset();
  }

  std::sort(due_.begin(), due_.end(), [&](int32_t a, int32_t b) {
    const Sequence& first = *sequences_[a];
    const Sequence& second = *sequences_[b];
    if (first.last_step != second.last_step) return first.last_step < second.last_step;
    return first.order < second.order;
  });
  const int32_t reserved = prompts_wait ? limits_.min_chunk_tokens : 0;
  for (int32_t index : due_) {
    Claim& claim = claims_[index];
    const int32_t more_rows = claim.work.end - claim.work.begin - 1;
    if (plan->stalled.empty() && more_rows <= rows_left_ - reserved) {
      claim.granted_rows = true;
      rows_left_ -= more_rows;
    } else {
      plan->stalled.push_back(index);
    }
  }
  rows_left_ += static_cast<int32_t>(plan->stalled.size());
}

void Scheduler::ClaimPrefillRows() {
  for (int32_t index : rank_) {
    const Sequence& sequence = *sequences_[index];
    if (!sequence.running || !sequence.prefilling() || rows_left_ == 0) continue;
    Claim& claim = claims_[index];
    claim.work = NextWork(sequence, limits_.selector, limits_.sparse_from);
    claim.granted_rows = true;
    const int32_t rows = std::min(claim.work.end - claim.work.begin, rows_left_);
    claim.work.end = claim.work.begin + rows;
    claim.work.emits = claim.work.end == sequence.size();
    rows_left_ -= rows;
  }
}

void Scheduler::GrantPages(StepPlan* plan) {
  for (int32_t index : rank_) {
    const Claim& claim = claims_[index];
    if (!claim.granted_rows || claim.preempted) continue;
    if (!MakeRoom(index, claim.work.begin, claim.work.end, plan)) continue;
    TakePages(index);
    plan->segments.push_back(Segment{index, claim.work});
  }
}

void Scheduler::Admit(StepPlan* plan) {
  // Pages that the running sequences need for all their tokens, beyond what this step grants.
  int32_t promised = 0;
  for (int32_t index : rank_) {
    const Sequence& sequence = *sequences_[index];
    if (!sequence.running) continue;
    const int32_t held =
        std::max(static_cast<int32_t>(sequence.pages.size()), claims_[index].granted_pages);
    promised += std::max(0, PagesFor(sequence.size() + 1) - held);
  }
  for (int32_t index : rank_) {
    const Sequence& sequence = *sequences_[index];
    if (sequence.running || claims_[index].preempted) continue;
    if (running_ >= limits_.max_sequences || rows_left_ == 0) return;
    // With nothing running, only outputs that wait with their prompt's pages can be in the way.
    if (running_ == 0 && !MakeRoom(index, sequence.kv_len, sequence.size() + 1, plan)) return;
    const int32_t need = PagesToWrite(sequence, sequence.kv_len, sequence.size() + 1);
    if (need > free_pages_ - promised) return;

    Claim& claim = claims_[index];
    claim.work = NextWork(sequence, limits_.selector, limits_.sparse_from);
    RESA_CHECK(claim.work.kind == SegmentKind::kPrefill);
    const int32_t rows = std::min(claim.work.end - claim.work.begin, rows_left_);
    claim.work.end = claim.work.begin + rows;
    claim.work.emits = claim.work.end == sequence.size();
    rows_left_ -= rows;
    const int32_t free_before = free_pages_;
    TakePages(index);
    promised += need - (free_before - free_pages_);
    ++running_;
    plan->admit.push_back(index);
    plan->segments.push_back(Segment{index, claim.work});
    // Whoever made room goes before the rest, and cannot come back in the step that took its pages.
    if (!plan->preempt.empty()) return;
  }
}

// Preempts from the lowest rank up until positions [begin, end) can be written. False when that
// took the sequence's own pages: everything ranked lower has none left to give. What is needed
// shrinks on the way, since a page whose other owners are gone needs no copy.
bool Scheduler::MakeRoom(int32_t for_sequence, int32_t begin, int32_t end, StepPlan* plan) {
  const Sequence& sequence = *sequences_[for_sequence];
  auto victim = rank_.rbegin();
  while (PagesToWrite(sequence, begin, end) > free_pages_) {
    if (*victim == for_sequence) {
      if (sequence.running) Preempt(for_sequence, plan);
      return false;
    }
    if (!claims_[*victim].preempted && !sequences_[*victim]->pages.empty()) Preempt(*victim, plan);
    ++victim;
  }
  return true;
}

void Scheduler::Preempt(int32_t index, StepPlan* plan) {
  Claim& claim = claims_[index];
  RESA_CHECK(!claim.preempted && claim.granted_pages == 0);
  claim.preempted = true;
  for (int32_t page : sequences_[index]->pages) {
    if (Owners(page) == 1) ++free_pages_;
    TakeOwner(page);
  }
  plan->preempt.push_back(index);
}

int32_t Scheduler::Owners(int32_t page) const {
  return pool_->owners(PageId{page}) - released_[page];
}

void Scheduler::TakeOwner(int32_t page) {
  ++released_[page];
  releases_ = true;
}

// Pages that writing token positions [begin, end) takes from the pool: new ones, and copies of
// those that have a second owner.
int32_t Scheduler::PagesToWrite(const Sequence& sequence, int32_t begin, int32_t end) const {
  const int32_t held = static_cast<int32_t>(sequence.pages.size());
  int32_t pages = std::max(0, PagesFor(end) - held);
  const int32_t last = std::min(held, PagesFor(end));
  for (int32_t i = begin / kernels::kPageTokens; i < last; ++i) {
    if (Owners(sequence.pages[i]) > 1) ++pages;
  }
  return pages;
}

void Scheduler::TakePages(int32_t index) {
  const Sequence& sequence = *sequences_[index];
  Claim& claim = claims_[index];
  const int32_t held = static_cast<int32_t>(sequence.pages.size());
  free_pages_ -= PagesToWrite(sequence, claim.work.begin, claim.work.end);
  RESA_CHECK_GE(free_pages_, 0);
  const int32_t last = std::min(held, PagesFor(claim.work.end));
  for (int32_t i = claim.work.begin / kernels::kPageTokens; i < last; ++i) {
    if (Owners(sequence.pages[i]) > 1) TakeOwner(sequence.pages[i]);
  }
  claim.granted_pages = std::max(held, PagesFor(claim.work.end));
}

}  // namespace resa::engine
