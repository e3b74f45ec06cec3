#ifndef RESA_SERVER_DAEMON_H_
#define RESA_SERVER_DAEMON_H_

// The whole server: listeners in front, the serving stack behind, and the order in which they come
// up and go down.
//
//   Create     both ports listen; health says NOT_SERVING, calls get UNAVAILABLE
//   Load       the model is read; then health says SERVING
//   Drain      health says NOT_SERVING, new calls get UNAVAILABLE, running streams finish or, when
//              their time is up, end with UNAVAILABLE

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/ops.h"
#include "server/config.h"
#include "server/health.h"
#include "server/metrics_exporter.h"
#include "server/serving_stack.h"
#include "spdlog/logger.h"

namespace resa::server {

// Methods are called by one thread.
class Daemon {
 public:
  // Whether the addresses are such as can be listened on, free or taken. INVALID_ARGUMENT, naming
  // the flag, when not. Warns of what everyone on the network could reach.
  static absl::Status CheckAddresses(const ListenOptions& listen, spdlog::logger* logger);
  // INVALID_ARGUMENT or UNAVAILABLE, naming the flag, when an address cannot be had.
  static absl::StatusOr<std::unique_ptr<Daemon>> Create(const Config& config,
                                                        std::shared_ptr<spdlog::logger> logger);
  // Drains without waiting, if Drain was not called.
  ~Daemon();

  absl::Status Load(std::unique_ptr<kernels::Ops> ops);
  // Blocks until every Generate call has ended, for listen.drain_timeout at most and a moment for
  // the last messages; calls that never end by themselves, such as Health.Watch, are not waited
  // for. The daemon serves no more afterwards.
  void Drain();

  int grpc_port() const;
  int http_port() const;  // 0 without an HTTP listener.
  Readiness readiness() const;
  // Null before Load.
  ServingStack* stack();

 private:
  struct Listeners;
  Daemon(const Config& config, std::shared_ptr<spdlog::logger> logger);

  absl::Status Listen();
  absl::Status WritePortFile() const;
  void Shutdown(absl::Duration timeout);
  // False when some Generate call is still live at the deadline.
  bool WaitForCalls(absl::Time deadline) const;

  const Config config_;
  const std::shared_ptr<spdlog::logger> logger_;
  // Destroyed from the bottom: calls end before the engine that they wait for, and that before what
  // it reports to.
  MetricsExporter metrics_;
  std::unique_ptr<ServingStack> stack_;
  std::unique_ptr<Listeners> listeners_;
};

}  // namespace resa::server

#endif  // RESA_SERVER_DAEMON_H_
