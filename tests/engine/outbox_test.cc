#include "engine/outbox.h"

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace resa::engine {
namespace {

using ::testing::ElementsAre;

// Writes what it is told behind its name.
class Reader final : public OutputSink {
 public:
  Reader(std::string name, std::vector<std::string>* told, int takes = 100)
      : name_(std::move(name)), told_(*told), takes_(takes) {}

  void OnAccepted(int32_t, int32_t) override {}
  bool OnDelta(const Delta& delta) override {
    told_.push_back(absl::StrCat(name_, " ", delta.token_ids[0], delta.text));
    return --takes_ >= 0;
  }
  void OnFinished(Finished finished) override {
    told_.push_back(absl::StrCat(name_, " end ", finished.index));
  }
  void OnError(const absl::Status& status) override {
    told_.push_back(absl::StrCat(name_, " error ", status.message()));
  }

 private:
  const std::string name_;
  std::vector<std::string>& told_;
  int takes_;
};

class OutboxTest : public ::testing::Test {
 protected:
  void Add(RequestId id, const std::shared_ptr<OutputSink>& sink, int32_t token) {
    outbox_.AddDelta(id, sink).token_ids.assign(1, token);
  }
  void Deliver() {
    outbox_.Deliver([this](RequestId id, const absl::Status& status) {
      ended_.push_back(id);
      if (live_ != nullptr) outbox_.AddError(id, live_, status);
    });
  }

  static constexpr RequestId kA{1};
  static constexpr RequestId kB{2};
  std::vector<std::string> told_;
  std::vector<RequestId> ended_;
  std::shared_ptr<OutputSink> live_;  // Whom the end of a request is told.
  Outbox outbox_;
};

TEST_F(OutboxTest, TellsInOrderWhenAsked) {
  const auto a = std::make_shared<Reader>("a", &told_);
  const auto b = std::make_shared<Reader>("b", &told_);
  Add(kA, a, 1);
  Add(kB, b, 2);
  Finished finished;
  finished.index = 3;
  outbox_.AddFinished(kA, a, finished);
  EXPECT_THAT(told_, ElementsAre());
  Deliver();
  EXPECT_THAT(told_, ElementsAre("a 1", "b 2", "a end 3"));
}

TEST_F(OutboxTest, ReusedDeltasAreEmpty) {
  const auto a = std::make_shared<Reader>("a", &told_);
  Delta& first = outbox_.AddDelta(kA, a);
  first.token_ids = {1};
  first.text = "text";
  outbox_.AddError(kA, a, absl::CancelledError("gone"));
  Deliver();
  EXPECT_THAT(told_, ElementsAre("a 1text", "a error gone"));
  Add(kA, a, 2);
  Deliver();
  Deliver();
  EXPECT_THAT(told_, ElementsAre("a 1text", "a error gone", "a 2"));
  EXPECT_EQ(a.use_count(), 1) << "a sink is kept";
}

TEST_F(OutboxTest, WhoRefusesGetsTheErrorThatIsAddedAndNothingElse) {
  const auto a = std::make_shared<Reader>("a", &told_, /*takes=*/0);
  const auto b = std::make_shared<Reader>("b", &told_);
  live_ = a;
  Add(kA, a, 1);
  Add(kB, b, 2);
  Add(kA, a, 3);
  Deliver();
  EXPECT_THAT(ended_, ElementsAre(kA));
  EXPECT_THAT(told_, ElementsAre("a 1", "b 2",
                                 "a error the client reads too slowly; its output buffer is full"));
}

TEST_F(OutboxTest, WhoRefusesTheLastDeltaIsToldOfAnErrorInPlaceOfTheEnd) {
  const auto a = std::make_shared<Reader>("a", &told_, /*takes=*/0);
  Add(kA, a, 1);
  outbox_.AddFinished(kA, a, Finished{});
  Deliver();
  EXPECT_THAT(told_,
              ElementsAre("a 1", "a error the client reads too slowly; its output buffer is full"));
}

}  // namespace
}  // namespace resa::engine
