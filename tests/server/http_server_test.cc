#include "server/http_server.h"

#include <memory>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/http_client.h"

#ifdef __SANITIZE_THREAD__
// civetweb writes dates with gmtime(), whose one buffer its threads share: at worst a Date header
// is wrong. Two connections that time out together show it.
extern "C" const char* __tsan_default_suppressions() { return "called_from_lib:libcivetweb.so\n"; }
#endif

namespace resa::server {
namespace {

using ::resa::testing::HttpRequest;
using ::resa::testing::OpenConnection;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::StartsWith;

std::unique_ptr<HttpServer> StartServer() {
  auto server = HttpServer::Start(
      "127.0.0.1:0", {{"/hello", [] { return HttpResponse{.body = "hello\n"}; }},
                      {"/sick", [] { return HttpResponse{.status = 503, .body = "sick\n"}; }}});
  EXPECT_TRUE(server.ok()) << server.status();
  return *std::move(server);
}

TEST(HttpServerTest, ServesItsPathsOnAFreePort) {
  const auto server = StartServer();
  ASSERT_GT(server->port(), 0);
  const std::string response = HttpRequest(server->port(), "GET", "/hello");
  EXPECT_THAT(response, StartsWith("HTTP/1.1 200 OK\r\n"));
  EXPECT_THAT(response, HasSubstr("Content-Type: text/plain; charset=utf-8\r\n"));
  EXPECT_THAT(response, HasSubstr("Content-Length: 6\r\n"));
  EXPECT_THAT(response, EndsWith("\r\n\r\nhello\n"));
}

TEST(HttpServerTest, TakesQueriesAndHead) {
  const auto server = StartServer();
  EXPECT_THAT(HttpRequest(server->port(), "GET", "/hello?x=1"), EndsWith("hello\n"));
  const std::string head = HttpRequest(server->port(), "HEAD", "/hello");
  EXPECT_THAT(head, HasSubstr("Content-Length: 6\r\n"));
  EXPECT_THAT(head, EndsWith("\r\n\r\n"));
}

TEST(HttpServerTest, PassesTheHandlersStatusOn) {
  const auto server = StartServer();
  EXPECT_THAT(HttpRequest(server->port(), "GET", "/sick"), StartsWith("HTTP/1.1 503 "));
}

TEST(HttpServerTest, RefusesOtherPathsAndMethods) {
  const auto server = StartServer();
  const std::string missing = HttpRequest(server->port(), "GET", "/hello/..");
  EXPECT_THAT(missing, StartsWith("HTTP/1.1 404 "));
  EXPECT_THAT(missing, HasSubstr("/hello\n/sick\n"));
  EXPECT_THAT(HttpRequest(server->port(), "GET", "/etc/passwd"), StartsWith("HTTP/1.1 404 "));
  EXPECT_THAT(HttpRequest(server->port(), "POST", "/hello"), StartsWith("HTTP/1.1 405 "));
}

TEST(HttpServerTest, HalfRequestsSilenceNobodyAndAreClosed) {
  const auto server = StartServer();
  const absl::Time start = absl::Now();
  std::vector<std::unique_ptr<OpenConnection>> half_open;
  for (int i = 0; i < 4; ++i) {
    half_open.push_back(
        std::make_unique<OpenConnection>(server->port(), "GET /hello HTTP/1.1\r\n"));
    ASSERT_TRUE(half_open.back()->ok());
  }
  EXPECT_THAT(HttpRequest(server->port(), "GET", "/hello"), EndsWith("hello\n"));
  EXPECT_LT(absl::Now() - start, absl::Seconds(1));
  for (const auto& connection : half_open) {
    EXPECT_THAT(connection->Read(), ::testing::Not(EndsWith("hello\n")));
  }
  EXPECT_LT(absl::Now() - start, absl::Seconds(6));
}

TEST(HttpServerTest, ATakenPortIsAnError) {
  const auto server = StartServer();
  const std::string address = "127.0.0.1:" + std::to_string(server->port());
  const auto second = HttpServer::Start(address, {});
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(address));
}

TEST(HttpServerTest, LocalhostIsAName) {
  EXPECT_TRUE(HttpServer::Start("localhost:0", {}).ok());
  for (const char* name : {"no.such.host:0", "example.com:80", "[::g]:80", "256.1.1.1:80"}) {
    EXPECT_EQ(HttpServer::Start(name, {}).status().code(), absl::StatusCode::kInvalidArgument);
  }
  for (const char* good : {"localhost:1", "0.0.0.0:80", "[::1]:80", "[::]:0"}) {
    EXPECT_TRUE(HttpServer::CheckAddress(good).ok()) << good;
  }
}

}  // namespace
}  // namespace resa::server
