#include "server/stream_writer.h"

#include <thread>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace resa::server {
namespace {

using ::resa::v1::GenerateResponse;
using ::testing::ElementsAre;

// Remembers what was written; the test says when a write is over.
class FakeTransport final : public StreamTransport {
 public:
  void StartWrite(const GenerateResponse& response) override {
    EXPECT_FALSE(writing) << "two writes at a time";
    EXPECT_FALSE(status.has_value()) << "a write after the end";
    writing = true;
    written.push_back(response);
  }
  void Finish(const absl::Status& end) override {
    EXPECT_FALSE(status.has_value()) << "ended twice";
    status = end;
  }
  void StartGrace() override { ++graces; }
  void Abandon() override {
    EXPECT_FALSE(status.has_value()) << "abandoned after the end";
    ++abandoned;
  }

  bool writing = false;
  int graces = 0;
  int abandoned = 0;
  std::vector<GenerateResponse> written;
  std::optional<absl::Status> status;
};

engine::Delta TextDelta(std::string text, int32_t index = 0) {
  engine::Delta delta;
  delta.index = index;
  delta.text = std::move(text);
  return delta;
}

engine::Finished FinishedOutput(int32_t index = 0) {
  engine::Finished finished;
  finished.index = index;
  return finished;
}

class StreamWriterTest : public testing::Test {
 protected:
  void Start(StreamWriter::Options options = {}) {
    writer_ = std::make_unique<StreamWriter>(std::move(options), &transport_);
  }
  void WriteDone(bool ok = true) {
    ASSERT_TRUE(transport_.writing);
    transport_.writing = false;
    writer_->OnWriteDone(ok);
  }
  // Lets every write succeed until nothing is outstanding.
  void Flush() {
    while (transport_.writing) WriteDone();
  }
  const GenerateResponse& last() { return transport_.written.back(); }

  FakeTransport transport_;
  std::unique_ptr<StreamWriter> writer_;
};

TEST_F(StreamWriterTest, WritesEachMessageAtOnceToAFastReader) {
  Start({.request_id = "r", .seed = 7});
  writer_->OnAccepted(10, 4);
  EXPECT_EQ(last().accepted().request_id(), "r");
  EXPECT_EQ(last().accepted().seed(), 7u);
  EXPECT_EQ(last().accepted().prompt_tokens(), 10);
  EXPECT_EQ(last().accepted().cached_tokens(), 4);
  WriteDone();
  EXPECT_TRUE(writer_->OnDelta(TextDelta("a")));
  EXPECT_EQ(last().delta().text(), "a");
  WriteDone();
  EXPECT_TRUE(writer_->OnDelta(TextDelta("b")));
  EXPECT_EQ(last().delta().text(), "b");
  WriteDone();
  writer_->OnFinished(FinishedOutput());
  EXPECT_TRUE(last().has_finished());
  EXPECT_EQ(transport_.status, std::nullopt);
  WriteDone();
  EXPECT_EQ(transport_.status, absl::OkStatus());
  EXPECT_EQ(transport_.written.size(), 4u);
}

TEST_F(StreamWriterTest, DeltasJoinWhileAWriteIsOutstanding) {
  Start({.token_ids = true, .logprobs = true});
  writer_->OnAccepted(1, 0);
  for (int i = 0; i < 5; ++i) {
    engine::Delta delta = TextDelta(std::string(1, static_cast<char>('a' + i)));
    delta.token_ids = {100 + i};
    delta.logprobs = {{-0.5f, {{1, -0.1f}}}};
    EXPECT_TRUE(writer_->OnDelta(delta));
  }
  EXPECT_EQ(transport_.written.size(), 1u);
  WriteDone();
  ASSERT_EQ(transport_.written.size(), 2u);
  EXPECT_EQ(last().delta().text(), "abcde");
  EXPECT_THAT(last().delta().token_ids(), ElementsAre(100, 101, 102, 103, 104));
  ASSERT_EQ(last().delta().logprobs_size(), 5);
  EXPECT_EQ(last().delta().logprobs(4).token_id(), 104);
  EXPECT_EQ(last().delta().logprobs(4).top(0).token_id(), 1);
}

TEST_F(StreamWriterTest, OutputsJoinSeparatelyAndEndInOrder) {
  Start({.outputs = 2});
  writer_->OnAccepted(1, 0);
  writer_->OnDelta(TextDelta("a0", 0));
  writer_->OnDelta(TextDelta("b0", 1));
  writer_->OnDelta(TextDelta("a1", 0));
  writer_->OnFinished(FinishedOutput(0));
  writer_->OnDelta(TextDelta("b1", 1));
  writer_->OnFinished(FinishedOutput(1));
  Flush();
  ASSERT_EQ(transport_.written.size(), 5u);
  EXPECT_EQ(transport_.written[1].delta().text(), "a0a1");
  EXPECT_EQ(transport_.written[2].delta().text(), "b0b1");
  EXPECT_EQ(transport_.written[3].finished().index(), 0);
  EXPECT_EQ(transport_.written[4].finished().index(), 1);
  EXPECT_EQ(transport_.status, absl::OkStatus());
}

TEST_F(StreamWriterTest, ShowsOnlyWhatWasAskedFor) {
  Start();
  engine::Delta delta = TextDelta("x");
  delta.token_ids = {1};
  delta.logprobs = {{-1.0f, {}}};
  writer_->OnDelta(delta);
  EXPECT_EQ(last().delta().token_ids_size(), 0);
  EXPECT_EQ(last().delta().logprobs_size(), 0);
  WriteDone();
  // Nothing to show at all: no message.
  delta.text = "";
  writer_->OnDelta(delta);
  EXPECT_FALSE(transport_.writing);
}

TEST_F(StreamWriterTest, EchoedPromptHasIdsButNoLogprobs) {
  Start({.token_ids = true, .logprobs = true});
  engine::Delta echo = TextDelta("prompt");
  echo.token_ids = {1, 2, 3};
  writer_->OnDelta(echo);
  EXPECT_EQ(last().delta().token_ids_size(), 3);
  EXPECT_EQ(last().delta().logprobs_size(), 0);
}

TEST_F(StreamWriterTest, AReaderThatFallsBehindTheBoundIsRefused) {
  Start({.max_waiting_bytes = 1000});
  writer_->OnAccepted(1, 0);
  int taken = 0;
  while (taken < 100 && writer_->OnDelta(TextDelta(std::string(100, 'x')))) ++taken;
  EXPECT_EQ(taken, 11);  // 1000 bytes may wait, and the one that crosses them.
  writer_->OnError(absl::ResourceExhaustedError("too slow"));
  EXPECT_EQ(transport_.status, std::nullopt);  // A write is outstanding.
  WriteDone();
  EXPECT_TRUE(absl::IsResourceExhausted(*transport_.status));
  EXPECT_EQ(transport_.written.size(), 1u);  // What waited was dropped.
  // It read on in time.
  EXPECT_EQ(transport_.graces, 1);
  writer_->OnGraceOver();
  EXPECT_EQ(transport_.abandoned, 0);
}

TEST_F(StreamWriterTest, AnEchoIsNoReadersFault) {
  Start({.outputs = 2, .max_waiting_bytes = 1000});
  writer_->OnAccepted(1, 0);
  for (int index = 0; index < 2; ++index) {
    engine::Delta echo = TextDelta(std::string(5000, 'p'), index);
    echo.is_prompt = true;
    EXPECT_TRUE(writer_->OnDelta(echo));
  }
  int taken = 0;
  while (taken < 100 && writer_->OnDelta(TextDelta(std::string(100, 'x')))) ++taken;
  EXPECT_EQ(taken, 11);
}

TEST_F(StreamWriterTest, ARefusedReaderThatDoesNotReadOnLosesItsStream) {
  Start({.max_waiting_bytes = 1000});
  writer_->OnAccepted(1, 0);
  while (writer_->OnDelta(TextDelta(std::string(100, 'x')))) {
    EXPECT_EQ(transport_.graces, 0);
  }
  EXPECT_EQ(transport_.graces, 1);
  writer_->OnError(absl::ResourceExhaustedError("too slow"));
  writer_->OnGraceOver();
  EXPECT_EQ(transport_.abandoned, 1);
  EXPECT_EQ(transport_.status, std::nullopt);
  WriteDone(/*ok=*/false);
  EXPECT_TRUE(absl::IsResourceExhausted(*transport_.status));
}

TEST_F(StreamWriterTest, WhatIsReadMakesRoom) {
  Start({.max_waiting_bytes = 1000});
  writer_->OnAccepted(1, 0);
  for (int i = 0; i < 100; ++i) {
    ASSERT_TRUE(writer_->OnDelta(TextDelta(std::string(100, 'x')))) << i;
    WriteDone();
  }
}

TEST_F(StreamWriterTest, GiantDeltasAreCutAtCodePoints) {
  Start({.token_ids = true, .max_message_bytes = 1000});
  std::string text;
  for (int i = 0; i < 2000; ++i) text += "€";
  engine::Delta echo = TextDelta(text);
  for (int i = 0; i < 700; ++i) echo.token_ids.push_back(i);
  ASSERT_TRUE(writer_->OnDelta(echo));
  Flush();
  EXPECT_GT(transport_.written.size(), 4u);
  std::string joined;
  std::vector<int32_t> ids;
  for (const GenerateResponse& response : transport_.written) {
    EXPECT_LE(response.ByteSizeLong(), 1100u);
    EXPECT_EQ(response.delta().text().size() % 3, 0u);
    joined += response.delta().text();
    ids.insert(ids.end(), response.delta().token_ids().begin(), response.delta().token_ids().end());
  }
  EXPECT_EQ(joined, text);
  EXPECT_EQ(ids, echo.token_ids);
}

TEST_F(StreamWriterTest, MessagesThatWaitStayBelowTheirLimit) {
  Start({.max_message_bytes = 1000});
  writer_->OnAccepted(1, 0);
  std::string text;
  for (int i = 0; i < 50; ++i) {
    text += std::string(90, static_cast<char>('a' + i % 26));
    ASSERT_TRUE(writer_->OnDelta(TextDelta(text.substr(text.size() - 90))));
  }
  Flush();
  std::string joined;
  for (const GenerateResponse& response : transport_.written) {
    EXPECT_LE(response.delta().text().size(), 1000u);
    joined += response.delta().text();
  }
  EXPECT_EQ(joined, text);
}

TEST_F(StreamWriterTest, AnErrorFollowsWhatWasGenerated) {
  Start();
  writer_->OnAccepted(1, 0);
  writer_->OnDelta(TextDelta("so far"));
  writer_->OnError(absl::UnavailableError("draining"));
  Flush();
  EXPECT_EQ(last().delta().text(), "so far");
  EXPECT_TRUE(absl::IsUnavailable(*transport_.status));
}

TEST_F(StreamWriterTest, AfterAFailedWriteNothingIsWrittenAndTheEngineEndsIt) {
  Start();
  writer_->OnAccepted(1, 0);
  writer_->OnDelta(TextDelta("a"));
  WriteDone(/*ok=*/false);
  EXPECT_TRUE(writer_->OnDelta(TextDelta("b")));
  EXPECT_EQ(transport_.written.size(), 1u);
  EXPECT_EQ(transport_.status, std::nullopt);
  writer_->OnError(absl::CancelledError("gone"));
  EXPECT_TRUE(absl::IsCancelled(*transport_.status));
}

TEST_F(StreamWriterTest, FinishedCarriesEverything) {
  Start();
  engine::Finished finished;
  finished.reason = engine::FinishReason::kStop;
  finished.matched_stop = "END";
  finished.usage = {10, 20, 3, 1};
  finished.timings.total = absl::Milliseconds(1500);
  finished.attention = {100, 7, 3, 96, 50, 200, 2};
  writer_->OnFinished(finished);
  const resa::v1::Finished& out = last().finished();
  EXPECT_EQ(out.reason(), resa::v1::FINISH_REASON_STOP);
  EXPECT_EQ(out.matched_stop_string(), "END");
  EXPECT_EQ(out.usage().prompt_tokens(), 10);
  EXPECT_EQ(out.usage().output_tokens(), 20);
  EXPECT_EQ(out.usage().cached_tokens(), 3);
  EXPECT_EQ(out.usage().preemptions(), 1);
  EXPECT_EQ(out.timings().total().seconds(), 1);
  EXPECT_EQ(out.timings().total().nanos(), 500'000'000);
  EXPECT_EQ(out.attention().sparse_steps(), 100);
  EXPECT_EQ(out.attention().dense_steps(), 7);
  EXPECT_EQ(out.attention().rectifications(), 3);
  EXPECT_EQ(out.attention().rectified_tokens(), 96);
  EXPECT_EQ(out.attention().kept_block_ratio(), 0.25);
  EXPECT_EQ(out.attention().stalled_steps(), 2);
}

TEST_F(StreamWriterTest, MatchedTokenAndLengthAreTold) {
  Start({.outputs = 2});
  engine::Finished finished = FinishedOutput(0);
  finished.matched_stop_token = 0;
  writer_->OnFinished(finished);
  EXPECT_EQ(last().finished().matched_stop_case(), resa::v1::Finished::kMatchedStopTokenId);
  finished = FinishedOutput(1);
  finished.reason = engine::FinishReason::kLength;
  WriteDone();
  writer_->OnFinished(finished);
  EXPECT_EQ(last().finished().reason(), resa::v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(last().finished().matched_stop_case(), resa::v1::Finished::MATCHED_STOP_NOT_SET);
}

TEST_F(StreamWriterTest, TheSummaryTellsWhatHappenedHoweverItEnds) {
  Start({.arrival = absl::Now() - absl::Seconds(5)});
  writer_->OnAccepted(3, 0);
  engine::Delta echo = TextDelta("the prompt");
  echo.is_prompt = true;
  echo.token_ids = {1, 2, 3};
  writer_->OnDelta(echo);
  EXPECT_EQ(writer_->Summary().first_token, std::nullopt);
  for (int i = 0; i < 7; ++i) {
    engine::Delta delta = TextDelta("x");
    delta.token_ids = {i};
    writer_->OnDelta(delta);
    if (i < 3) WriteDone();
    if (i == 3) WriteDone(/*ok=*/false);
  }
  writer_->OnError(absl::CancelledError("gone"));
  const StreamSummary summary = writer_->Summary();
  EXPECT_EQ(summary.prompt_tokens, 3);
  EXPECT_EQ(summary.output_tokens, 7);  // Whether or not they could still be written.
  EXPECT_EQ(summary.messages, 3);
  ASSERT_NE(summary.first_token, std::nullopt);
  EXPECT_GE(*summary.first_token, absl::Seconds(5));
  EXPECT_LT(*summary.first_token, absl::Seconds(65));
}

TEST_F(StreamWriterTest, TextIsKeptForTheLogOnlyWhenAsked) {
  Start({.keep_text = true});
  writer_->OnDelta(TextDelta("a"));
  writer_->OnDelta(TextDelta("b"));
  EXPECT_THAT(writer_->Summary().texts, ElementsAre("ab"));
}

// A writer thread that is never in step with the sink: nothing lost, nothing twice, order kept.
TEST(StreamWriterThreadsTest, KeepsEveryByteBetweenTwoThreads) {
  class ThreadedTransport final : public StreamTransport {
   public:
    void StartWrite(const GenerateResponse& response) override {
      absl::MutexLock lock(&mutex);
      ASSERT_FALSE(outstanding);
      outstanding = true;
      text += response.delta().text();
      ++messages;
    }
    void Finish(const absl::Status&) override {
      absl::MutexLock lock(&mutex);
      finished = true;
    }
    void StartGrace() override { FAIL() << "the reader keeps up"; }
    void Abandon() override { FAIL() << "the reader keeps up"; }
    absl::Mutex mutex;
    bool outstanding = false;
    bool finished = false;
    std::string text;
    int messages = 0;
  } transport;
  StreamWriter writer({}, &transport);
  std::thread reader([&] {
    for (bool finished = false; !finished;) {
      bool done = false;
      {
        absl::MutexLock lock(&transport.mutex);
        std::swap(done, transport.outstanding);
        finished = transport.finished;
      }
      if (done) writer.OnWriteDone(true);
      std::this_thread::yield();
    }
  });
  std::string sent;
  for (int i = 0; i < 20000; ++i) {
    sent += std::to_string(i);
    ASSERT_TRUE(writer.OnDelta(TextDelta(std::to_string(i))));
  }
  writer.OnFinished(FinishedOutput());
  reader.join();
  EXPECT_EQ(transport.text, sent);
  EXPECT_GT(transport.messages, 1);
}

}  // namespace
}  // namespace resa::server
