#include "tests/bench/machine_ceilings.h"

#include <time.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tests/bench/machine_ceilings.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace resa::bench {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Reads n floats (a multiple of 8 vectors) and returns their sum.
float ReadImpl(const float* from, size_t n) {
  const hn::ScalableTag<float> d;
  const size_t lanes = hn::Lanes(d);
  hn::Vec<decltype(d)> sum[8];
  for (auto& s : sum) s = hn::Zero(d);
  for (size_t i = 0; i < n; i += 8 * lanes) {
    for (size_t j = 0; j < 8; ++j) sum[j] = hn::Add(sum[j], hn::Load(d, from + i + j * lanes));
  }
  for (size_t j = 1; j < 8; ++j) sum[0] = hn::Add(sum[0], sum[j]);
  return hn::GetLane(hn::SumOfLanes(d, sum[0]));
}

// `rounds` times 12 independent multiply-adds; returns the operations done.
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
}  // namespace resa::bench
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "kernels/cpu/thread_pool.h"

namespace resa::bench {

HWY_EXPORT(ReadImpl);
HWY_EXPORT(MultiplyImpl);

double Now(int threads) {
  timespec time = {};
  clock_gettime(threads == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

double MeasureReadBandwidth(int threads) {
  kernels::cpu::ThreadPool pool(threads);
  constexpr size_t kFloats = size_t{128} << 20;
  std::vector<float> memory(kFloats + 16, 1.0f);
  const float* const begin =
      reinterpret_cast<const float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  constexpr size_t kPart = size_t{1} << 18;
  const auto read = HWY_DYNAMIC_DISPATCH(ReadImpl);
  double best = 0;
  std::vector<float> sums(static_cast<size_t>(threads) * 64);
  // As below: the whole is read in slices, each timed alone.
  constexpr size_t kSlice = size_t{1} << 23;
  for (size_t slice = 0; slice < 5 * (kFloats / kSlice); ++slice) {
    const float* const from = begin + slice % (kFloats / kSlice) * kSlice;
    const double start = Now(threads);
    pool.For(kSlice / kPart, [&](int64_t task, int thread) {
      sums[static_cast<size_t>(thread) * 64] +=
          read(from + static_cast<size_t>(task) * kPart, kPart);
    });
    best = std::max(best, kSlice * sizeof(float) / (Now(threads) - start));
  }
  return best;
}

double MeasurePeakFlops(int threads) {
  kernels::cpu::ThreadPool pool(threads);
  const auto multiply = HWY_DYNAMIC_DISPATCH(MultiplyImpl);
  // Many short measurements: the best of them falls into an undisturbed moment.
  constexpr int64_t kRounds = 100'000;
  double best = 0;
  for (int round = 0; round < 500; ++round) {
    std::vector<double> flops(static_cast<size_t>(threads));
    std::vector<float> sinks(static_cast<size_t>(threads) * 64, 1.0f);
    const double start = Now(threads);
    pool.For(threads, [&](int64_t task, int) {
      flops[static_cast<size_t>(task)] = multiply(kRounds, &sinks[static_cast<size_t>(task) * 64]);
    });
    const double seconds = (Now(threads) - start);
    double total = 0;
    for (double f : flops) total += f;
    best = std::max(best, total / seconds);
  }
  return best;
}

}  // namespace resa::bench
#endif  // HWY_ONCE
