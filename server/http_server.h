#ifndef RESA_SERVER_HTTP_SERVER_H_
#define RESA_SERVER_HTTP_SERVER_H_

// A small HTTP listener for what monitors read: a few fixed paths, GET and HEAD only.

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace resa::server {

struct HttpResponse {
  int status = 200;
  std::string content_type = "text/plain; charset=utf-8";
  std::string body;
};

class HttpServer {
 public:
  // Called on the listener's threads, several at a time.
  using Handler = std::function<HttpResponse()>;

  // Listens on "host:port" (an IP address, "[::1]", or "localhost"; port 0 takes a free one) and
  // serves exactly these paths. UNAVAILABLE when the address cannot be had.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(const std::string& address,
                                                           std::map<std::string, Handler> handlers);
  // What Start cannot listen on whoever else does: INVALID_ARGUMENT.
  static absl::Status CheckAddress(const std::string& address);
  // Waits for requests in progress.
  ~HttpServer();

  int port() const { return port_; }

 private:
  struct Listener;
  HttpServer(std::unique_ptr<Listener> listener, int port);

  std::unique_ptr<Listener> listener_;
  const int port_;
};

}  // namespace resa::server

#endif  // RESA_SERVER_HTTP_SERVER_H_
