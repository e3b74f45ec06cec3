#include "engine/sequence.h"

#include <cstdint>
#include <optional>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/sequence_set.h"

namespace resa::engine {
namespace {

constexpr int32_t kPoolPages = 100;

// Budget of two blocks of 8: sparse from 17 tokens on.
AttentionPolicy SmallBudget(AttentionMode mode) {
  AttentionPolicy policy;
  policy.mode = mode;
  policy.keep_ratio = 0.01;
  policy.min_tokens = 16;
  policy.local_tokens = 8;
  policy.sink_tokens = 8;
  policy.rectify_interval = 32;
  return policy;
}

class SequenceTest : public ::testing::Test {
 protected:
  Work Next(const Sequence& sequence, int32_t sparse_from = 0) {
    return NextWork(sequence, kernels::SelectorSpec(), sparse_from);
  }

  // A decoding sequence whose newest token is at `position`.
  Sequence* DecodingAt(int32_t position, int32_t rectified_len, AttentionMode mode) {
    SequenceState state;
    state.prompt = 4;
    state.output = position + 1 - state.prompt;
    state.kv_len = position;
    state.rectified_len = rectified_len;
    state.policy = SmallBudget(mode);
    return set_.Add(state);
  }

  SequenceSet set_{kPoolPages};
};

TEST_F(SequenceTest, BeginsWithItsPrompt) {
  Request request;
  request.prompt = {7, 8, 9};
  const Sequence first(request, 0, 10, {});
  EXPECT_THAT(first.tokens, ::testing::ElementsAre(7, 8, 9));
  EXPECT_EQ(first.prompt_len, 3);
  EXPECT_EQ(first.output_len(), 0);
  EXPECT_TRUE(first.prefilling());
  EXPECT_FALSE(first.running);
}

TEST_F(SequenceTest, PrefillsWhatIsLeftOfThePromptDenselyAndThenEmits) {
  SequenceState state;
  state.prompt = 100;
  state.kv_len = 40;
  state.policy = SmallBudget(AttentionMode::kSparse);
  const Work work = Next(*set_.Add(state));
  EXPECT_EQ(work.kind, SegmentKind::kPrefill);
  EXPECT_EQ(work.begin, 40);
  EXPECT_EQ(work.end, 100);
  EXPECT_FALSE(work.sparse.has_value());
  EXPECT_TRUE(work.emits);
}

TEST_F(SequenceTest, DecodesTheNewestTokenSparsely) {
  const Work work = Next(*DecodingAt(40, 40, AttentionMode::kRectified));
  EXPECT_EQ(work.kind, SegmentKind::kDecode);
  EXPECT_EQ(work.begin, 40);
  EXPECT_EQ(work.end, 41);
  EXPECT_TRUE(work.emits);
  ASSERT_TRUE(work.sparse.has_value());
  EXPECT_EQ(work.sparse->keep_blocks, 2);
  EXPECT_EQ(work.sparse->local_blocks, 1);
  EXPECT_EQ(work.sparse->sink_blocks, 1);
}

TEST_F(SequenceTest, TakesTheDensePathWhenShortOrAskedFor) {
  // The budget of two blocks covers 16 tokens.
  EXPECT_FALSE(Next(*DecodingAt(15, 15, AttentionMode::kRectified)).sparse.has_value());
  EXPECT_TRUE(Next(*DecodingAt(16, 16, AttentionMode::kRectified)).sparse.has_value());
  // sparse_from counts the newest token.
  EXPECT_FALSE(Next(*DecodingAt(40, 40, AttentionMode::kRectified), 42).sparse.has_value());
  EXPECT_TRUE(Next(*DecodingAt(40, 40, AttentionMode::kRectified), 41).sparse.has_value());
  EXPECT_FALSE(Next(*DecodingAt(40, 40, AttentionMode::kDense)).sparse.has_value());
}

TEST_F(SequenceTest, WindowIsDueAtMultiplesOfTheIntervalAndBeginsWhereExactnessEnds) {
  EXPECT_EQ(Next(*DecodingAt(62, 40, AttentionMode::kRectified)).kind, SegmentKind::kDecode);
  const Work due = Next(*DecodingAt(63, 40, AttentionMode::kRectified));
  EXPECT_EQ(due.kind, SegmentKind::kRectification);
  EXPECT_EQ(due.begin, 40);
  EXPECT_EQ(due.end, 64);
  EXPECT_FALSE(due.sparse.has_value());
  EXPECT_TRUE(due.emits);
  EXPECT_EQ(Next(*DecodingAt(64, 40, AttentionMode::kRectified)).kind, SegmentKind::kDecode);
}

TEST_F(SequenceTest, DuePositionWithNothingToRepairIsADenseDecodeRow) {
  const Work work = Next(*DecodingAt(63, 63, AttentionMode::kRectified));
  EXPECT_EQ(work.kind, SegmentKind::kDecode);
  EXPECT_EQ(work.begin, 63);
  EXPECT_FALSE(work.sparse.has_value());
}

TEST_F(SequenceTest, OtherModesHaveNoWindows) {
  const Work sparse = Next(*DecodingAt(63, 40, AttentionMode::kSparse));
  EXPECT_EQ(sparse.kind, SegmentKind::kDecode);
  EXPECT_TRUE(sparse.sparse.has_value());
  EXPECT_EQ(Next(*DecodingAt(63, 63, AttentionMode::kDense)).kind, SegmentKind::kDecode);
}

TEST_F(SequenceTest, AdvanceLeavesTheWindowOpenBehindASparseRow) {
  Sequence* sequence = DecodingAt(40, 40, AttentionMode::kRectified);
  Advance(sequence, Next(*sequence));
  EXPECT_EQ(sequence->kv_len, 41);
  EXPECT_EQ(sequence->rectified_len, 40);
}

TEST_F(SequenceTest, AdvanceClosesTheWindowWithARectification) {
  Sequence* sequence = DecodingAt(63, 40, AttentionMode::kRectified);
  Advance(sequence, Next(*sequence));
  EXPECT_EQ(sequence->kv_len, 64);
  EXPECT_EQ(sequence->rectified_len, 64);
}

TEST_F(SequenceTest, DenseRowIsExactOnAnExactHistoryOnly) {
  Sequence* exact = DecodingAt(10, 10, AttentionMode::kRectified);
  Advance(exact, Next(*exact));
  EXPECT_EQ(exact->rectified_len, 11);
  Sequence* inexact = DecodingAt(40, 39, AttentionMode::kRectified);
  Advance(inexact, Next(*inexact, /*sparse_from=*/100));
  EXPECT_EQ(inexact->kv_len, 41);
  EXPECT_EQ(inexact->rectified_len, 39);
}

TEST_F(SequenceTest, ModeSparseCountsOnlyWhatIsPrefilled) {
  Sequence* decoding = DecodingAt(10, 4, AttentionMode::kSparse);
  Advance(decoding, Next(*decoding));
  EXPECT_EQ(decoding->kv_len, 11);
  EXPECT_EQ(decoding->rectified_len, 4);
  Sequence* first_row = DecodingAt(4, 4, AttentionMode::kSparse);
  Advance(first_row, Next(*first_row));
  EXPECT_EQ(first_row->rectified_len, 4);

  SequenceState state;
  state.prompt = 30;
  state.policy = SmallBudget(AttentionMode::kSparse);
  Sequence* prefilling = set_.Add(state);
  Advance(prefilling, Next(*prefilling));
  EXPECT_EQ(prefilling->rectified_len, 30);
}

// Preempted in the middle of a window: the exact part comes back as a prefill, the window as decode
// rows under the same budgets that emit nothing, and then the sequence is where it was.
TEST_F(SequenceTest, ReplayGoesBackToWhereItWas) {
  Sequence* sequence = DecodingAt(50, 40, AttentionMode::kRectified);
  sequence->cached_tokens = 3;
  const Work next = Next(*sequence);
  sequence->pages.clear();
  ForgetPages(sequence);
  EXPECT_EQ(sequence->kv_len, 0);
  EXPECT_EQ(sequence->cached_tokens, 0);
  EXPECT_EQ(sequence->rectified_len, 0);
  EXPECT_FALSE(sequence->running);
  EXPECT_EQ(sequence->size(), 51);

  Work work = Next(*sequence);
  EXPECT_EQ(work.kind, SegmentKind::kPrefill);
  EXPECT_EQ(work.end, 40);
  EXPECT_FALSE(work.emits);
  Advance(sequence, work);
  for (int32_t position = 40; position < 50; ++position) {
    work = Next(*sequence);
    EXPECT_EQ(work.kind, SegmentKind::kDecode);
    EXPECT_EQ(work.begin, position);
    EXPECT_TRUE(work.sparse.has_value());
    EXPECT_FALSE(work.emits);
    Advance(sequence, work);
    EXPECT_EQ(sequence->rectified_len, 40);
  }
  work = Next(*sequence);
  EXPECT_EQ(work.begin, next.begin);
  EXPECT_EQ(work.sparse, next.sparse);
  EXPECT_TRUE(work.emits);
}

TEST_F(SequenceTest, SecondPreemptionInTheMiddleOfAReplayForgetsNothing) {
  Sequence* sequence = DecodingAt(50, 40, AttentionMode::kRectified);
  ForgetPages(sequence);
  Work chunk = Next(*sequence);
  chunk.end = 16;
  Advance(sequence, chunk);
  ForgetPages(sequence);
  EXPECT_EQ(sequence->dense_target, 40);
}

TEST_F(SequenceTest, ModeSparseIsRecomputedDenselyUpToItsNewestToken) {
  Sequence* sequence = DecodingAt(50, 4, AttentionMode::kSparse);
  ForgetPages(sequence);
  const Work work = Next(*sequence);
  EXPECT_EQ(work.kind, SegmentKind::kPrefill);
  EXPECT_EQ(work.end, 50);
  EXPECT_FALSE(work.emits);
  Advance(sequence, work);
  EXPECT_EQ(sequence->rectified_len, 50);
  EXPECT_TRUE(Next(*sequence).emits);
}

TEST_F(SequenceTest, PreemptionInTheMiddleOfThePromptStartsAgainAndEmits) {
  SequenceState state;
  state.prompt = 100;
  state.kv_len = 40;
  Sequence* sequence = set_.Add(state);
  ForgetPages(sequence);
  const Work work = Next(*sequence);
  EXPECT_EQ(work.begin, 0);
  EXPECT_EQ(work.end, 100);
  EXPECT_TRUE(work.emits);
}

}  // namespace
}  // namespace resa::engine
