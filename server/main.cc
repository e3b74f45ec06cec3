// resad: wiring only. The one file that names a backend.

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "kernels/cpu/cpu_ops.h"
#if RESA_HAVE_CUDA
#include "kernels/cuda/cuda_ops.h"
#endif
#include "server/config.h"
#include "server/daemon.h"
#include "server/serving_stack.h"
#include "spdlog/sinks/stdout_sinks.h"
#include "spdlog/spdlog.h"

namespace {

using ::resa::server::CommandLine;
using ::resa::server::Config;
using ::resa::server::Daemon;
using ::resa::server::ServingStack;

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "resad: %s\n", std::string(status.message()).c_str());
  return 1;
}

std::shared_ptr<spdlog::logger> MakeLogger(const resa::server::LogOptions& options) {
  auto logger =
      std::make_shared<spdlog::logger>("resad", std::make_shared<spdlog::sinks::stderr_sink_mt>());
  logger->set_pattern("%Y-%m-%dT%H:%M:%S.%eZ %l %v", spdlog::pattern_time_type::utc);
  logger->set_level(spdlog::level::from_str(options.level));
  logger->flush_on(spdlog::level::trace);
  return logger;
}

using OpsOr = absl::StatusOr<std::unique_ptr<resa::kernels::Ops>>;

OpsOr MakeCpuOps(const resa::server::DeviceOptions& options) {
  using ::resa::kernels::Bf16Linear;
  if (!resa::kernels::CpuSupported()) {
    return absl::FailedPreconditionError(
        "--device: this CPU lacks what the kernels need (on x86-64: AVX2, FMA, F16C and BMI2)");
  }
  return resa::kernels::CreateCpuOps(
      {.threads = options.threads,
       .bf16_linear = options.cpu_bf16 ? Bf16Linear::kAuto : Bf16Linear::kOff});
}

#if RESA_HAVE_CUDA
OpsOr MakeCudaOps(int index, bool deterministic) {
  std::string why_not;
  auto ops =
      resa::kernels::CreateCudaOps({.device = index, .deterministic = deterministic}, &why_not);
  if (ops == nullptr) return absl::FailedPreconditionError("--device: " + why_not);
  return ops;
}
#else
OpsOr MakeCudaOps(int, bool) {
  return absl::FailedPreconditionError(
      "--device: this resad is built without CUDA; use auto or cpu, or build it where nvcc is");
}
#endif

int VisibleGpus() {
#if RESA_HAVE_CUDA
  return resa::kernels::CudaDeviceCount();
#else
  return 0;
#endif
}

// Auto says why a GPU that is there is passed over: nobody wants to find out by the speed.
OpsOr MakeOps(const resa::server::DeviceOptions& options, spdlog::logger* logger) {
  using ::resa::server::Device;
  if (options.device == Device::kCpu) return MakeCpuOps(options);
  if (options.device == Device::kCuda) {
    return MakeCudaOps(options.cuda_index, options.deterministic);
  }
  for (int index = 0; index < VisibleGpus(); ++index) {
    OpsOr ops = MakeCudaOps(index, options.deterministic);
    if (ops.ok()) return ops;
    logger->warn("passed over: {}", std::string(ops.status().message()));
  }
  return MakeCpuOps(options);
}

// Waits for SIGTERM and SIGINT on a thread of its own. The first asks to stop; another one, or the
// first while there is nothing to drain yet, ends the process at once.
class SignalWaiter {
 public:
  // REQUIRES that no other thread runs yet: threads inherit the blocked signals.
  SignalWaiter() {
    sigemptyset(&signals_);
    sigaddset(&signals_, SIGTERM);
    sigaddset(&signals_, SIGINT);
    pthread_sigmask(SIG_BLOCK, &signals_, nullptr);
    std::thread([this] { Loop(); }).detach();
  }

  void StartServing() { serving_.store(true); }
  void WaitForStop() { stop_.WaitForNotification(); }

 private:
  void Loop() {
    while (true) {
      int signal = 0;
      if (sigwait(&signals_, &signal) != 0) continue;
      if (!serving_.load() || stop_.HasBeenNotified()) _exit(0);
      stop_.Notify();
    }
  }

  sigset_t signals_;
  std::atomic<bool> serving_ = false;
  absl::Notification stop_;
};

int Check(const Config& config, spdlog::logger* logger) {
  if (const absl::Status status = Daemon::CheckAddresses(config.listen, logger); !status.ok()) {
    return Fail(status);
  }
  OpsOr ops = MakeOps(config.device, logger);
  if (!ops.ok()) return Fail(ops.status());
  const auto stack = ServingStack::Load(config, *std::move(ops), /*observer=*/nullptr, logger);
  if (!stack.ok()) return Fail(stack.status());
  logger->info("the settings and the model are good");
  return 0;
}

int Serve(const Config& config, std::shared_ptr<spdlog::logger> logger) {
  // Outlives everything: its thread runs until the process ends.
  static SignalWaiter* const signals = new SignalWaiter;
  const auto daemon = Daemon::Create(config, logger);
  if (!daemon.ok()) return Fail(daemon.status());
  OpsOr ops = MakeOps(config.device, logger.get());
  if (!ops.ok()) return Fail(ops.status());
  if (const absl::Status status = (*daemon)->Load(*std::move(ops)); !status.ok()) {
    return Fail(status);
  }
  signals->StartServing();
  signals->WaitForStop();
  (*daemon)->Drain();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  // Debian's abseil looks for cycles of locks at every lock taken, gRPC's included.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  const std::vector<std::string> args(argv + 1, argv + argc);
  const absl::StatusOr<CommandLine> line = resa::server::ParseCommandLine(args);
  if (!line.ok()) return Fail(line.status());
  if (line->help) {
    std::fputs(resa::server::HelpText().c_str(), stdout);
    return 0;
  }
  if (line->version) {
    std::printf("resad %s\n", resa::server::kServerVersion);
    return 0;
  }
  const absl::StatusOr<Config> config = resa::server::ResolveConfig(line->settings);
  if (!config.ok()) return Fail(config.status());
  std::shared_ptr<spdlog::logger> logger = MakeLogger(config->log);
  return line->check ? Check(*config, logger.get()) : Serve(*config, logger);
}
