#include "server/rpc_status.h"

#include "gmock/gmock.h"
#include "google/rpc/error_details.pb.h"
#include "gtest/gtest.h"

namespace resa::server {
namespace {

TEST(RpcStatusTest, InvalidArgumentNamesTheField) {
  const google::rpc::Status rpc =
      ToRpcStatus(absl::InvalidArgumentError("stop.strings[3]: must not be empty: really"));
  EXPECT_EQ(rpc.code(), 3);
  EXPECT_EQ(rpc.message(), "stop.strings[3]: must not be empty: really");
  ASSERT_EQ(rpc.details_size(), 1);
  EXPECT_EQ(rpc.details(0).type_url(), "type.googleapis.com/google.rpc.BadRequest");
  google::rpc::BadRequest bad;
  ASSERT_TRUE(rpc.details(0).UnpackTo(&bad));
  ASSERT_EQ(bad.field_violations_size(), 1);
  EXPECT_EQ(bad.field_violations(0).field(), "stop.strings[3]");
  EXPECT_EQ(bad.field_violations(0).description(), "must not be empty: really");
}

TEST(RpcStatusTest, AMessageWithoutAFieldHasNoDetails) {
  for (const char* message : {"", "no field here", "The prompt: too long", "n:", ": x", "a b: c"}) {
    EXPECT_EQ(ToRpcStatus(absl::InvalidArgumentError(message)).details_size(), 0) << message;
  }
  EXPECT_EQ(ToRpcStatus(absl::InternalError("n: bad")).details_size(), 0);
}

TEST(RpcStatusTest, ARefusalForLoadSaysWhenToComeBack) {
  for (const absl::Status& status :
       {absl::ResourceExhaustedError("full"), absl::UnavailableError("draining")}) {
    const google::rpc::Status rpc = ToRefusal(status);
    ASSERT_EQ(rpc.details_size(), 1);
    google::rpc::RetryInfo retry;
    ASSERT_TRUE(rpc.details(0).UnpackTo(&retry));
    EXPECT_EQ(retry.retry_delay().seconds(), absl::ToInt64Seconds(kRetryDelay));
    // In the middle of a stream the same codes promise nothing.
    EXPECT_EQ(ToRpcStatus(status).details_size(), 0);
  }
}

TEST(RpcStatusTest, ARefusalOfSomethingWrongNamesTheFieldAndNoDelay) {
  const absl::Status wrong = absl::InvalidArgumentError("n: 0 is not from 1 to 64");
  EXPECT_EQ(ToRefusal(wrong).SerializeAsString(), ToRpcStatus(wrong).SerializeAsString());
}

TEST(RpcStatusTest, LongMessagesAreCutAtACodePoint) {
  std::string text = "request_id: ";
  while (text.size() < 5000) text += "ä";
  const google::rpc::Status rpc = ToRpcStatus(absl::InvalidArgumentError(text));
  EXPECT_LE(rpc.message().size(), kMaxMessageBytes + 3);
  EXPECT_TRUE(rpc.message().ends_with("ä..."));
  // Both copies of the message together stay far below the 8 KiB that clients take as metadata.
  EXPECT_LT(rpc.SerializeAsString().size(), 3000u);
}

TEST(RpcStatusTest, DurationsKeepTheirNanoseconds) {
  const google::protobuf::Duration duration =
      ToProtoDuration(absl::Seconds(3) + absl::Nanoseconds(5));
  EXPECT_EQ(duration.seconds(), 3);
  EXPECT_EQ(duration.nanos(), 5);
}

}  // namespace
}  // namespace resa::server
