// A token on its way into a stream allocates nothing once the stream is warm: written messages are
// filled again. This binary counts every operator new.

#include <cstdint>

#include "gtest/gtest.h"
#include "server/stream_writer.h"
#include "tests/support/count_allocations.h"

namespace resa::server {
namespace {

class IdleTransport final : public StreamTransport {
 public:
  void StartWrite(const resa::v1::GenerateResponse& response) override {
    bytes += response.ByteSizeLong();
  }
  void Finish(const absl::Status&) override {}
  void StartGrace() override {}
  void Abandon() override {}

  size_t bytes = 0;
};

// Tokens of `text`, `merged` of them in one message, as a reader that slow gets them.
int64_t AllocationsOfTokens(const std::string& text, int merged) {
  IdleTransport transport;
  StreamWriter writer({.token_ids = true}, &transport);
  writer.OnAccepted(1, 0);
  writer.OnWriteDone(true);
  engine::Delta delta;
  delta.text = text;
  delta.token_ids = {7};
  const auto run = [&](int messages) {
    for (int i = 0; i < messages; ++i) {
      for (int token = 0; token < merged; ++token) EXPECT_TRUE(writer.OnDelta(delta));
      writer.OnWriteDone(true);
    }
  };
  run(10);
  const int64_t before = resa::testing::CountAllocations();
  EXPECT_GT(before, 0) << "nothing is counted";
  const size_t bytes_before = transport.bytes;
  run(1000);
  EXPECT_GT(transport.bytes, bytes_before + 1000 * text.size());
  return resa::testing::CountAllocations() - before;
}

TEST(StreamWriterAllocationTest, WrittenMessagesAreFilledAgain) {
  EXPECT_EQ(AllocationsOfTokens(" word", 1), 0);
  EXPECT_EQ(AllocationsOfTokens("a token of more bytes than a short string holds", 1), 0);
  EXPECT_EQ(AllocationsOfTokens(" word", 3), 0);
}

// What a slow reader made large does not stay so: bigger messages than these are not kept.
TEST(StreamWriterAllocationTest, LargeMessagesAreNotKept) {
  EXPECT_GT(AllocationsOfTokens(std::string(5000, 'x'), 1), 1000);
}

}  // namespace
}  // namespace resa::server
