#include "server/daemon.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/invalid.h"
#include "engine/status_macros.h"
#include "grpcpp/grpcpp.h"
#include "grpcpp/health_check_service_interface.h"
#include "server/generate_service.h"
#include "server/grpc_settings.h"
#include "server/http_server.h"
#include "server/listen_address.h"

namespace resa::server {
namespace {

// What the last messages of aborted streams get to leave.
constexpr absl::Duration kFlushTime = absl::Seconds(2);
constexpr absl::Duration kDrainPoll = absl::Milliseconds(10);
// What calls of other kinds get to end: health checks, but also watches, which never do.
constexpr absl::Duration kCloseTime = absl::Milliseconds(100);

}  // namespace

struct Daemon::Listeners {
  Listeners(const Config& config, std::shared_ptr<spdlog::logger> logger, MetricsExporter* exporter)
      : metrics(exporter), service(std::move(logger), config.log.prompts, exporter) {}

  HttpResponse Metrics() const {
    ServingStack* stack = serving.load(std::memory_order_acquire);
    HttpResponse response;
    response.content_type = "text/plain; version=0.0.4; charset=utf-8";
    response.body =
        metrics->Render(stack != nullptr ? stack->engine()->Load() : engine::EngineLoad());
    return response;
  }
  HttpResponse Healthz() const {
    const Readiness readiness = health->state();
    HttpResponse response;
    response.status = readiness == Readiness::kServing ? 200 : 503;
    response.body = absl::StrCat(NameOf(readiness), "\n");
    return response;
  }

  MetricsExporter* const metrics;
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
      metrics_(config.model.served_name),
      listeners_(std::make_unique<Listeners>(config, logger_, &metrics_)) {}

Daemon::~Daemon() { Shutdown(absl::ZeroDuration()); }

absl::Status Daemon::CheckAddresses(const ListenOptions& listen, spdlog::logger* logger) {
  const absl::StatusOr<Reach> reach = ResolveListenAddress(listen.grpc_address);
  if (!reach.ok()) return engine::Invalid("--listen: ", reach.status().message());
  if (*reach == Reach::kNetwork) {
    logger->warn(
        "--listen: {} can be reached from the network, without encryption and by anyone; let a "
        "proxy or a service mesh see to TLS and to who may call",
        listen.grpc_address);
  }
  return listen.http_address.empty() ? absl::OkStatus()
                                     : HttpServer::CheckAddress(listen.http_address);
}

absl::Status Daemon::Listen() {
  RESA_RETURN_IF_ERROR(CheckAddresses(config_.listen, logger_.get()));
  grpc::ServerBuilder builder;
  ApplyGrpcSettings(&builder);
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
  RESA_ASSIGN_OR_RETURN(stack_,
                        ServingStack::Load(config_, std::move(ops), &metrics_, logger_.get()));
  metrics_.Describe(stack_->model().description);
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
  // First the engine: who has seen NOT_SERVING gets no request in any more.
  if (stack_ != nullptr) stack_->engine()->StartDraining();
  if (listeners_->health != nullptr) listeners_->health->StartDraining();
  // The port stays open meanwhile, so that new calls get their UNAVAILABLE.
  if (!WaitForCalls(absl::Now() + timeout) && stack_ != nullptr) {
    stack_->engine()->AbortAll();
    WaitForCalls(absl::Now() + std::min(kFlushTime, timeout));
  }
  listeners_->server->Shutdown(absl::ToChronoTime(absl::Now() + kCloseTime));
  listeners_->server->Wait();
  if (listeners_->health != nullptr) listeners_->health->Stop();
  listeners_->http.reset();
  if (stack_ != nullptr) stack_->Stop();
}

bool Daemon::WaitForCalls(absl::Time deadline) const {
  while (listeners_->service.LiveCalls() > 0) {
    if (absl::Now() >= deadline) return false;
    absl::SleepFor(kDrainPoll);
  }
  return true;
}

int Daemon::grpc_port() const { return listeners_->grpc_port; }

int Daemon::http_port() const { return listeners_->http != nullptr ? listeners_->http->port() : 0; }

Readiness Daemon::readiness() const { return listeners_->health->state(); }

ServingStack* Daemon::stack() { return stack_.get(); }

}  // namespace resa::server
