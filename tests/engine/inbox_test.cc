#include "engine/inbox.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace resa::engine {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::unique_ptr<Request> RequestWithId(uint64_t id) {
  auto request = std::make_unique<Request>();
  request->id = RequestId{id};
  return request;
}

TEST(InboxTest, HandsEverythingOverInOrderOnce) {
  Inbox inbox(4);
  ASSERT_TRUE(inbox.Push(RequestWithId(1)).ok());
  ASSERT_TRUE(inbox.Push(RequestWithId(2)).ok());
  inbox.PushCancel(RequestId{2});
  inbox.PushAbortAll();

  Mail mail;
  inbox.Take(&mail);
  ASSERT_EQ(mail.requests.size(), 2u);
  EXPECT_EQ(mail.requests[0]->id.value, 1u);
  EXPECT_EQ(mail.requests[1]->id.value, 2u);
  EXPECT_THAT(mail.cancels, ElementsAre(RequestId{2}));
  EXPECT_TRUE(mail.abort_all);
  EXPECT_FALSE(mail.empty());
  inbox.Take(&mail);
  EXPECT_TRUE(mail.empty());
}

TEST(InboxTest, RefusesWhenFullUntilOneLeavesTheQueue) {
  Inbox inbox(2);
  ASSERT_TRUE(inbox.Push(RequestWithId(1)).ok());
  ASSERT_TRUE(inbox.Push(RequestWithId(2)).ok());
  const absl::Status full = inbox.Push(RequestWithId(3));
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(full.message(), HasSubstr("2 requests are waiting"));
  EXPECT_EQ(inbox.CheckRoom(), full);

  // Being taken is not leaving: the queue is what has not begun to run.
  Mail mail;
  inbox.Take(&mail);
  EXPECT_FALSE(inbox.Push(RequestWithId(3)).ok());
  inbox.OneLeftQueue();
  EXPECT_TRUE(inbox.CheckRoom().ok());
  EXPECT_TRUE(inbox.Push(RequestWithId(3)).ok());
  EXPECT_FALSE(inbox.Push(RequestWithId(4)).ok());
}

TEST(InboxTest, CancelsAndAbortsPassAFullQueue) {
  Inbox inbox(1);
  ASSERT_TRUE(inbox.Push(RequestWithId(1)).ok());
  inbox.PushCancel(RequestId{1});
  Mail mail;
  inbox.Take(&mail);
  EXPECT_EQ(mail.cancels.size(), 1u);
}

TEST(InboxTest, ClosedRefusesWhatIsNewAndKeepsWhatIsThere) {
  Inbox inbox(4);
  ASSERT_TRUE(inbox.Push(RequestWithId(1)).ok());
  EXPECT_FALSE(inbox.closed());
  inbox.Close();
  EXPECT_TRUE(inbox.closed());
  EXPECT_EQ(inbox.Push(RequestWithId(2)).code(), absl::StatusCode::kUnavailable);
  inbox.PushCancel(RequestId{1});
  Mail mail;
  inbox.Take(&mail);
  EXPECT_EQ(mail.requests.size(), 1u);
  EXPECT_EQ(mail.cancels.size(), 1u);
}

// Returns at once when something came since the last Take or Wait, whatever it was.
TEST(InboxTest, WaitReturnsForEveryKindOfMail) {
  Inbox inbox(4);
  const absl::Time start = absl::Now();
  ASSERT_TRUE(inbox.Push(RequestWithId(1)).ok());
  inbox.Wait(absl::Minutes(10));
  inbox.PushCancel(RequestId{1});
  inbox.Wait(absl::Minutes(10));
  inbox.PushAbortAll();
  inbox.Wait(absl::Minutes(10));
  inbox.Wake();
  inbox.Wait(absl::Minutes(10));
  EXPECT_LT(absl::Now() - start, absl::Minutes(1));
}

TEST(InboxTest, WaitEndsWithItsTimeout) {
  Inbox inbox(4);
  const absl::Time start = absl::Now();
  inbox.Wait(absl::Milliseconds(20));
  EXPECT_GE(absl::Now() - start, absl::Milliseconds(20));
}

TEST(InboxTest, WakeFromAnotherThreadEndsAWait) {
  Inbox inbox(4);
  std::thread waker([&inbox] {
    absl::SleepFor(absl::Milliseconds(20));
    inbox.Wake();
  });
  const absl::Time start = absl::Now();
  inbox.Wait(absl::Minutes(10));
  EXPECT_LT(absl::Now() - start, absl::Minutes(1));
  waker.join();
}

// Several producers against one engine: nothing is lost, nothing comes twice, the bound holds.
TEST(InboxTest, ManyProducersOneConsumer) {
  constexpr int32_t kMaxWaiting = 8;
  constexpr int kProducers = 4;
  constexpr uint64_t kEach = 500;
  Inbox inbox(kMaxWaiting);
  std::atomic<int> producing{kProducers};
  std::vector<std::thread> producers;
  for (uint64_t producer = 0; producer < kProducers; ++producer) {
    producers.emplace_back([&, producer] {
      for (uint64_t i = 0; i < kEach; ++i) {
        const uint64_t id = producer * kEach + i;
        while (!inbox.Push(RequestWithId(id)).ok()) std::this_thread::yield();
        inbox.PushCancel(RequestId{id});
      }
      --producing;
      inbox.Wake();
    });
  }
  std::vector<int> requests(kProducers * kEach);
  std::vector<int> cancels(kProducers * kEach);
  Mail mail;
  for (bool last = false; !last;) {
    last = producing == 0;
    inbox.Take(&mail);
    EXPECT_LE(mail.requests.size(), static_cast<size_t>(kMaxWaiting));
    for (const auto& request : mail.requests) {
      ++requests[request->id.value];
      inbox.OneLeftQueue();
    }
    for (RequestId id : mail.cancels) ++cancels[id.value];
  }
  for (std::thread& producer : producers) producer.join();
  EXPECT_THAT(requests, ::testing::Each(1));
  EXPECT_THAT(cancels, ::testing::Each(1));
}

using InboxDeathTest = ::testing::Test;

TEST(InboxDeathTest, MisuseEndsTheProcess) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  Inbox inbox(1);
  EXPECT_DEATH(inbox.OneLeftQueue(), "waiting_ > 0");
  EXPECT_DEATH(Inbox(0), "max_waiting > 0");
}

}  // namespace
}  // namespace resa::engine
