#include "tests/support/http_client.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>

namespace resa::testing {

OpenConnection::OpenConnection(int port, const std::string& sent) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  if (fd < 0) return;
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0 &&
      send(fd, sent.data(), sent.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(sent.size())) {
    fd_ = fd;
  } else {
    close(fd);
  }
}

OpenConnection::~OpenConnection() {
  if (ok()) close(fd_);
}

std::string OpenConnection::Read() {
  std::string response;
  char buffer[4096];
  for (ssize_t got; ok() && (got = recv(fd_, buffer, sizeof(buffer), 0)) > 0;) {
    response.append(buffer, static_cast<size_t>(got));
  }
  return response;
}

std::string HttpRequest(int port, const std::string& method, const std::string& path) {
  return OpenConnection(port, method + " " + path +
                                  " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
      .Read();
}

}  // namespace resa::testing
