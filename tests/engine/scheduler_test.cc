#include "engine/scheduler.h"

#include <cstdint>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/sequence_set.h"

namespace resa::engine {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr int32_t kPage = kernels::kPageTokens;

// The smallest step that is allowed: 8 rows for sequences, a window of 256, a chunk of 32.
SchedulerLimits Limits() {
  SchedulerLimits limits;
  limits.max_sequences = 8;
  limits.min_chunk_tokens = 32;
  limits.max_step_tokens = 8 + 256 + 32;
  return limits;
}

AttentionPolicy WithInterval(int32_t interval) {
  AttentionPolicy policy;
  policy.rectify_interval = interval;
  return policy;
}

class SchedulerTest : public ::testing::Test {
 protected:
  const StepPlan& Plan(SequenceSet& set, const SchedulerLimits& limits = Limits()) {
    Scheduler scheduler(limits);
    scheduler.Plan(set.view(), set.pool(), &plan_);
    return plan_;
  }

  // In the middle of its output and of its last page.
  static SequenceState Decoding(int32_t priority = 0) {
    SequenceState state;
    state.prompt = 8;
    state.output = 3;
    state.kv_len = 10;
    state.priority = priority;
    return state;
  }
  // Writes the first position of a new page next.
  static SequenceState AtPageEnd(int32_t pages, int32_t priority = 0) {
    SequenceState state;
    state.prompt = 8;
    state.kv_len = pages * kPage;
    state.output = state.kv_len + 1 - state.prompt;
    state.priority = priority;
    state.policy.mode = AttentionMode::kDense;
    return state;
  }
  // Its window of `rows` rows is due.
  static SequenceState Due(int32_t rows, int64_t last_step) {
    SequenceState state;
    state.prompt = 256;
    state.output = 257;
    state.kv_len = 511;
    state.rectified_len = 512 - rows;
    state.last_step = last_step;
    state.policy = WithInterval(256);
    return state;
  }
  static SequenceState Prompt(int32_t tokens, bool running, int32_t priority = 0) {
    SequenceState state;
    state.prompt = tokens;
    state.running = running;
    state.priority = priority;
    return state;
  }

  std::vector<int32_t> Stepped() const {
    std::vector<int32_t> indices;
    for (const Segment& segment : plan_.segments) indices.push_back(segment.sequence);
    return indices;
  }
  int32_t Rows() const {
    int32_t rows = 0;
    for (const Segment& segment : plan_.segments) rows += segment.rows();
    return rows;
  }

  StepPlan plan_;
};

// ---- rows ----

TEST_F(SchedulerTest, NothingToDoIsAnEmptyPlan) {
  SequenceSet set(4);
  EXPECT_TRUE(Plan(set).empty());
}

TEST_F(SchedulerTest, EveryDecodingSequenceGetsOneRowInOrderOfRank) {
  SequenceSet set(8);
  set.Add(Decoding(/*priority=*/0));
  set.Add(Decoding(/*priority=*/5));
  set.Add(Decoding(/*priority=*/0));
  Plan(set);
  EXPECT_THAT(Stepped(), ElementsAre(1, 0, 2));
  EXPECT_EQ(Rows(), 3);
  EXPECT_TRUE(plan_.segments[0].work.emits);
}

TEST_F(SchedulerTest, PromptsTakeTheRowsThatAreLeftInOrderOfRank) {
  SequenceSet set(100);
  set.Add(Decoding());
  set.Add(Prompt(200, /*running=*/true));
  set.Add(Prompt(200, /*running=*/true, /*priority=*/1));
  Plan(set);
  EXPECT_THAT(Stepped(), ElementsAre(2, 0, 1));
  EXPECT_EQ(plan_.segments[0].rows(), 200);
  EXPECT_TRUE(plan_.segments[0].work.emits);
  EXPECT_EQ(plan_.segments[2].rows(), 296 - 1 - 200);
  EXPECT_FALSE(plan_.segments[2].work.emits);
  EXPECT_EQ(Rows(), 296);
}

TEST_F(SchedulerTest, PromptsWithoutRowsWait) {
  SequenceSet set(100);
  set.Add(Prompt(400, /*running=*/true));
  set.Add(Prompt(10, /*running=*/true));
  Plan(set);
  EXPECT_THAT(Stepped(), ElementsAre(0));
  EXPECT_EQ(Rows(), 296);
}

TEST_F(SchedulerTest, OldestWindowsFirstTheOthersStall) {
  SequenceSet set(200);
  set.Add(Due(128, /*last_step=*/7));
  set.Add(Due(128, /*last_step=*/5));
  set.Add(Due(128, /*last_step=*/6));
  set.Add(Decoding());
  Plan(set);
  // 296 rows: 4 for the sequences, 2 x 127 more for two windows.
  EXPECT_THAT(Stepped(), ElementsAre(1, 2, 3));
  EXPECT_THAT(plan_.stalled, ElementsAre(0));
  EXPECT_EQ(Rows(), 128 + 128 + 1);
}

TEST_F(SchedulerTest, EquallyOldWindowsGoByOrder) {
  SequenceSet set(200);
  for (int i = 0; i < 3; ++i) set.Add(Due(128, /*last_step=*/5));
  Plan(set);
  EXPECT_THAT(Stepped(), ElementsAre(0, 1));
  EXPECT_THAT(plan_.stalled, ElementsAre(2));
}

// Otherwise short windows could hold up a long one for ever.
TEST_F(SchedulerTest, ShortWindowDoesNotPassAStalledOne) {
  SequenceSet set(200);
  set.Add(Due(200, /*last_step=*/1));
  set.Add(Due(200, /*last_step=*/2));
  set.Add(Due(2, /*last_step=*/3));
  Plan(set);
  EXPECT_THAT(Stepped(), ElementsAre(0));
  EXPECT_THAT(plan_.stalled, ElementsAre(1, 2));
}

TEST_F(SchedulerTest, WindowsLeaveTheSmallestChunkToPrompts) {
  SequenceSet set(300);
  set.Add(Due(256, /*last_step=*/1));
  set.Add(Due(30, /*last_step=*/2));
  Plan(set);
  EXPECT_THAT(plan_.stalled, IsEmpty());
  // 296 - 2 - 255 = 39 rows are left: enough for 29 more, but not with 32 for the prompt.
  set.Add(Prompt(100, /*running=*/true));
  Plan(set);
  EXPECT_THAT(plan_.stalled, ElementsAre(1));
  EXPECT_THAT(Stepped(), ElementsAre(0, 2));
  EXPECT_EQ(plan_.segments[1].rows(), 296 - 256);
}

TEST_F(SchedulerTest, LargestWindowFitsBesideEverySequenceAndTheSmallestChunk) {
  SequenceSet set(300);
  set.Add(Due(256, /*last_step=*/9));
  for (int i = 0; i < 6; ++i) set.Add(Decoding());
  set.Add(Prompt(1000, /*running=*/true));
  Plan(set);
  EXPECT_THAT(plan_.stalled, IsEmpty());
  EXPECT_EQ(Stepped().size(), 8u);
  // The prompt has the row of its own slot besides, and the one that the window shares with its
  // sequence's.
  EXPECT_EQ(plan_.segments.back().rows(), 34);
  EXPECT_EQ(Rows(), 296);
}

TEST_F(SchedulerTest, WaitingPromptsReserveRowsToo) {
  SequenceSet set(300);
  set.Add(Due(256, /*last_step=*/1));
  set.Add(Due(30, /*last_step=*/2));
  set.Add(Prompt(100, /*running=*/false));
  Plan(set);
  EXPECT_THAT(plan_.stalled, ElementsAre(1));
  EXPECT_THAT(plan_.admit, ElementsAre(2));
}

// ---- admission ----

TEST_F(SchedulerTest, AdmitsByPriorityThenAge) {
  SequenceSet set(100);
  set.Add(Prompt(20, /*running=*/false));
  set.Add(Prompt(20, /*running=*/false, /*priority=*/1));
  set.Add(Prompt(20, /*running=*/false));
  Plan(set);
  EXPECT_THAT(plan_.admit, ElementsAre(1, 0, 2));
  EXPECT_THAT(Stepped(), ElementsAre(1, 0, 2));
}

TEST_F(SchedulerTest, AdmitsAtMostMaxSequences) {
  SequenceSet set(100);
  for (int i = 0; i < 6; ++i) set.Add(Decoding());
  for (int i = 0; i < 4; ++i) set.Add(Prompt(5, /*running=*/false));
  Plan(set);
  EXPECT_THAT(plan_.admit, ElementsAre(6, 7));
}

TEST_F(SchedulerTest, AdmitsWithAChunkWhenThePromptIsLong) {
  SequenceSet set(100);
  set.Add(Prompt(1000, /*running=*/false));
  set.Add(Prompt(5, /*running=*/false));
  Plan(set);
  EXPECT_THAT(plan_.admit, ElementsAre(0));
  EXPECT_EQ(Rows(), 296);
  EXPECT_FALSE(plan_.segments[0].work.emits);
}

TEST_F(SchedulerTest, LargeRequestIsNotOvertakenBySmallOnes) {
  SequenceSet set(10);
  set.Add(AtPageEnd(5));
  set.Add(Prompt(5 * kPage, /*running=*/false));  // 6 pages with the token after it.
  set.Add(Prompt(2, /*running=*/false));
  Plan(set);
  EXPECT_THAT(plan_.admit, IsEmpty());
  EXPECT_THAT(Stepped(), ElementsAre(0));
}

TEST_F(SchedulerTest, AdmissionLeavesTheRunningTheirNextPages) {
  // The running prompt still needs 5 pages of the 8 that are free, of which this step takes none.
  SequenceSet set(24);
  SchedulerLimits limits = Limits();
  set.Add(Prompt(296 + 60, /*running=*/true));  // 23 pages with the token after it.
  set.Add(Prompt(kPage, /*running=*/false));    // 2 pages.
  Plan(set, limits);
  EXPECT_THAT(plan_.admit, IsEmpty());
  SequenceSet larger(25);
  larger.Add(Prompt(200, /*running=*/true));  // 13 pages
  larger.Add(Prompt(kPage, /*running=*/false));
  Plan(larger, limits);
  EXPECT_THAT(plan_.admit, ElementsAre(1));
}

// ---- pages ----

TEST_F(SchedulerTest, DryPoolTakesFromTheLowestRank) {
  SequenceSet set(6);
  set.Add(AtPageEnd(2, /*priority=*/0));
  set.Add(AtPageEnd(2, /*priority=*/-1));
  set.Add(AtPageEnd(2, /*priority=*/1));
  Plan(set);
  EXPECT_THAT(plan_.preempt, ElementsAre(1));
  EXPECT_THAT(Stepped(), ElementsAre(2, 0));
}

TEST_F(SchedulerTest, AmongEqualsTheNewestIsPreempted) {
  SequenceSet set(4);
  set.Add(AtPageEnd(2));
  set.Add(AtPageEnd(2));
  Plan(set);
  EXPECT_THAT(plan_.preempt, ElementsAre(1));
  EXPECT_THAT(Stepped(), ElementsAre(0));
}

TEST_F(SchedulerTest, LowestRankGivesUpItsOwnPagesRatherThanTakeOthers) {
  SequenceSet set(3);
  set.Add(Decoding(/*priority=*/1));
  set.Add(AtPageEnd(2));
  Plan(set);
  EXPECT_THAT(plan_.preempt, ElementsAre(1));
  EXPECT_THAT(Stepped(), ElementsAre(0));
}

TEST_F(SchedulerTest, PreemptsNoMoreThanNeeded) {
  SequenceSet set(9);
  set.Add(AtPageEnd(3));
  for (int i = 0; i < 3; ++i) {
    SequenceState state = Decoding();
    state.prompt = 20;
    state.kv_len = 22;
    set.Add(state);
  }
  Plan(set);
  EXPECT_THAT(plan_.preempt, ElementsAre(3));
  EXPECT_THAT(Stepped(), ElementsAre(0, 1, 2));
}

TEST_F(SchedulerTest, StepThatPreemptsAdmitsNobody) {
  SequenceSet set(5);
  set.Add(AtPageEnd(2));
  set.Add(AtPageEnd(3));
  set.Add(Prompt(2, /*running=*/false));
  Plan(set);
  EXPECT_THAT(plan_.preempt, ElementsAre(1));
  EXPECT_THAT(plan_.admit, IsEmpty());
}

TEST_F(SchedulerTest, PreemptedSequenceDoesNotCountAsStalled) {
  SequenceSet set(2 * 32 + 1);
  set.Add(AtPageEnd(1, /*priority=*/1));
  set.Add(Due(200, /*last_step=*/1));
  set.Add(Due(200, /*last_step=*/2));
  Plan(set);
  EXPECT_THAT(plan_.preempt, ElementsAre(2));
  EXPECT_THAT(plan_.stalled, IsEmpty());
  EXPECT_THAT(Stepped(), ElementsAre(0, 1));
}

TEST_F(SchedulerTest, PreemptingOneOfTwoOwnersFreesNothing) {
  SequenceSet set(4);
  set.Add(AtPageEnd(1, /*priority=*/1));
  Sequence* first = set.Add(Prompt(3 * kPage, /*running=*/true));
  first->kv_len = first->prompt_len;
  first->tokens.push_back(1);
  for (int i = 0; i < 3; ++i) first->pages.push_back(set.pool().Allocate()->value);
  set.AddSibling(first);
  // One page for the first; the sibling's share of three frees none, so its twin must go too.
  Plan(set);
  EXPECT_THAT(plan_.preempt, ElementsAre(2, 1));
  EXPECT_THAT(Stepped(), ElementsAre(0));
}

// ---- copy on write ----

class CopyOnWriteTest : public SchedulerTest {
 protected:
  // A request of two outputs with a prompt of `prompt` tokens: the first is about to run its first
  // own token, the second waits with the prompt's pages.
  void AddFork(SequenceSet* set, int32_t prompt) {
    SequenceState state;
    state.prompt = prompt;
    state.output = 1;
    state.kv_len = prompt;
    first_ = set->Add(state);
    second_ = set->AddSibling(first_);
  }

  Sequence* first_ = nullptr;
  Sequence* second_ = nullptr;
};

TEST_F(CopyOnWriteTest, FirstWriterOfASharedPageTakesACopyTheLastOwnerDoesNot) {
  SequenceSet set(2);
  AddFork(&set, 8);
  ASSERT_EQ(set.pool().owners(PageId{first_->pages[0]}), 2);
  // One page is free: enough for the first's copy; the second then owns the original alone.
  Plan(set);
  EXPECT_THAT(plan_.preempt, IsEmpty());
  EXPECT_THAT(plan_.admit, ElementsAre(1));
  EXPECT_THAT(Stepped(), ElementsAre(0, 1));
}

TEST_F(CopyOnWriteTest, CopyThatFindsNoPageTakesTheSiblingsShareInstead) {
  SequenceSet set(1);
  AddFork(&set, 8);
  Plan(set);
  EXPECT_THAT(plan_.preempt, ElementsAre(1));
  EXPECT_THAT(Stepped(), ElementsAre(0));
}

TEST_F(CopyOnWriteTest, FullPagesAreSharedWithoutACopy) {
  // The prompt ends with its page, so the first writes a page of its own; the second runs the
  // prompt's last token again, in the shared page.
  SequenceSet set(3);
  AddFork(&set, kPage);
  Plan(set);
  EXPECT_THAT(plan_.preempt, IsEmpty());
  // One new page for the first, none for its prompt; the second needs a copy and one more.
  EXPECT_THAT(plan_.admit, IsEmpty());
  SequenceSet larger(4);
  AddFork(&larger, kPage);
  Plan(larger);
  EXPECT_THAT(plan_.admit, ElementsAre(1));
}

// With nothing running, nobody will ever give pages back: outputs that wait with their prompt's
// pages lose them to the first in rank.
TEST_F(CopyOnWriteTest, WaitingOutputsMakeRoomWhenNothingRuns) {
  SequenceSet set(4);
  set.Add(Prompt(3 * kPage, /*running=*/false, /*priority=*/1));  // 4 pages.
  AddFork(&set, 8);
  for (int32_t page : first_->pages) set.pool().Release(PageId{page});
  first_->pages.clear();
  first_->done = true;
  std::vector<const Sequence*> alive = {set.view()[0], second_};
  Scheduler scheduler(Limits());
  scheduler.Plan(alive, set.pool(), &plan_);
  EXPECT_THAT(plan_.preempt, ElementsAre(1));
  EXPECT_THAT(plan_.admit, ElementsAre(0));
}

// ... and nobody of lower rank profits in their place.
TEST_F(CopyOnWriteTest, WhoMadeRoomIsNotOvertaken) {
  SequenceSet set(5);
  set.Add(Prompt(3 * kPage, /*running=*/false, /*priority=*/1));  // 4 pages.
  AddFork(&set, 2 * kPage);
  for (int32_t page : first_->pages) set.pool().Release(PageId{page});
  set.Add(Prompt(2, /*running=*/false));
  std::vector<const Sequence*> alive = {set.view()[0], second_, set.view()[3]};
  Scheduler scheduler(Limits());
  scheduler.Plan(alive, set.pool(), &plan_);
  EXPECT_THAT(plan_.preempt, ElementsAre(1));
  EXPECT_THAT(plan_.admit, ElementsAre(0));
}

// ---- limits ----

TEST_F(SchedulerTest, AStepIsSparseWhereItsTokensPayForSelection) {
  SequenceState state;
  state.prompt = 256;
  state.output = 145;
  state.kv_len = 400;
  state.policy.mode = AttentionMode::kSparse;
  const auto sparse_rows = [&](int sequences, int64_t step_tokens) {
    SequenceSet set(512);
    for (int i = 0; i < sequences; ++i) set.Add(state);
    set.Add(Prompt(64, /*running=*/true));
    SchedulerLimits limits = Limits();
    limits.sparse_from = 300;
    limits.sparse_step_tokens = step_tokens;
    int rows = 0;
    for (const Segment& segment : Plan(set, limits).segments) rows += segment.work.sparse ? 1 : 0;
    return rows;
  };
  // Each has 401 tokens, 101 beyond the 300; the prompt does not count.
  EXPECT_EQ(sparse_rows(3, 0), 3);
  EXPECT_EQ(sparse_rows(3, 303), 3);
  EXPECT_EQ(sparse_rows(3, 304), 0);
  EXPECT_EQ(sparse_rows(4, 304), 4);
  state.kv_len = 200;
  state.output = 1;
  state.prompt = 200;
  EXPECT_EQ(sparse_rows(4, 1), 0);
}

TEST(SchedulerLimitsTest, SaysWhatDoesNotFit) {
  EXPECT_TRUE(ValidateLimits(Limits()).ok());
  SchedulerLimits limits = Limits();
  limits.max_step_tokens = 295;
  EXPECT_THAT(ValidateLimits(limits).message(),
              HasSubstr("max_step_tokens: 295, must be at least 296"));
  limits = Limits();
  limits.max_sequences = 0;
  EXPECT_THAT(ValidateLimits(limits).message(), HasSubstr("max_sequences: 0"));
  limits = Limits();
  limits.min_chunk_tokens = 0;
  EXPECT_THAT(ValidateLimits(limits).message(), HasSubstr("min_chunk_tokens: 0"));
  limits = Limits();
  limits.sparse_from = -1;
  EXPECT_THAT(ValidateLimits(limits).message(), HasSubstr("sparse_from: -1"));
  limits = Limits();
  limits.sparse_step_tokens = -1;
  EXPECT_THAT(ValidateLimits(limits).message(), HasSubstr("sparse_step_tokens: -1"));
}

}  // namespace
}  // namespace resa::engine
