#include "server/listen_address.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace resa::server {
namespace {

using ::testing::HasSubstr;

TEST(ListenAddressTest, TellsLoopbackFromTheNetwork) {
  for (const char* address : {"127.0.0.1:50051", "127.8.9.1:0", "[::1]:80", "localhost:80"}) {
    const auto reach = ResolveListenAddress(address);
    ASSERT_TRUE(reach.ok()) << address << ": " << reach.status();
    EXPECT_EQ(*reach, Reach::kLoopback) << address;
  }
  for (const char* address : {"0.0.0.0:50051", "[::]:0", "192.0.2.1:80", "[2001:db8::1]:80"}) {
    const auto reach = ResolveListenAddress(address);
    ASSERT_TRUE(reach.ok()) << address << ": " << reach.status();
    EXPECT_EQ(*reach, Reach::kNetwork) << address;
  }
}

TEST(ListenAddressTest, SaysWhatCannotBeResolved) {
  for (const char* address : {"no.such.host.invalid:80", "256.1.1.1:80", "[::g]:80"}) {
    const auto reach = ResolveListenAddress(address);
    EXPECT_EQ(reach.status().code(), absl::StatusCode::kInvalidArgument) << address;
    EXPECT_THAT(std::string(reach.status().message()), HasSubstr("cannot resolve '")) << address;
  }
}

}  // namespace
}  // namespace resa::server
