// Measures the ceilings of kernels/ceilings.h with plain loops on the backend's threads.
//
// Each is the best of many short measurements, a fraction of a millisecond to a few long: on a
// shared machine most moments are disturbed, and the best falls into one that is not.

#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/ceilings.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/context.h"

HWY_BEFORE_NAMESPACE();
namespace resa::kernels::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Reads `count` floats, a multiple of 8 vectors, aligned, and returns their sum.
float ReadImpl(const float* from, size_t count) {
  const hn::ScalableTag<float> d;
  const size_t lanes = hn::Lanes(d);
  hn::Vec<decltype(d)> sum[8];
  for (auto& s : sum) s = hn::Zero(d);
  for (size_t i = 0; i < count; i += 8 * lanes) {
    for (size_t j = 0; j < 8; ++j) sum[j] = hn::Add(sum[j], hn::Load(d, from + i + j * lanes));
  }
  for (size_t j = 1; j < 8; ++j) sum[0] = hn::Add(sum[0], sum[j]);
  return hn::GetLane(hn::SumOfLanes(d, sum[0]));
}

// `rounds` times 12 independent multiply-adds, enough to hide their latency on two ports; returns
// the operations done. *sink keeps the compiler from leaving them out.
double MultiplyImpl(int64_t rounds, float* sink) {
  const hn::ScalableTag<float> d;
  hn::Vec<decltype(d)> acc[12];
  for (auto& a : acc) a = hn::Set(d, *sink);
  const auto scale = hn::Set(d, 0.999f), add = hn::Set(d, 1e-3f);
  for (int64_t i = 0; i < rounds; ++i) {
    for (auto& a : acc) a = hn::MulAdd(a, scale, add);
  }
  for (size_t j = 1; j < 12; ++j) acc[0] = hn::Add(acc[0], acc[j]);
  *sink = hn::GetLane(acc[0]);
  return 2.0 * 12 * static_cast<double>(hn::Lanes(d)) * static_cast<double>(rounds);
}

}  // namespace HWY_NAMESPACE
}  // namespace resa::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace resa::kernels::cpu {
namespace {

HWY_EXPORT(ReadImpl);
HWY_EXPORT(MultiplyImpl);

// How long each of the two measurements goes on.
constexpr double kSeconds = 0.2;

// For one thread the processor time of the process, which other load disturbs less than the time
// of day.
double Now(int threads) {
  timespec time = {};
  clock_gettime(threads == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// One float per thread, each on its own cache line.
class Sinks {
 public:
  explicit Sinks(int threads) : values_(static_cast<size_t>(threads) * 16, 1.0f) {}
  float* of(int thread) { return &values_[static_cast<size_t>(thread) * 16]; }

 private:
  std::vector<float> values_;
};

constexpr size_t kPartBytes = size_t{1} << 20;    // What a thread reads at a time.
constexpr size_t kSliceBytes = size_t{16} << 20;  // What is timed at a time.
constexpr size_t kMinBytes = 8 * kSliceBytes;     // What is walked through in a circle, at least
constexpr size_t kMaxBytes = 32 * kSliceBytes;    // and at most: MeasureCeilings promises it.

// Twice the last-level cache, so that it has forgotten a slice when it comes round again.
size_t WalkedBytes() {
  const int64_t cache = std::max<int64_t>(0, sysconf(_SC_LEVEL3_CACHE_SIZE));
  const size_t slices = (2 * static_cast<size_t>(cache) + kSliceBytes - 1) / kSliceBytes;
  return std::clamp(slices * kSliceBytes, kMinBytes, kMaxBytes);
}

double ReadBandwidth(ThreadPool& pool) {
  const size_t bytes = WalkedBytes();
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  const std::unique_ptr<float, Free> memory(
      static_cast<float*>(std::aligned_alloc(size_t{2} << 20, bytes)));
  RESA_CHECK(memory != nullptr) << "no memory to measure the bandwidth: " << bytes << " bytes";
  // On small pages the TLB would be measured; refused where there are none.
  (void)madvise(memory.get(), bytes, MADV_HUGEPAGE);
  constexpr size_t kPartFloats = kPartBytes / sizeof(float);
  pool.For(static_cast<int64_t>(bytes / kPartBytes), [&](int64_t part, int) {
    std::fill_n(memory.get() + static_cast<size_t>(part) * kPartFloats, kPartFloats, 1.0f);
  });

  const auto read = HWY_DYNAMIC_DISPATCH(ReadImpl);
  const int threads = pool.threads();
  Sinks sums(threads);
  double best = 0, spent = 0;
  const size_t slices = bytes / kSliceBytes;
  for (size_t slice = 0; spent < kSeconds || slice < slices; ++slice) {
    const float* const from = memory.get() + slice % slices * (kSliceBytes / sizeof(float));
    const double start = Now(threads);
    pool.For(kSliceBytes / kPartBytes, [&](int64_t part, int thread) {
      *sums.of(thread) += read(from + static_cast<size_t>(part) * kPartFloats, kPartFloats);
    });
    const double seconds = Now(threads) - start;
    best = std::max(best, kSliceBytes / seconds);
    spent += seconds;
  }
  return best;
}

double PeakFlops(ThreadPool& pool) {
  constexpr int64_t kRounds = 100'000;
  const auto multiply = HWY_DYNAMIC_DISPATCH(MultiplyImpl);
  const int threads = pool.threads();
  Sinks sinks(threads);
  std::vector<double> flops(static_cast<size_t>(threads));
  double best = 0, spent = 0;
  for (int round = 0; spent < kSeconds || round < 3; ++round) {
    const double start = Now(threads);
    pool.For(threads, [&](int64_t task, int thread) {
      flops[static_cast<size_t>(task)] = multiply(kRounds, sinks.of(thread));
    });
    const double seconds = Now(threads) - start;
    double total = 0;
    for (const double f : flops) total += f;
    best = std::max(best, total / seconds);
    spent += seconds;
  }
  return best;
}

}  // namespace

Ceilings MeasureCeilings(Context& context) {
  return {.read_bytes_per_s = ReadBandwidth(context.pool), .flops_per_s = PeakFlops(context.pool)};
}

}  // namespace resa::kernels::cpu
#endif  // HWY_ONCE
