#include "engine/engine.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/engine_fixture.h"

namespace resa::engine {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr absl::StatusCode kInternal = absl::StatusCode::kInternal;

// ---- one request ----

// Far more wait than a step looks at; still the highest rank goes first.
TEST_F(EngineTest, ALongQueueIsServedByRank) {
  constexpr int kRequests = 200;
  options_.max_waiting = kRequests;
  std::vector<std::pair<int32_t, int32_t>> expected;  // -priority, name
  const auto submit = [&](int32_t name, int32_t priority) {
    auto request = MakeRequest(3, 1);
    request->prompt[0] = name;
    request->priority = priority;
    Submit(std::move(request));
    expected.emplace_back(-priority, name);
  };
  for (int32_t i = 0; i < kRequests - 2; ++i) submit(200 + i, (i * 7) % 5 - 2);
  Steps(3);
  EXPECT_EQ(engine().Load().running + engine().Load().waiting, kRequests - 2 - 3 * 4);
  // One that overtakes them all, and one that goes last.
  std::sort(expected.begin(), expected.end());
  const auto served = expected.begin() + 3 * 4;
  std::vector<std::pair<int32_t, int32_t>> rest(served, expected.end());
  expected.erase(served, expected.end());
  submit(190, 9);
  submit(191, -9);
  expected.insert(expected.end() - 1, rest.begin(), rest.end());
  RunDry();
  std::vector<int32_t> order;
  for (const ScriptedExecutor::Step& step : executor_.steps) {
    for (const ScriptedExecutor::Segment& segment : step.segments) {
      order.push_back(segment.tokens[0]);
    }
  }
  std::vector<int32_t> names;
  for (const auto& [priority, name] : expected) names.push_back(name);
  EXPECT_EQ(order, names);
}

TEST_F(EngineTest, NothingToDo) {
  EXPECT_FALSE(engine().Step());
  EXPECT_THAT(executor_.steps, IsEmpty());
}

TEST_F(EngineTest, PrefillsDecodesAndEndsByLength) {
  auto sink = Submit(MakeRequest(20, 3));
  EXPECT_EQ(sink->accepted, 0) << "told before the engine thread has it";
  RunDry();
  EXPECT_EQ(sink->accepted, 1);
  EXPECT_EQ(sink->accepted_tokens, 20);
  EXPECT_THAT(sink->Tokens(), ElementsAre(100, 101, 102));
  EXPECT_THAT(sink->deltas, SizeIs(3));
  ASSERT_THAT(sink->finished, SizeIs(1));
  EXPECT_EQ(sink->finished[0].reason, FinishReason::kLength);
  EXPECT_EQ(sink->finished[0].usage.prompt_tokens, 20);
  EXPECT_EQ(sink->finished[0].usage.output_tokens, 3);
  EXPECT_THAT(sink->errors, IsEmpty());

  ASSERT_THAT(executor_.steps, SizeIs(3));
  EXPECT_THAT(executor_.steps[0].segments[0].tokens, SizeIs(20));
  EXPECT_THAT(executor_.steps[1].segments[0].tokens, ElementsAre(100));
  EXPECT_EQ(executor_.steps[1].segments[0].position, 20);
  EXPECT_THAT(executor_.steps[1].segments[0].pages, SizeIs(2));
  EXPECT_THAT(executor_.steps[2].segments[0].tokens, ElementsAre(101));
  EXPECT_EQ(PagesUsed(), 0);
}

TEST_F(EngineTest, LongPromptComesInChunksAndOnlyTheLastOneSamples) {
  auto sink = Submit(MakeRequest(500, 1));
  RunDry();
  ASSERT_THAT(executor_.steps, SizeIs(2));
  EXPECT_THAT(executor_.steps[0].segments[0].tokens, SizeIs(292));
  EXPECT_FALSE(executor_.steps[0].segments[0].samples);
  EXPECT_EQ(executor_.steps[1].segments[0].position, 292);
  EXPECT_TRUE(executor_.steps[1].segments[0].samples);
  EXPECT_THAT(sink->Tokens(), ElementsAre(100));
}

TEST_F(EngineTest, OutputMayFillTheWholeContext) {
  auto request = MakeRequest(500, 1);
  request->stop.max_tokens.reset();
  auto sink = Submit(std::move(request));
  RunDry();
  EXPECT_THAT(sink->Tokens(), SizeIs(12));
  EXPECT_EQ(sink->finished[0].reason, FinishReason::kLength);
}

TEST_F(EngineTest, SpendsItsTimeWhereTheTimingsSay) {
  auto sink = Submit(MakeRequest(20, 3));
  clock_.Advance(absl::Seconds(1));
  executor_.draw = [this](const kernels::SampleRow& row) {
    clock_.Advance(absl::Seconds(10));
    return ScriptedExecutor::CountUp(row);
  };
  RunDry();
  const Timings& timings = sink->finished[0].timings;
  EXPECT_EQ(timings.queued, absl::Seconds(1));
  EXPECT_EQ(timings.prefill, absl::Seconds(10));
  EXPECT_EQ(timings.first_token, absl::Seconds(11));
  EXPECT_EQ(timings.decode, absl::Seconds(20));
  EXPECT_EQ(timings.total, absl::Seconds(31));
}

TEST_F(EngineTest, EchoComesBeforeTheOutput) {
  auto request = MakeRequest(3, 2);
  request->output.echo = true;
  auto sink = Submit(std::move(request));
  RunDry();
  EXPECT_THAT(sink->Tokens(), ElementsAre(10, 11, 12, 100, 101));
  EXPECT_EQ(sink->finished[0].usage.output_tokens, 2);
}

TEST_F(EngineTest, LogprobsComeWhenAskedFor) {
  executor_.draw = [](const kernels::SampleRow& row) {
    kernels::SampleResult result = ScriptedExecutor::CountUp(row);
    result.num_top = row.top_logprobs;
    result.top_ids = {7, 8};
    result.top_logprobs = {-0.1f, -0.2f};
    return result;
  };
  auto request = MakeRequest(3, 1);
  request->output.logprobs = true;
  request->output.top_logprobs = 2;
  auto with = Submit(std::move(request));
  auto without = Submit(MakeRequest(3, 1));
  RunDry();
  ASSERT_THAT(with->deltas[0].logprobs, SizeIs(1));
  EXPECT_EQ(with->deltas[0].logprobs[0].logprob, -0.5f);
  EXPECT_THAT(with->deltas[0].logprobs[0].top,
              ElementsAre(std::pair(7, -0.1f), std::pair(8, -0.2f)));
  EXPECT_THAT(without->deltas[0].logprobs, IsEmpty());
}

// ---- ends ----

TEST_F(EngineTest, EndsAtEosOrAStopToken) {
  executor_.draw = [](const kernels::SampleRow& row) {
    kernels::SampleResult result;
    result.token = row.draw_index == 2 ? kEos : row.draw_index == 1 ? 101 : 100;
    return result;
  };
  auto eos = Submit(MakeRequest(3, 10));
  auto request = MakeRequest(3, 10);
  request->stop.token_ids = {101};
  auto stop = Submit(std::move(request));
  request = MakeRequest(3, 4);
  request->stop.ignore_eos = true;
  auto ignoring = Submit(std::move(request));
  RunDry();
  EXPECT_THAT(eos->Tokens(), ElementsAre(100, 101, kEos));
  EXPECT_EQ(eos->finished[0].reason, FinishReason::kStop);
  EXPECT_EQ(eos->finished[0].matched_stop_token, kEos);
  EXPECT_THAT(stop->Tokens(), ElementsAre(100, 101));
  EXPECT_EQ(stop->finished[0].matched_stop_token, 101);
  EXPECT_THAT(ignoring->Tokens(), SizeIs(4));
  EXPECT_EQ(ignoring->finished[0].reason, FinishReason::kLength);
  EXPECT_EQ(ignoring->finished[0].matched_stop_token, std::nullopt);
}

TEST_F(EngineTest, StopTokenAtTheVeryLengthIsAStop) {
  executor_.draw = [](const kernels::SampleRow&) {
    kernels::SampleResult result;
    result.token = kEos;
    return result;
  };
  auto sink = Submit(MakeRequest(3, 1));
  RunDry();
  EXPECT_EQ(sink->finished[0].reason, FinishReason::kStop);
}

TEST_F(EngineTest, EndTokensAreBannedBeforeMinTokens) {
  std::vector<int64_t> bans;
  executor_.draw = [&bans](const kernels::SampleRow& row) {
    for (int64_t i = 0; i < row.num_bias; ++i) {
      EXPECT_EQ(row.bias[i].bias, -std::numeric_limits<float>::infinity());
    }
    bans.push_back(row.num_bias);
    return ScriptedExecutor::CountUp(row);
  };
  auto request = MakeRequest(3, 4);
  request->stop.min_tokens = 2;
  request->stop.token_ids = {50};
  Submit(std::move(request));
  RunDry();
  EXPECT_THAT(bans, ElementsAre(2, 2, 0, 0));
}

TEST_F(EngineTest, ForcedTokensAreTakenAndEndNothing) {
  auto request = MakeRequest(3, 5);
  request->forced_tokens = {kEos, 60, kEos};
  request->stop.token_ids = {60, 103};
  auto sink = Submit(std::move(request));
  RunDry();
  EXPECT_THAT(sink->Tokens(), ElementsAre(kEos, 60, kEos, 103));
  EXPECT_EQ(sink->finished[0].matched_stop_token, 103);
  EXPECT_EQ(sink->finished[0].usage.output_tokens, 4);
}

TEST_F(EngineTest, ForcedTokensCountTowardTheLength) {
  auto request = MakeRequest(3, 2);
  request->forced_tokens = {kEos, kEos};
  auto sink = Submit(std::move(request));
  RunDry();
  EXPECT_THAT(sink->Tokens(), ElementsAre(kEos, kEos));
  EXPECT_EQ(sink->finished[0].reason, FinishReason::kLength);
}

// ---- n outputs ----

TEST_F(EngineTest, OutputsShareThePromptsPagesAndDrawWithTheirOwnSeeds) {
  executor_.draw = [](const kernels::SampleRow& row) {
    kernels::SampleResult result;
    result.token = 10 * static_cast<int32_t>(row.seed) + static_cast<int32_t>(row.draw_index);
    return result;
  };
  auto request = MakeRequest(40, 3);
  request->n = 3;
  request->sampling.seed = 7;
  auto sink = Submit(std::move(request));
  Steps(1);
  // The others hold the prompt's three pages too, and wait to run its last token.
  EXPECT_EQ(PagesUsed(), 3);
  EXPECT_EQ(engine().pool().owners(PageId{engine().sequences()[0]->pages[0]}), 3);
  RunDry();
  EXPECT_THAT(sink->Tokens(0), ElementsAre(70, 71, 72));
  EXPECT_THAT(sink->Tokens(1), ElementsAre(80, 81, 82));
  EXPECT_THAT(sink->Tokens(2), ElementsAre(90, 91, 92));
  ASSERT_THAT(sink->finished, SizeIs(3));
  for (const Finished& finished : sink->finished) {
    EXPECT_EQ(finished.usage.cached_tokens, finished.index == 0 ? 0 : 39);
  }
  EXPECT_EQ(PagesUsed(), 0);
  EXPECT_EQ(observer_.prompt_tokens, 40);

  // Step 1: all three write into the prompt's last page; the last owner needs no copy.
  const ScriptedExecutor::Step& fork = executor_.steps[1];
  ASSERT_THAT(fork.segments, SizeIs(3));
  EXPECT_THAT(fork.copies, SizeIs(2));
  EXPECT_EQ(fork.segments[0].position, 40);
  EXPECT_EQ(fork.segments[1].position, 39);
  EXPECT_EQ(fork.segments[1].pages[0], fork.segments[0].pages[0]);
  EXPECT_NE(fork.segments[1].pages[2], fork.segments[0].pages[2]);
}

TEST_F(EngineTest, OneTokenPromptIsRunByEachOutput) {
  auto request = MakeRequest(1, 2);
  request->n = 2;
  auto sink = Submit(std::move(request));
  RunDry();
  EXPECT_THAT(sink->Tokens(0), ElementsAre(100, 101));
  EXPECT_THAT(sink->Tokens(1), ElementsAre(100, 101));
  EXPECT_EQ(sink->finished[1].usage.cached_tokens, 0);
}

TEST_F(EngineTest, OutputsOutliveTheFirst) {
  executor_.draw = [](const kernels::SampleRow& row) {
    kernels::SampleResult result = ScriptedExecutor::CountUp(row);
    if (row.seed == 0) result.token = kEos;
    return result;
  };
  auto request = MakeRequest(40, 3);
  request->n = 2;
  auto sink = Submit(std::move(request));
  RunDry();
  EXPECT_THAT(sink->Tokens(0), ElementsAre(kEos));
  EXPECT_THAT(sink->Tokens(1), ElementsAre(100, 101, 102));
  EXPECT_EQ(sink->finished[0].index, 0);
  EXPECT_EQ(sink->finished[1].index, 1);
}

// ---- errors ----

TEST_F(EngineTest, FailedStepEndsItsRequestsAndNoOthers) {
  auto first = Submit(MakeRequest(3, 10));
  Steps(1);
  executor_.status = absl::UnknownError("the device is gone");
  Steps(1);
  ASSERT_THAT(first->errors, SizeIs(1));
  EXPECT_EQ(first->errors[0].code(), kInternal);
  EXPECT_THAT(first->errors[0].message(), HasSubstr("the device is gone"));
  EXPECT_THAT(first->finished, IsEmpty());
  EXPECT_EQ(PagesUsed(), 0);

  executor_.status = absl::OkStatus();
  auto second = Submit(MakeRequest(3, 2));
  RunDry();
  EXPECT_THAT(second->Tokens(), ElementsAre(100, 101));
}

TEST_F(EngineTest, LogitsThatAreNotFiniteEndTheRequestWithoutGarbage) {
  executor_.draw = [](const kernels::SampleRow& row) {
    kernels::SampleResult result = ScriptedExecutor::CountUp(row);
    result.finite = row.seed != 1 || row.draw_index < 1;
    return result;
  };
  auto request = MakeRequest(3, 5);
  request->n = 3;
  auto broken = Submit(std::move(request));
  request = MakeRequest(3, 5);
  request->sampling.seed = 5;
  auto healthy = Submit(std::move(request));
  RunDry();
  ASSERT_THAT(broken->errors, SizeIs(1));
  EXPECT_EQ(broken->errors[0].code(), kInternal);
  EXPECT_THAT(broken->Tokens(1), ElementsAre(100));
  EXPECT_THAT(broken->finished, IsEmpty());
  EXPECT_THAT(healthy->Tokens(), SizeIs(5));
  EXPECT_EQ(PagesUsed(), 0);
}

TEST_F(EngineTest, SlowReaderIsDisconnected) {
  auto request = MakeRequest(3, 10);
  auto slow = Submit(std::move(request));
  slow->buffer = 2;
  auto other = Submit(MakeRequest(3, 10));
  Steps(4);
  ASSERT_THAT(slow->errors, SizeIs(1));
  EXPECT_EQ(slow->errors[0].code(), absl::StatusCode::kResourceExhausted);
  RunDry();
  EXPECT_THAT(slow->errors, SizeIs(1));
  EXPECT_THAT(slow->finished, IsEmpty());
  EXPECT_THAT(other->Tokens(), SizeIs(10));
}

TEST_F(EngineTest, ClientsAreToldWhileTheNextStepIsComputed) {
  auto sink = Submit(MakeRequest(3, 3));
  std::vector<size_t> told;
  executor_.draw = [&](const kernels::SampleRow& row) {
    told.push_back(sink->deltas.size());
    return ScriptedExecutor::CountUp(row);
  };
  Steps(2);
  EXPECT_THAT(sink->Tokens(), SizeIs(1));
  // The last one has no next step.
  Steps(1);
  EXPECT_THAT(sink->Tokens(), SizeIs(3));
  EXPECT_THAT(sink->finished, SizeIs(1));
  EXPECT_THAT(told, ElementsAre(0, 1, 2));
}

TEST_F(EngineTest, FlushTellsAtOnce) {
  auto sink = Submit(MakeRequest(3, 3));
  Steps(1);
  EXPECT_THAT(sink->deltas, IsEmpty());
  engine().Flush();
  EXPECT_THAT(sink->Tokens(), SizeIs(1));
  engine().Flush();
  RunDry();
  EXPECT_THAT(sink->Tokens(), SizeIs(3));
}

TEST_F(EngineTest, WhatWasSampledBeforeACancelIsToldBeforeIt) {
  auto sink = Submit(MakeRequest(3, 10));
  const RequestId id = last_id_;
  auto other = Submit(MakeRequest(3, 10));
  Steps(2);
  engine().Cancel(id);
  Steps(1);
  EXPECT_THAT(sink->Tokens(), SizeIs(2));
  EXPECT_THAT(sink->errors, SizeIs(1));
  RunDry();
  EXPECT_THAT(sink->Tokens(), SizeIs(2));
  EXPECT_THAT(other->Tokens(), SizeIs(10));
}

TEST_F(EngineTest, AReaderThatRefusesTheLastTokenIsNotToldOfAnEnd) {
  auto slow = Submit(MakeRequest(3, 3));
  slow->buffer = 2;
  auto other = Submit(MakeRequest(3, 10));
  RunDry();
  EXPECT_THAT(slow->finished, IsEmpty());
  ASSERT_THAT(slow->errors, SizeIs(1));
  EXPECT_EQ(slow->errors[0].code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(other->finished, SizeIs(1));
  EXPECT_EQ(PagesUsed(), 0);
}

TEST_F(EngineTest, EchoThatDoesNotFitEndsTheRequestBeforeItRuns) {
  auto request = MakeRequest(3, 10);
  request->output.echo = true;
  request->n = 2;
  auto sink = Submit(std::move(request));
  sink->buffer = 0;
  EXPECT_FALSE(engine().Step());
  EXPECT_THAT(sink->errors, SizeIs(1));
  EXPECT_THAT(sink->deltas, SizeIs(1));
  EXPECT_THAT(executor_.steps, IsEmpty());
}

// ---- cancels and deadlines ----

TEST_F(EngineTest, CancelFreesPagesWithinOneStep) {
  auto request = MakeRequest(100, 10);
  request->n = 3;
  auto sink = Submit(std::move(request));
  Steps(3);
  EXPECT_GT(PagesUsed(), 0);
  engine().Cancel(last_id_);
  EXPECT_FALSE(engine().Step());
  EXPECT_EQ(PagesUsed(), 0);
  ASSERT_THAT(sink->errors, SizeIs(1));
  EXPECT_EQ(sink->errors[0].code(), absl::StatusCode::kCancelled);
  EXPECT_THAT(executor_.steps, SizeIs(3));
}

TEST_F(EngineTest, CancelReachesARequestThatHasNotBeenReadYet) {
  auto sink = Submit(MakeRequest(3, 10));
  engine().Cancel(last_id_);
  EXPECT_FALSE(engine().Step());
  EXPECT_EQ(sink->accepted, 1);
  EXPECT_THAT(sink->errors, SizeIs(1));
}

TEST_F(EngineTest, CancelOfUnknownOrFinishedRequestsIsIgnored) {
  engine().Cancel(RequestId{999});
  auto sink = Submit(MakeRequest(3, 1));
  RunDry();
  engine().Cancel(last_id_);
  EXPECT_FALSE(engine().Step());
  EXPECT_THAT(sink->errors, IsEmpty());
}

TEST_F(EngineTest, DeadlineHoldsWhileDecoding) {
  auto request = MakeRequest(3, 100);
  request->deadline = clock_.Now() + absl::Seconds(5);
  auto sink = Submit(std::move(request));
  Steps(2);
  clock_.Advance(absl::Seconds(5));
  EXPECT_FALSE(engine().Step());
  ASSERT_THAT(sink->errors, SizeIs(1));
  EXPECT_EQ(sink->errors[0].code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(sink->errors[0].message(), HasSubstr("while tokens were made"));
  EXPECT_EQ(PagesUsed(), 0);
}

TEST_F(EngineTest, DeadlineHoldsInTheQueue) {
  std::vector<std::shared_ptr<RecordingSink>> running;
  for (int i = 0; i < 4; ++i) running.push_back(Submit(MakeRequest(3, 100)));
  Steps(1);
  auto request = MakeRequest(3, 100);
  request->deadline = clock_.Now() + absl::Seconds(5);
  auto queued = Submit(std::move(request));
  Steps(1);
  clock_.Advance(absl::Seconds(5));
  Steps(1);
  ASSERT_THAT(queued->errors, SizeIs(1));
  EXPECT_THAT(queued->errors[0].message(), HasSubstr("queued"));
  EXPECT_THAT(queued->deltas, IsEmpty());
}

// ---- the door ----

TEST_F(EngineTest, RefusesWhatIsWrongOrCanNeverFit) {
  auto request = MakeRequest(3, 10);
  request->sampling.top_p = 2;
  EXPECT_EQ(SubmitStatus(std::move(request)).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(SubmitStatus(MakeRequest(600, 10)).code(), absl::StatusCode::kInvalidArgument);
  request = MakeRequest(3, 10);
  request->stop.strings = {"x"};
  const absl::Status no_text = SubmitStatus(std::move(request));
  EXPECT_EQ(no_text.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(no_text.message(), HasSubstr("stop.strings"));
}

TEST_F(EngineTest, QueueIsBoundedByWhatDoesNotRun) {
  for (int i = 0; i < 4; ++i) Submit(MakeRequest(3, 10));
  EXPECT_EQ(SubmitStatus(MakeRequest(3, 10)).code(), absl::StatusCode::kResourceExhausted);
  Steps(1);
  // All four run now; the next four wait.
  for (int i = 0; i < 4; ++i) Submit(MakeRequest(3, 10));
  Steps(1);
  EXPECT_EQ(SubmitStatus(MakeRequest(3, 10)).code(), absl::StatusCode::kResourceExhausted);
  // Who leaves the queue without having run makes room as well.
  engine().Cancel(last_id_);
  Steps(1);
  Submit(MakeRequest(3, 10));
}

TEST_F(EngineTest, DrainingFinishesWhatIsThere) {
  auto sink = Submit(MakeRequest(3, 5));
  EXPECT_FALSE(engine().Draining());
  engine().StartDraining();
  EXPECT_TRUE(engine().Draining());
  EXPECT_EQ(SubmitStatus(MakeRequest(3, 5)).code(), absl::StatusCode::kUnavailable);
  RunDry();
  EXPECT_THAT(sink->Tokens(), SizeIs(5));
}

TEST_F(EngineTest, AbortAllEndsEverythingAtTheNextStep) {
  auto running = Submit(MakeRequest(3, 50));
  Steps(2);
  auto unread = Submit(MakeRequest(3, 50));
  engine().AbortAll();
  EXPECT_FALSE(engine().Step());
  for (const auto& sink : {running, unread}) {
    ASSERT_THAT(sink->errors, SizeIs(1));
    EXPECT_EQ(sink->errors[0].code(), absl::StatusCode::kUnavailable);
  }
  EXPECT_EQ(PagesUsed(), 0);
}

TEST_F(EngineTest, DestructionTellsEveryClient) {
  auto running = Submit(MakeRequest(3, 50));
  Steps(2);
  auto unread = Submit(MakeRequest(3, 50));
  engine_.reset();
  EXPECT_THAT(running->errors, SizeIs(1));
  EXPECT_THAT(unread->errors, SizeIs(1));
}

// ---- attention ----

TEST_F(EngineTest, RectifiesAtAlignedPositionsAndCountsIt) {
  auto request = MakeRequest(60, 40);
  request->attention.mode = AttentionMode::kRectified;
  request->attention.min_tokens = 32;
  request->attention.local_tokens = 8;
  request->attention.sink_tokens = 8;
  request->attention.rectify_interval = 32;
  auto sink = Submit(std::move(request));
  RunDry();
  std::vector<std::pair<int32_t, size_t>> windows;
  for (const ScriptedExecutor::Step& step : executor_.steps) {
    const ScriptedExecutor::Segment& segment = step.segments[0];
    if (segment.position > 0 && segment.tokens.size() > 1) {
      windows.emplace_back(segment.position, segment.tokens.size());
      EXPECT_FALSE(segment.sparse);
    }
  }
  // Due at positions 63 and 95: what prefill left exact is not fed again.
  EXPECT_THAT(windows, ElementsAre(std::pair(60, 4u), std::pair(64, 32u)));
  const AttentionStats& stats = sink->finished[0].attention;
  EXPECT_EQ(stats.rectifications, 2);
  EXPECT_EQ(stats.rectified_rows, 36);
  EXPECT_EQ(stats.sparse_steps, 39 - 2);
  EXPECT_EQ(stats.dense_steps, 0);
  EXPECT_EQ(stats.stalled_steps, 0);
  EXPECT_EQ(stats.blocks_kept, 4 * 37);
  EXPECT_EQ(observer_.rectifications, 2);
  EXPECT_EQ(observer_.rectified_rows, 36);
  EXPECT_EQ(observer_.delay, 0);
  EXPECT_EQ(observer_.sparse_rows, 37);
}

TEST_F(EngineTest, StalledWindowsAreCounted) {
  // The second and third output keep step, so their windows of 253 rows at position 255 are due
  // together, and only one fits into a step of 292 rows.
  auto request = MakeRequest(3, 300);
  request->n = 3;
  request->attention.mode = AttentionMode::kRectified;
  request->attention.keep_ratio = 0.01;
  request->attention.min_tokens = 1;
  request->attention.local_tokens = 1;
  request->attention.sink_tokens = 0;
  request->attention.rectify_interval = 256;
  auto sink = Submit(std::move(request));
  RunDry();
  ASSERT_THAT(sink->finished, SizeIs(3));
  std::vector<int64_t> stalls(3);
  for (const Finished& finished : sink->finished) {
    EXPECT_EQ(finished.attention.rectifications, 1);
    stalls[finished.index] = finished.attention.stalled_steps;
  }
  EXPECT_THAT(stalls, ElementsAre(0, 0, 1));
  EXPECT_EQ(observer_.rectifications, 3);
  EXPECT_EQ(observer_.delay, 1);
}

// ---- preemption ----

TEST_F(EngineTest, PreemptedRequestGoesOnWhereItWas) {
  options_.num_pages = 6;
  options_.limits.pool_tokens = 6 * kPage;
  auto first = Submit(MakeRequest(30, 60));
  auto second = Submit(MakeRequest(30, 40));
  RunDry();
  EXPECT_THAT(first->Tokens(), SizeIs(60));
  EXPECT_EQ(first->finished[0].usage.preemptions, 0);
  ASSERT_THAT(second->finished, SizeIs(1));
  EXPECT_GE(second->finished[0].usage.preemptions, 1);
  std::vector<int32_t> expected;
  for (int32_t i = 0; i < 40; ++i) expected.push_back(100 + i);
  EXPECT_EQ(second->Tokens(), expected);
  EXPECT_GE(engine().Load().preemptions, 1);
}

TEST_F(EngineTest, OutputsThatHaveNotBegunAreOnlyANumber) {
  auto request = MakeRequest(400, 1);
  request->n = 64;
  options_.scheduler.max_step_tokens = 300;
  auto sink = Submit(std::move(request));
  Steps(1);
  EXPECT_THAT(engine().sequences(), SizeIs(1));
  Steps(1);
  EXPECT_THAT(engine().sequences(), SizeIs(63));
  RunDry();
  EXPECT_THAT(sink->finished, SizeIs(64));
}

// ---- load ----

TEST_F(EngineTest, LoadCountsWhatTheEngineHasNotReadYet) {
  Submit(MakeRequest(20, 1));
  EXPECT_EQ(engine().Load().waiting, 1);
  EXPECT_EQ(engine().Load().running, 0);
  Submit(MakeRequest(20, 1));
  Steps(1);
  EXPECT_EQ(engine().Load().waiting, 0);
}

TEST_F(EngineTest, LoadIsToldBeforeAStepThatMayNeverEnd) {
  EngineLoad load;
  executor_.draw = [&](const kernels::SampleRow& row) {
    load = engine().Load();
    return ScriptedExecutor::CountUp(row);
  };
  Submit(MakeRequest(20, 1));
  Steps(1);
  EXPECT_EQ(load.running, 1);
  EXPECT_EQ(load.waiting, 0);
  EXPECT_EQ(load.pages_used, 2);
  EXPECT_EQ(load.steps, 0);
  EXPECT_EQ(engine().Load().steps, 1);
}

TEST_F(EngineTest, LoadTellsWhatIsThere) {
  EXPECT_EQ(engine().Load().pages_total, 64);
  for (int i = 0; i < 6; ++i) {
    if (i == 4) Steps(1);
    Submit(MakeRequest(20, 10));
  }
  Steps(1);
  const EngineLoad load = engine().Load();
  EXPECT_EQ(load.running, 4);
  EXPECT_EQ(load.waiting, 2);
  EXPECT_EQ(load.pages_used, 8);
  EXPECT_EQ(load.steps, 2);
  EXPECT_EQ(load.tokens_generated, 8);
  EXPECT_EQ(observer_.last.segments, 4);
  EXPECT_EQ(observer_.last.dense_decode_rows, 4);
  EXPECT_EQ(observer_.last.tokens_emitted, 4);
  RunDry();
  EXPECT_EQ(engine().Load().running, 0);
  EXPECT_EQ(engine().Load().pages_used, 0);
  EXPECT_EQ(engine().Load().tokens_generated, 60);
  EXPECT_EQ(observer_.first_tokens, 6);
  EXPECT_EQ(observer_.next_tokens, 54);
  EXPECT_EQ(observer_.finished, 6);
}

TEST_F(EngineTest, ARequestEndsOnceHoweverManyOutputsItHas) {
  auto request = MakeRequest(20, 10);
  request->n = 3;
  Submit(std::move(request));
  Steps(5);
  EXPECT_EQ(observer_.requests_finished, 0);
  RunDry();
  EXPECT_EQ(observer_.finished, 3);
  EXPECT_EQ(observer_.requests_finished, 1);
  request = MakeRequest(20, 10);
  request->n = 3;
  Submit(std::move(request));
  Steps(5);
  engine().Cancel(last_id_);
  RunDry();
  EXPECT_EQ(observer_.finished, 3);
  EXPECT_EQ(observer_.requests_finished, 1);
  EXPECT_EQ(observer_.errors, 1);
}

// ---- threads ----

// Clients on other threads against a running engine; for the thread sanitizer as much as for the
// counts.
TEST(EngineThreadsTest, ClientsSubmitAndCancelWhileItRuns) {
  constexpr int kClients = 4;
  constexpr int kEach = 50;
  EngineOptions options;
  options.num_pages = 64;
  options.limits = {.vocab_size = 1000, .max_context = 512, .pool_tokens = 64 * kPage};
  options.scheduler.max_sequences = 8;
  ScriptedExecutor executor;
  RealClock clock;
  Engine engine(options, nullptr, &executor, &clock, nullptr);
  std::thread loop([&engine] { engine.Run(); });

  std::vector<std::vector<std::shared_ptr<RecordingSink>>> sinks(kClients);
  std::vector<std::thread> clients;
  for (int client = 0; client < kClients; ++client) {
    clients.emplace_back([&engine, &mine = sinks[client]] {
      for (int i = 0; i < kEach; ++i) {
        auto request = std::make_unique<Request>();
        request->prompt = {1, 2, 3};
        request->stop.max_tokens = 20;
        mine.push_back(std::make_shared<RecordingSink>());
        request->sink = mine.back();
        const absl::StatusOr<RequestId> id = engine.Submit(std::move(request));
        ASSERT_TRUE(id.ok());
        if (i % 3 == 0) engine.Cancel(*id);
        EXPECT_GE(engine.Load().pages_total, 64);
      }
    });
  }
  for (std::thread& client : clients) client.join();
  engine.StartDraining();
  while (engine.Load().tokens_generated < 20 * kClients * (kEach - (kEach + 2) / 3) ||
         engine.Load().running + engine.Load().waiting > 0) {
    std::this_thread::yield();
  }
  engine.Stop();
  loop.join();
  for (const auto& mine : sinks) {
    for (const auto& sink : mine) {
      EXPECT_EQ(sink->accepted, 1);
      EXPECT_EQ(sink->finished.size() + sink->errors.size(), 1u);
    }
  }
}

}  // namespace
}  // namespace resa::engine
