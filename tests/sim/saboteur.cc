#include "tests/sim/saboteur.h"

#include <algorithm>

#include "kernels/check.h"

namespace resa::sim {
namespace {

constexpr int32_t kPageTokens = kernels::kPageTokens;
constexpr int32_t kRarity = 16;  // The bug strikes in one of so many chances.

bool IsWindow(const engine::Work& work) { return work.kind == engine::SegmentKind::kRectification; }
bool IsSparse(const engine::Work& work) { return work.sparse.has_value(); }

std::vector<int32_t> Pages(const engine::SegmentInput& segment) {
  return {segment.pages.begin(), segment.pages.end()};
}

}  // namespace

const char* NameOf(Bug bug) {
  switch (bug) {
    case Bug::kLeakedPage:
      return "leaked_page";
    case Bug::kLostRectification:
      return "lost_rectification";
    case Bug::kSharedPageWritten:
      return "shared_page_written";
    case Bug::kLateCopy:
      return "late_copy";
    case Bug::kLostWrite:
      return "lost_write";
    case Bug::kForeignPage:
      return "foreign_page";
    case Bug::kSwappedTokens:
      return "swapped_tokens";
  }
  RESA_CHECK(false) << "bug " << static_cast<int>(bug);
  return "";
}

std::optional<Bug> BugNamed(absl::string_view name) {
  for (Bug bug : kAllBugs) {
    if (name == NameOf(bug)) return bug;
  }
  return std::nullopt;
}

absl::Status Saboteur::DoExecute(const engine::StepInput& input, engine::StepOutput* output,
                                 absl::FunctionRef<void()> meanwhile) {
  meanwhile();
  if (!bug_.has_value() || !random_.OneIn(kRarity)) return honest_->Execute(input, output);
  switch (*bug_) {
    case Bug::kLeakedPage:
      return LeakPage(input, output);
    case Bug::kLostRectification:
      return LoseWrites(IsWindow, input, output);
    case Bug::kSharedPageWritten:
      return WriteSharedPage(input, output);
    case Bug::kLateCopy:
      return CopyLate(input, output);
    case Bug::kLostWrite:
      return LoseWrites(IsSparse, input, output);
    case Bug::kForeignPage:
      return ReadForeignPage(input, output);
    case Bug::kSwappedTokens:
      return SwapTokens(input, output);
  }
  RESA_CHECK(false);
  return absl::OkStatus();
}

absl::Status Saboteur::LeakPage(const engine::StepInput& input, engine::StepOutput* output) {
  const absl::Status status = honest_->Execute(input, output);
  // One owner too many is what a sequence leaves behind that forgets to release. The pool is the
  // engine's own; nobody else has a way to change it, and a test should not be a reason for one.
  auto& pool = const_cast<engine::KvPool&>(engine_->pool());
  pool.AddOwner(engine::PageId{input.segments[0].pages[0]});
  ++planted_;
  return status;
}

// Runs the step, so that its token is right, then takes the writes of one segment back. A window
// keeps its last row, as if only the decode row had been run.
absl::Status Saboteur::LoseWrites(bool (*hits)(const engine::Work&), const engine::StepInput& input,
                                  engine::StepOutput* output) {
  const auto& plan = engine_->last_plan().segments;
  const auto victim =
      std::find_if(plan.begin(), plan.end(),
                   [hits](const engine::Segment& segment) { return hits(segment.work); });
  if (victim == plan.end()) return honest_->Execute(input, output);
  const engine::SegmentInput& segment = input.segments[victim - plan.begin()];
  const int32_t rows = std::max(1, victim->rows() - 1);
  std::vector<Cell> before;
  for (int32_t position = segment.position; position < segment.position + rows; ++position) {
    before.push_back(memory_->at(segment.pages[position / kPageTokens], position % kPageTokens));
  }
  const absl::Status status = honest_->Execute(input, output);
  for (int32_t i = 0; i < rows; ++i) {
    const int32_t position = segment.position + i;
    memory_->Write(segment.pages[position / kPageTokens], position % kPageTokens, before[i]);
  }
  ++planted_;
  return status;
}

absl::Status Saboteur::WriteSharedPage(const engine::StepInput& input, engine::StepOutput* output) {
  if (input.copies.empty()) return honest_->Execute(input, output);
  const engine::PageCopy forgotten = input.copies[0];
  std::vector<std::vector<int32_t>> tables;
  Segments segments(input.segments.begin(), input.segments.end());
  for (engine::SegmentInput& segment : segments) {
    tables.push_back(Pages(segment));
    std::replace(tables.back().begin(), tables.back().end(), forgotten.to, forgotten.from);
    segment.pages = tables.back();
  }
  ++planted_;
  return honest_->Execute({input.copies.subspan(1), segments}, output);
}

absl::Status Saboteur::CopyLate(const engine::StepInput& input, engine::StepOutput* output) {
  const absl::Status status = honest_->Execute({{}, input.segments}, output);
  for (const engine::PageCopy& copy : input.copies) {
    memory_->Copy(copy.from, copy.to);
    ++planted_;
  }
  return status;
}

absl::Status Saboteur::ReadForeignPage(const engine::StepInput& input, engine::StepOutput* output) {
  Segments segments(input.segments.begin(), input.segments.end());
  if (segments.size() < 2) return honest_->Execute(input, output);
  engine::SegmentInput& victim = segments[random_.Next() % segments.size()];
  const engine::SegmentInput& other = segments[random_.Next() % segments.size()];
  if (victim.position < kPageTokens) return honest_->Execute(input, output);
  std::vector<int32_t> table = Pages(victim);
  if (table[0] != other.pages[0]) ++planted_;
  table[0] = other.pages[0];
  victim.pages = table;
  victim.pages_id = 0;
  return honest_->Execute({input.copies, segments}, output);
}

absl::Status Saboteur::SwapTokens(const engine::StepInput& input, engine::StepOutput* output) {
  const absl::Status status = honest_->Execute(input, output);
  if (output->samples.size() >= 2) {
    std::swap(output->samples[0], output->samples[1]);
    ++planted_;
  }
  return status;
}

}  // namespace resa::sim
