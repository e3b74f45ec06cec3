#ifndef RESA_TESTS_SUPPORT_HTTP_CLIENT_H_
#define RESA_TESTS_SUPPORT_HTTP_CLIENT_H_

#include <string>

namespace resa::testing {

// Sends one HTTP/1.1 request to 127.0.0.1:port and returns all that comes back, headers included,
// until the server closes. Empty when nobody listens.
std::string HttpRequest(int port, const std::string& method, const std::string& path);

// A connection to 127.0.0.1:port that has sent these bytes and waits.
class OpenConnection {
 public:
  OpenConnection(int port, const std::string& sent);
  OpenConnection(const OpenConnection&) = delete;
  OpenConnection& operator=(const OpenConnection&) = delete;
  ~OpenConnection();

  // False when nobody listens.
  bool ok() const { return fd_ >= 0; }
  // All that comes until the server closes.
  std::string Read();

 private:
  int fd_ = -1;
};

}  // namespace resa::testing

#endif  // RESA_TESTS_SUPPORT_HTTP_CLIENT_H_
