#include "server/http_server.h"

#include <arpa/inet.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "civetweb.h"
#include "engine/invalid.h"
#include "engine/status_macros.h"
#include "server/listen_address.h"

namespace resa::server {

struct HttpServer::Listener {
  std::map<std::string, Handler> handlers;
  std::string host;
  mg_context* context = nullptr;

  ~Listener() {
    if (context != nullptr) Stop();
  }
  void Stop();
};

namespace {

int PortOf(mg_context* context) {
  mg_server_port ports[1] = {};
  return mg_get_server_ports(context, 1, ports) == 1 ? ports[0].port : 0;
}

void Send(mg_connection* connection, const HttpResponse& response, bool with_body) {
  mg_printf(connection,
            "HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\n"
            "Connection: close\r\n\r\n",
            response.status, mg_get_response_code_text(connection, response.status),
            response.content_type.c_str(), response.body.size());
  if (with_body) mg_write(connection, response.body.data(), response.body.size());
}

// Every request comes here: civetweb's own handling of files is never reached.
int OnRequest(mg_connection* connection) {
  const mg_request_info* info = mg_get_request_info(connection);
  const auto* handlers =
      static_cast<const std::map<std::string, HttpServer::Handler>*>(info->user_data);
  const absl::string_view method = info->request_method;
  const auto handler = handlers->find(info->local_uri != nullptr ? info->local_uri : "");
  HttpResponse response;
  if (handler == handlers->end()) {
    response.status = 404;
    response.body = "no such path; there are:\n";
    for (const auto& [path, unused] : *handlers) absl::StrAppend(&response.body, path, "\n");
  } else if (method != "GET" && method != "HEAD") {
    response.status = 405;
    response.body = "only GET and HEAD\n";
  } else {
    response = handler->second();
  }
  Send(connection, response, method != "HEAD");
  return response.status;
}

// What civetweb says while it starts, on the thread that starts it. Otherwise it would write to the
// terminal; what matters comes back as a status.
thread_local std::string* start_messages = nullptr;
int OnLogMessage(const mg_connection* /*connection*/, const char* message) {
  if (start_messages != nullptr) absl::StrAppend(start_messages, ": ", message);
  return 1;
}

// civetweb takes addresses, not names.
std::string WithoutName(const std::string& address) {
  absl::string_view port = address;
  return absl::ConsumePrefix(&port, "localhost:") ? absl::StrCat("127.0.0.1:", port) : address;
}

}  // namespace

absl::Status HttpServer::CheckAddress(const std::string& address) {
  const std::string host = HostOf(WithoutName(address));
  in6_addr ignored = {};
  if (inet_pton(AF_INET, host.c_str(), &ignored) == 1) return absl::OkStatus();
  if (inet_pton(AF_INET6, host.c_str(), &ignored) == 1) return absl::OkStatus();
  return engine::Invalid("--http-listen: '", host, "' is neither an IP address nor localhost");
}

// civetweb sees the wish to stop only when its wait for connections ends, which takes up to two
// seconds on its own. So somebody connects.
void HttpServer::Listener::Stop() {
  const int port = PortOf(context);
  std::atomic<bool> stopped = false;
  std::thread visitor([&] {
    while (!stopped) {
      char error[100];
      mg_close_connection(mg_connect_client(host.c_str(), port, 0, error, sizeof(error)));
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  });
  mg_stop(context);
  stopped = true;
  visitor.join();
}

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(
    const std::string& address, std::map<std::string, Handler> handlers) {
  auto listener = std::make_unique<Listener>();
  listener->handlers = std::move(handlers);

  RESA_RETURN_IF_ERROR(CheckAddress(address));
  const std::string port = WithoutName(address);
  listener->host = HostOf(port);
  // A connection that sends half a request holds a thread until its time is up. So there are more
  // threads than monitors, and little time.
  const char* options[] = {
      "listening_ports",          port.c_str(), "num_threads", "8", "request_timeout_ms", "2000",
      "enable_directory_listing", "no",         nullptr};
  mg_callbacks callbacks = {};
  callbacks.begin_request = &OnRequest;
  callbacks.log_message = &OnLogMessage;
  static const unsigned initialised = mg_init_library(MG_FEATURES_DEFAULT);
  (void)initialised;
  std::string why;
  start_messages = &why;
  listener->context = mg_start(&callbacks, &listener->handlers, options);
  start_messages = nullptr;
  if (listener->context == nullptr) {
    return absl::UnavailableError(absl::StrCat("cannot listen for HTTP on ", address, why,
                                               "; is the port taken? (--http-listen)"));
  }
  const int real_port = PortOf(listener->context);
  if (real_port == 0) {
    return absl::UnavailableError(absl::StrCat("cannot listen for HTTP on ", address));
  }
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(listener), real_port));
}

HttpServer::HttpServer(std::unique_ptr<Listener> listener, int port)
    : listener_(std::move(listener)), port_(port) {}

HttpServer::~HttpServer() = default;

}  // namespace resa::server
