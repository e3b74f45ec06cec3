// What serving costs beside the model: tokens per second through engine, service, gRPC and a socket
// when the model computes in no time, the latency that is added to a token on the way, and how the
// processor time divides. A load runs in two processes of its own, a server and a client; this one
// only starts them and prints. Built and run by hand; see --help.

#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <fstream>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "kernels/check.h"
#include "nlohmann/json.hpp"
#include "server/flag_set.h"
#include "tests/bench/serving/serving_shared.h"

namespace resa::bench {

int64_t NowNs() {
  timespec time = {};
  clock_gettime(CLOCK_MONOTONIC, &time);
  return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

int64_t CpuNs() {
  timespec time = {};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

double LatencyHistogram::Quantile(double share) const {
  double total = 0;
  for (const auto& bucket : buckets_) total += bucket.load();
  double below = 0;
  for (size_t i = 0; i < buckets_.size(); ++i) {
    below += buckets_[i].load();
    if (below >= share * total) return 1e-6 * static_cast<double>(kStepNs * (int64_t(i) + 1));
  }
  return 0;
}

void AwaitPhase(const SharedState& shared, Phase phase) {
  while (shared.phase.load() < phase) absl::SleepFor(absl::Milliseconds(20));
}

namespace {

// The child's id. The child ends with this process.
pid_t Spawn(void (*run)(SharedState*), SharedState* shared) {
  const pid_t child = fork();
  RESA_CHECK_GE(child, 0) << "fork failed";
  if (child > 0) return child;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  // As resad does.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  run(shared);
  _exit(1);
}

struct Result {
  Load load;
  double messages_per_s = 0;
  double tokens_per_s = 0;
  double merged_share = 0;  // Of the tokens: those that came in one message with an older one.
  double p50_ms = 0, p99_ms = 0, p999_ms = 0;
  double server_us = 0, client_us = 0;  // Processor time per message.
  double allocations = 0;               // operator new of the server, per token.
};

Result Run(const Load& load) {
  void* const memory =
      mmap(nullptr, sizeof(SharedState), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  RESA_CHECK(memory != MAP_FAILED);
  auto* const shared = new (memory) SharedState;
  shared->load = load;
  const pid_t server = Spawn(RunServer, shared);
  const pid_t client = Spawn(RunClient, shared);
  const auto await = [&](const auto& condition) {
    while (!condition()) {
      RESA_CHECK_EQ(waitpid(-1, nullptr, WNOHANG), 0) << "a process of the benchmark died";
      absl::SleepFor(absl::Milliseconds(20));
    }
  };
  await([&] { return shared->streaming.load(); });
  absl::SleepFor(absl::Seconds(load.warmup_seconds));
  shared->phase.store(Phase::kMeasure);
  absl::SleepFor(absl::Seconds(load.seconds));
  shared->phase.store(Phase::kEnd);
  await([&] { return shared->processes_done.load() == 2; });
  for (const pid_t child : {client, server}) {
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
  }
  Result result = {.load = load};
  const double messages = static_cast<double>(shared->messages);
  const double tokens = static_cast<double>(shared->tokens);
  result.messages_per_s = messages / shared->measured_seconds;
  result.tokens_per_s = tokens / shared->measured_seconds;
  result.merged_share = (tokens - messages) / tokens;
  result.p50_ms = shared->latency.Quantile(0.5);
  result.p99_ms = shared->latency.Quantile(0.99);
  result.p999_ms = shared->latency.Quantile(0.999);
  result.server_us = 1e-3 * static_cast<double>(shared->server_cpu_ns) / messages;
  result.client_us = 1e-3 * static_cast<double>(shared->client_cpu_ns) / messages;
  result.allocations = static_cast<double>(shared->server_allocations) / tokens;
  munmap(memory, sizeof(SharedState));
  return result;
}

const char* NameOf(ServerKind server) { return server == ServerKind::kBare ? "bare" : "resad"; }

void PrintHeader() {
  std::printf("%-6s %9s %11s %9s %7s %7s %8s %10s %10s %9s\n", "server", "offered", "messages/s",
              "merged", "p50 ms", "p99 ms", "p99.9 ms", "server us", "client us", "new/token");
}

void Print(const Result& r) {
  std::printf("%-6s %9.0f %11.0f %8.2f%% %7.2f %7.2f %8.2f %10.2f %10.2f %9.2f\n",
              NameOf(r.load.server), r.load.tokens_per_s, r.messages_per_s, 100 * r.merged_share,
              r.p50_ms, r.p99_ms, r.p999_ms, r.server_us, r.client_us, r.allocations);
  std::fflush(stdout);
}

nlohmann::json ToJson(const Result& r) {
  return {{"server", NameOf(r.load.server)},
          {"streams", r.load.streams},
          {"connections", r.load.connections},
          {"unix_socket", r.load.unix_socket},
          {"offered_tokens_per_s", r.load.tokens_per_s},
          {"messages_per_s", r.messages_per_s},
          {"tokens_per_s", r.tokens_per_s},
          {"merged_share", r.merged_share},
          {"added_latency_ms", {{"p50", r.p50_ms}, {"p99", r.p99_ms}, {"p99.9", r.p999_ms}}},
          {"server_cpu_us_per_message", r.server_us},
          {"client_cpu_us_per_message", r.client_us},
          {"server_allocations_per_token", r.allocations}};
}

int Main(int argc, char** argv) {
  Load load;
  std::string rates = "50000,100000,125000,150000", servers = "bare,resad", json;
  std::optional<int32_t> streams, connections;
  std::optional<double> seconds;
  bool help = false;
  server::FlagSet flags;
  flags.Add("server", "bare,resad", "which servers, in this order (default both)", &servers);
  flags.Add("rates", "N,N,...",
            "tokens per second over all streams; 0 with bare: as fast as gRPC takes them", &rates);
  flags.Add("streams", "N", "concurrent streams (default 256)", &streams);
  flags.Add("connections", "N", "connections that carry them (default 1)", &connections);
  flags.AddSwitch("unix", "a Unix domain socket in place of TCP on the loopback interface",
                  &load.unix_socket);
  flags.Add("seconds", "S", "time to measure each load (default 5)", &seconds);
  flags.Add("json", "FILE", "results as JSON", &json);
  flags.AddSwitch("help", "print this and exit", &help);
  const std::vector<std::string> args(argv + 1, argv + argc);
  const auto rest = flags.Parse(args);
  if (!rest.ok() || !rest->empty() || help || streams.value_or(1) < 1 ||
      connections.value_or(1) < 1 || seconds.value_or(1) <= 0) {
    std::fprintf(stderr, "%s\n%s", std::string(rest.status().message()).c_str(),
                 flags.Help().c_str());
    return help ? 0 : 2;
  }
  load.streams = streams.value_or(load.streams);
  load.connections = connections.value_or(load.connections);
  load.seconds = seconds.value_or(load.seconds);
  std::printf("%d streams over %d connections (%s); %u processors\n", load.streams,
              load.connections, load.unix_socket ? "Unix domain socket" : "TCP",
              std::thread::hardware_concurrency());
  PrintHeader();
  nlohmann::json results = nlohmann::json::array();
  for (const absl::string_view rate : absl::StrSplit(rates, ',')) {
    for (const absl::string_view name : absl::StrSplit(servers, ',')) {
      load.server = name == "bare" ? ServerKind::kBare : ServerKind::kResad;
      if (!absl::SimpleAtod(rate, &load.tokens_per_s) || load.tokens_per_s < 0) {
        std::fprintf(stderr, "--rates: '%s' is no rate\n", std::string(rate).c_str());
        return 2;
      }
      if (load.tokens_per_s == 0 && load.server == ServerKind::kResad) continue;
      const Result result = Run(load);
      Print(result);
      results.push_back(ToJson(result));
    }
  }
  if (!json.empty()) std::ofstream(json) << results.dump(1) << "\n";
  return 0;
}

}  // namespace
}  // namespace resa::bench

int main(int argc, char** argv) { return resa::bench::Main(argc, argv); }
