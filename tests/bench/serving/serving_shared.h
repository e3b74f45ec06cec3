#ifndef RESA_TESTS_BENCH_SERVING_SERVING_SHARED_H_
#define RESA_TESTS_BENCH_SERVING_SERVING_SHARED_H_

// What the three processes of serving_bench share: one piece of memory, made before they part.

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>

namespace resa::bench {

// CLOCK_MONOTONIC, the same for all processes.
int64_t NowNs();
// Processor time of the calling process, all threads.
int64_t CpuNs();

// Which server answers.
enum class ServerKind : int32_t {
  kResad,  // Engine, GenerateService, metrics; the model computes nothing.
  kBare,   // Writes ready-made messages of the same size: what gRPC alone costs.
};

struct Load {
  ServerKind server = ServerKind::kResad;
  int streams = 256;
  int connections = 1;
  bool unix_socket = false;  // Else TCP on the loopback interface.
  double tokens_per_s = 0;   // Over all streams. kBare only: 0, as fast as they are taken.
  double seconds = 5;        // Of measuring, after `warmup_seconds`.
  double warmup_seconds = 1.5;
  int stop_strings = 2;  // Per request; they never match.
};

enum class Phase : int32_t { kStart, kMeasure, kEnd };

// Latencies from 0 to 100 ms in steps of 10 us; the last bucket holds what is above.
class LatencyHistogram {
 public:
  static constexpr int64_t kStepNs = 10'000;
  static constexpr int kBuckets = 10'000;

  void Add(int64_t ns) {
    const int64_t bucket = std::clamp<int64_t>(ns / kStepNs, 0, kBuckets - 1);
    buckets_[static_cast<size_t>(bucket)].fetch_add(1, std::memory_order_relaxed);
  }
  // The upper edge, in milliseconds, of the bucket that this share of all values reaches.
  double Quantile(double share) const;

 private:
  std::array<std::atomic<uint32_t>, kBuckets> buckets_ = {};
};

// Token ids name the step that made them, modulo this many.
inline constexpr int kStepNames = 200;

struct SharedState {
  Load load;
  std::atomic<bool> listening = false;  // Set by the server, after `address`.
  std::array<char, 108> address = {};   // As gRPC spells it, with a terminating zero.
  std::atomic<bool> streaming = false;  // Set by the client when every stream has had a token.
  std::atomic<Phase> phase = Phase::kStart;
  std::atomic<int32_t> processes_done = 0;

  // When the step of that name handed out its tokens.
  std::array<std::atomic<int64_t>, kStepNames> handed_out_ns = {};
  // The token id of a step name; written before `listening`.
  std::array<int32_t, kStepNames> token_of_step = {};

  // Results, of the measured time.
  int64_t messages = 0;
  int64_t tokens = 0;
  double measured_seconds = 0;
  LatencyHistogram latency;
  int64_t client_cpu_ns = 0;
  int64_t server_cpu_ns = 0;
  int64_t server_allocations = 0;
};

// The other two processes; each returns when the phase has become kEnd.
void RunServer(SharedState* shared);
void RunClient(SharedState* shared);

// Sleeps until the phase is `phase`.
void AwaitPhase(const SharedState& shared, Phase phase);

}  // namespace resa::bench

#endif  // RESA_TESTS_BENCH_SERVING_SERVING_SHARED_H_
