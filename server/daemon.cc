#include "server/daemon.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/status_macros.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/grpcpp.h"
#include "grpcpp/health_check_service_interface.h"
#include "server/generate_service.h"
#include "server/http_server.h"

namespace resa::server {
namespace {

// Prompts of a million tokens fit, as text or as ids.
constexpr int kMaxReceiveBytes = 32 << 20;
// Above what a StreamWriter puts into one message, and above what Tokenize makes of a prompt.
constexpr int kMaxSendBytes = 32 << 20;
// Clients may ping this often, with or without a call in progress.
constexpr int kMinPingInterval_ms = 10'000;
// The server pings a silent connection, and gives it up without an answer.
constexpr int kKeepaliveInterval_ms = 60'000;
constexpr int kKeepaliveTimeout_ms = 20'000;
// Connections end now and then, so that balancers of connections spread clients anew; calls in
// progress get a long time to finish.
constexpr int kMaxConnectionAge_ms = 30 * 60'000;
constexpr int kMaxConnectionAgeGrace_ms = 60 * 60'000;
// What the last messages of aborted streams get to leave.
constexpr absl::Duration kFlushTime = absl::Seconds(2);
constexpr absl::Duration kDrainPoll = absl::Milliseconds(10);

void SetChannelArguments(grpc::ServerBuilder* builder) {
  builder->SetMaxReceiveMessageSize(kMaxReceiveBytes);
  builder->SetMaxSendMessageSize(kMaxSendBytes);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                              kMinPingInterval_ms);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveInterval_ms);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeout_ms);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_MS, kMaxConnectionAge_ms);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS, kMaxConnectionAgeGrace_ms);
  // Two servers on one port would share its calls by chance.
  builder->AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
}

}  // namespace

struct Daemon::Listeners {
  Listeners(std::shared_ptr<spdlog::logger> logger, bool log_prompts)
      : service(std::move(logger), log_prompts) {}

  HttpResponse Metrics() const {
    ServingStack* stack = serving.load(std::memory_order_acquire);
    HttpResponse response;
    response.content_type = "text/plain; version=0.0.4; charset=utf-8";
    if (stack != nullptr) response.body = stack->metrics()->Render(stack->engine()->Load());
    return response;
  }
  HttpResponse Healthz() const {
    const Readiness readiness = health->state();
    HttpResponse response;
    response.status = readiness == Readiness::kServing ? 200 : 503;
    response.body = absl::StrCat(NameOf(readiness), "\n");
    return response;
  }

  GenerateService service;
  std::unique_ptr<grpc::Server> server;
  std::unique_ptr<HealthMonitor> health;
  std::atomic<ServingStack*> serving = nullptr;  // Set once, when it is loaded.
  std::unique_ptr<HttpServer> http;
  int grpc_port = 0;
  bool drained = false;
};

absl::StatusOr<std::unique_ptr<Daemon>> Daemon::Create(const Config& config,
                                                       std::shared_ptr<spdlog::logger> logger) {
  std::unique_ptr<Daemon> daemon(new Daemon(config, std::move(logger)));
  RESA_RETURN_IF_ERROR(daemon->Listen());
  return daemon;
}

Daemon::Daemon(const Config& config, std::shared_ptr<spdlog::logger> logger)
    : config_(config),
      logger_(std::move(logger)),
      listeners_(std::make_unique<Listeners>(logger_, config.log.prompts)) {}

Daemon::~Daemon() { Shutdown(absl::ZeroDuration()); }

absl::Status Daemon::Listen() {
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  SetChannelArguments(&builder);
  builder.AddListeningPort(config_.listen.grpc_address, grpc::InsecureServerCredentials(),
                           &listeners_->grpc_port);
  builder.RegisterService(&listeners_->service);
  listeners_->server = builder.BuildAndStart();
  if (listeners_->server == nullptr || listeners_->grpc_port == 0) {
    return absl::UnavailableError(absl::StrCat(
        "--listen: cannot listen on ", config_.listen.grpc_address, "; is the port taken?"));
  }
  // "" stays SERVING as long as the process lives; the service's name tells readiness.
  grpc::HealthCheckServiceInterface* const wire = listeners_->server->GetHealthCheckService();
  listeners_->health = std::make_unique<HealthMonitor>([this, wire](Readiness readiness) {
    wire->SetServingStatus(resa::v1::InferenceService::service_full_name(),
                           readiness == Readiness::kServing);
    logger_->info("readiness: {}", NameOf(readiness));
  });
  if (!config_.listen.http_address.empty()) {
    Listeners* const listeners = listeners_.get();
    RESA_ASSIGN_OR_RETURN(
        listeners_->http,
        HttpServer::Start(config_.listen.http_address,
                          {{"/metrics", [listeners] { return listeners->Metrics(); }},
                           {"/healthz", [listeners] { return listeners->Healthz(); }}}));
  }
  logger_->info("listening on {} (gRPC, port {}){}", config_.listen.grpc_address, grpc_port(),
                http_port() == 0 ? ""
                                 : absl::StrCat(" and ", config_.listen.http_address,
                                                " (HTTP, port ", http_port(), ")"));
  return WritePortFile();
}

absl::Status Daemon::WritePortFile() const {
  const std::string& path = config_.listen.port_file;
  if (path.empty()) return absl::OkStatus();
  // Renamed into place, so that who waits for the file finds it whole.
  const std::string temporary = path + ".tmp";
  std::ofstream file(temporary);
  file << grpc_port() << "\n" << http_port() << "\n";
  file.close();
  if (!file || std::rename(temporary.c_str(), path.c_str()) != 0) {
    return absl::PermissionDeniedError(absl::StrCat("--port-file: cannot write ", path));
  }
  return absl::OkStatus();
}

absl::Status Daemon::Load(std::unique_ptr<kernels::Ops> ops) {
  RESA_ASSIGN_OR_RETURN(stack_, ServingStack::Load(config_, std::move(ops), logger_.get()));
  engine::Engine* const engine = stack_->engine();
  stack_->Start();
  listeners_->serving.store(stack_.get(), std::memory_order_release);
  listeners_->service.StartServing(&stack_->model(), engine);
  listeners_->health->StartServing([engine] { return engine->Load(); });
  return absl::OkStatus();
}

void Daemon::Drain() {
  logger_->info("draining: running streams get {}",
                absl::FormatDuration(config_.listen.drain_timeout));
  Shutdown(config_.listen.drain_timeout);
  logger_->info("drained");
}

void Daemon::Shutdown(absl::Duration timeout) {
  if (listeners_ == nullptr || listeners_->server == nullptr || listeners_->drained) return;
  listeners_->drained = true;
  const absl::Time deadline = absl::Now() + timeout;
  // First the engine: who has seen NOT_SERVING gets no request in any more.
  if (stack_ != nullptr) stack_->engine()->StartDraining();
  if (listeners_->health != nullptr) listeners_->health->StartDraining();
  if (stack_ != nullptr) {
    engine::Engine* const engine = stack_->engine();
    // The port stays open meanwhile, so that new calls get their UNAVAILABLE.
    engine::EngineLoad load;
    do {
      absl::SleepFor(kDrainPoll);
      load = engine->Load();
    } while (load.running + load.waiting > 0 && absl::Now() < deadline);
    engine->AbortAll();
  }
  // Streams whose last messages are still on their way get until the deadline; then calls are cut.
  const absl::Time cut = std::max(deadline, absl::Now() + std::min(kFlushTime, timeout));
  listeners_->server->Shutdown(absl::ToChronoTime(cut));
  listeners_->server->Wait();
  if (listeners_->health != nullptr) listeners_->health->Stop();
  listeners_->http.reset();
  if (stack_ != nullptr) stack_->Stop();
}

int Daemon::grpc_port() const { return listeners_->grpc_port; }

int Daemon::http_port() const { return listeners_->http != nullptr ? listeners_->http->port() : 0; }

Readiness Daemon::readiness() const { return listeners_->health->state(); }

ServingStack* Daemon::stack() { return stack_.get(); }

}  // namespace resa::server
